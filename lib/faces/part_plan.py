"""The parts of a table: their photos, the names of their files, and older files with rows of the same photos.

A photo that is a file belongs to a part by a hash of its name. So a new photo changes one part, and no other photo
moves. Photos in container files belong to a part by their place, because such files can only be read in runs.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from lib.faces import table
from lib.faces.manifest import MANIFEST_SCHEMA, Manifest
from lib.faces.photo_database import PhotoDatabase, quoted
from lib.faces.plan_files import MADE_OF, PLAN_SCHEMA, Part, PartPlan, PlanWriter
from lib.parts import digest_of, part_key, part_name, split_in

# Small enough that an interruption costs little, large enough that ten million photos are ten thousand files.
MIN_PART, MAX_PART, PARTS_WANTED = 32, 1000, 64
MOST_PARTS = 1 << 15
"""From so many parts of `MAX_PART` on, parts grow instead: the driver takes some 10 kB for each."""

PIECES_OF_A_GROUP = 4
"""Most parts of a Parquet row group of at most `MAX_PART` photos, because each reads the group from its start."""

SIZE, BUCKETS = "part_size", "part_buckets"
"""Entries of a plan: the intended number of photos of a part, and the number of parts by split."""

Run = tuple[str, int]
"""The key of a part, and the number of its photos."""


def content_of(
    fingerprint: Mapping[str, Any], max_megapixels: float, image_column: str, *, is_verified: bool = False
) -> str:
    """Return a digest of the settings that decide the rows of a photo."""
    content = digest_of([json.dumps(fingerprint, sort_keys=True), str(max_megapixels), image_column])
    return digest_of([content, "verify"]) if is_verified else content


def part_size(num_photos: int) -> int:
    """Return the intended number of photos of a part."""
    return max(min(MAX_PART, max(MIN_PART, num_photos // PARTS_WANTED)), num_photos // MOST_PARTS)


def plan_parts(manifest: Manifest, content: str, earlier: Mapping[str, Any] | None = None) -> PartPlan:
    """Return the parts of a manifest. `content` is that of the settings, `earlier` the plan of the version before."""
    wanted = part_size(len(manifest))
    size = int((earlier or {}).get(SIZE, wanted))
    if wanted >= 4 * size:
        size = wanted
    buckets: dict[str, int] = {}
    if manifest.in_files:
        runs, order = list(_container_runs(manifest.database, size)), "place"
    else:
        buckets = _buckets(manifest.database, wanted, (earlier or {}).get(BUCKETS, {}))
        runs, order = list(_hashed_runs(manifest.database, buckets)), f"split, {_bucket_of(buckets)}, photo"
    sorted_photos = f"select {quoted(MANIFEST_SCHEMA.names)}, {_made_of(content)} from photos order by {order}"
    batches = manifest.database.batches(sorted_photos)
    with PlanWriter(manifest.database.folder / "plan") as writer:
        parts = [_part(key, photos, writer) for (key, _), photos in zip(runs, _cut(batches, runs), strict=True)]
    return PartPlan(
        url=str(writer.folder),
        parts=parts,
        layout={SIZE: size, BUCKETS: buckets},
        num_photos=len(manifest),
        num_bytes=manifest.num_bytes,
        num_passed_over=manifest.num_passed_over,
        owner=manifest.database,
    )


def earlier_files(
    parts: Sequence[Part], layout: Mapping[str, Any], earlier: Mapping[str, Any] | None
) -> list[list[str]]:
    """Return for each part the files of the version before that may have rows of its photos, its own split first.

    `earlier` is the content of that version's `_SUCCESS`.
    """
    by_key: dict[str, list[str]] = defaultdict(list)
    for name in (earlier or {}).get("parts", ()):
        if (key := part_key(name)) is not None:
            by_key[_file_of(key)].append(name)
    before, now = (earlier or {}).get(BUCKETS, {}), layout[BUCKETS]
    found: list[list[str]] = []
    for part in parts:
        own = next(iter(part.names))
        keys = [_file_of(part.key)]
        if now:
            # Both numbers are powers of two, so a part shares photos with these parts of the other version.
            keys = [_bucket_key(bucket) for bucket in _buckets_before(int(part.key), own, before, now)]
        names = [name for key in keys for name in by_key.get(key, ())]
        found.append(sorted(names, key=lambda name: (split_in(name) != own, name)))
    return found


def _buckets_before(bucket: int, split: str, before: Mapping[str, int], now: Mapping[str, int]) -> list[int]:
    """Return the numbers of the parts, in any split, that photos of a part were in."""
    found = set()
    for num in before.values():
        fewer = min(num, now[split])
        found |= set(range(bucket % fewer, num, fewer))
    return sorted(found)


def _file_of(key: str) -> str:
    """Return the key of the container file of a part; any other key as it is."""
    return key.partition(".")[0]


def _made_of(content: str) -> str:
    """Return the SQL for a hash of a photo's name, place, size, mark and known status, and of the settings.

    It is the first 8 bytes of MD5 as an integer.
    """
    names = ("photo", "source", "group", "row", "num_bytes", "mark", "status")
    texts = ", ".join(f"coalesce(\"{name}\"::varchar, 'None')" for name in names)
    return f"md5_number_upper('{content}' || concat_ws(chr(0), {texts})) as {MADE_OF}"


def _buckets(database: PhotoDatabase, size: int, earlier: Mapping[str, int]) -> dict[str, int]:
    """Return the number of parts of each split: powers of two, which double when parts grow to twice their size."""
    counts = dict(database.rows("select split, count(*) from photos group by split"))
    buckets = {}
    for split in table.SPLITS:
        buckets[split] = earlier.get(split) or 1
        while counts.get(split, 0) > size * buckets[split] * (2 if earlier.get(split) else 1):
            buckets[split] *= 2
    return buckets


def _bucket_key(bucket: int) -> str:
    return f"{bucket:06d}"


def _bucket_of(buckets: Mapping[str, int]) -> str:
    """Return the SQL for the number of a photo's part: MD5 of its name, modulo the number of parts."""
    cases = " ".join(f"when '{split}' then {num}" for split, num in buckets.items())
    return f"((md5_number_upper(photo) & 4294967295) % case split {cases} end)"


def _hashed_runs(database: PhotoDatabase, buckets: Mapping[str, int]) -> Iterator[Run]:
    """Yield the parts of photos sorted by split, part and name."""
    bucket = _bucket_of(buckets)
    rows = database.rows(f"select split, {bucket} as b, count(*) from photos group by split, b order by split, b")
    for _, number, num in rows:
        yield _bucket_key(number), num


def _container_runs(database: PhotoDatabase, size: int) -> Iterator[Run]:
    """Yield parts of about so many rows; they end between files, and between groups if they can.

    Each part reads all groups that it shares with others.
    """
    groups = database.rows('select source, count(*) from photos group by source, "group" order by min(place)')
    for source, of_file in groupby(groups, key=lambda group: group[0]):
        key = f"c{digest_of([source or ''])[:10]}"
        ends = [0, *accumulate(num for _, num in of_file)]
        for number, (start, stop) in enumerate(pairwise([0, *_stops(ends, size)])):
            yield f"{key}.{number:06d}", stop - start


def _stops(ends: Sequence[int], size: int) -> list[int]:
    """Return the ends of the parts of one file, from the ends of its groups."""
    stops = [ends[0]]
    for start, end in pairwise(ends):
        if end - stops[-1] > size and start > stops[-1]:
            stops.append(start)
        num_pieces = min(-(-(end - start) // size), max(PIECES_OF_A_GROUP, -(-(end - start) // MAX_PART)))
        stops += [start + (end - start) * piece // num_pieces for piece in range(1, num_pieces)]
    return [*stops[1:], ends[-1]]


def _cut(batches: Iterator[pa.RecordBatch], runs: Sequence[Run]) -> Iterator[pa.Table]:
    """Yield the rows of each run."""
    rest: pa.RecordBatch | None = None
    for _, num in runs:
        pieces, wanted = [], num
        while wanted:
            batch = next(batches) if rest is None else rest
            pieces.append(batch.slice(0, wanted))
            rest = batch.slice(wanted) if len(batch) > wanted else None
            wanted -= len(pieces[-1])
        yield pa.Table.from_batches(pieces).combine_chunks()


def _part(key: str, rows: pa.Table, writer: PlanWriter) -> Part:
    """Write the rows of a part, and return it. Its files are named by a digest of its rows."""
    hashes = rows[MADE_OF].combine_chunks().to_numpy().view(np.int64)  # the database has no sign
    photos = rows.set_column(rows.schema.get_field_index(MADE_OF), MADE_OF, pa.array(hashes)).cast(PLAN_SCHEMA)
    splits = photos["split"].to_pylist()
    digest = hashlib.sha256(hashes.tobytes())
    for texts in (splits, photos["identity"].to_pylist()):
        digest.update("".join(f"{text!r}\0" for text in texts).encode())
    shard, start = writer.add(photos)
    names = {split: part_name(split, key, digest.hexdigest()) for split in sorted(set(splits))}
    return Part(key=key, shard=shard, start=start, stop=start + len(photos), names=names)
