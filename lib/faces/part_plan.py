"""Which photos make a part, what its files are called, and which older files hold rows of the same photos.

A photo that is a file belongs to a part by a hash of its name. So a new photo changes one part, and no other photo
moves.
Photos in container files belong to a part by their place, because such files can only be read in runs.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from lib.faces import table
from lib.faces.manifest import Manifest
from lib.parts import digest_of, part_key, part_name, split_in

# Small enough that an interruption costs little, large enough that ten million photos are ten thousand files.
MIN_PART, MAX_PART, PARTS_WANTED = 32, 1000, 64

PIECES_OF_A_GROUP = 4
"""A Parquet row group of at most `MAX_PART` photos is cut into no more parts, for each reads it from its beginning."""

SIZE, BUCKETS = "part_size", "part_buckets"
"""Entries of a plan: photos that a part was meant to have, and the number of parts by split."""

MADE_OF = "made_of"


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of the planned photos, and the file they become in each split."""

    key: str
    start: int
    stop: int
    names: Mapping[str, str]

    def file_names(self) -> list[str]:
        """Return the files of this part below the faces folder."""
        return list(self.names.values())


@dataclass(frozen=True)
class PartPlan:
    """All parts of a table.

    Attributes:
        photos: the rows of the manifest in the order of the parts, with the column `made_of`, int64: a hash of all that
            the rows of a photo depend on. Identity and split are not among it.
        layout: what the plan keeps, so that later parts have the same borders.
    """

    photos: pa.Table
    parts: list[Part]
    layout: dict[str, Any]

    def file_names(self) -> list[str]:
        """Return the files of all parts."""
        return [name for part in self.parts for name in part.file_names()]

    def renamed(self, names: Mapping[str, str]) -> "PartPlan":
        """Return the plan with other names for some of its files."""
        parts = [
            replace(part, names={split: names.get(name, name) for split, name in part.names.items()})
            for part in self.parts
        ]
        return replace(self, parts=parts)


def content_of(fingerprint: Mapping[str, Any], max_megapixels: float, image_column: str) -> str:
    """Return a digest of the settings that decide what becomes of a photo."""
    return digest_of([json.dumps(fingerprint, sort_keys=True), str(max_megapixels), image_column])


def plan_parts(manifest: Manifest, content: str, earlier: Mapping[str, Any] | None = None) -> PartPlan:
    """Return the parts of a manifest. `content` is that of the settings, `earlier` the plan of the version before."""
    wanted = min(MAX_PART, max(MIN_PART, len(manifest) // PARTS_WANTED))
    size = int((earlier or {}).get(SIZE, wanted))
    if wanted >= 4 * size:
        size = wanted
    photos = manifest.photos.append_column(MADE_OF, _made_of(manifest.photos, content))
    if photos["row"].null_count < len(photos):
        buckets: dict[str, int] = {}
        runs = list(_container_runs(photos, size))
    else:
        buckets = _buckets(photos, wanted, (earlier or {}).get(BUCKETS, {}))
        photos, runs = _hashed_runs(photos, buckets)
    return PartPlan(photos, list(_parts(photos, runs)), {SIZE: size, BUCKETS: buckets})


def earlier_files(
    parts: Sequence[Part], layout: Mapping[str, Any], earlier: Mapping[str, Any] | None
) -> list[list[str]]:
    """Return for each part the files of the version before that may hold rows of its photos, its own split first.

    `earlier` is what `_SUCCESS` says of that version.
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
            # Both numbers are powers of two: a part of the one holds photos of these parts of the other.
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
    """Return the key of the container file that a part is of; any other key as it is."""
    return key.partition(".")[0]


def _made_of(photos: pa.Table, content: str) -> pa.Array:
    """Return for each photo a hash of its name, place, size and mark, of what is known of it, and of the settings."""
    names = ("photo", "source", "group", "row", "num_bytes", "mark", "status")
    start = content.encode()
    hashes = np.empty(len(photos), np.int64)
    first = 0
    for batch in photos.select(names).to_batches(max_chunksize=65_536):
        texts = (
            "\0".join(map(str, row)) for row in zip(*(column.to_pylist() for column in batch.columns), strict=True)
        )
        hashes[first : first + len(batch)] = [_hash64(start + text.encode()) for text in texts]
        first += len(batch)
    return pa.array(hashes)


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.md5(data, usedforsecurity=False).digest()[:8], "little", signed=True)


def _buckets(photos: pa.Table, size: int, earlier: Mapping[str, int]) -> dict[str, int]:
    """Return the number of parts of each split: powers of two, which double where parts grow to twice their size."""
    buckets = {}
    for split in table.SPLITS:
        num = int(np.count_nonzero(photos["split"].to_numpy() == split))
        buckets[split] = earlier.get(split) or 1
        while num > size * buckets[split] * (2 if earlier.get(split) else 1):
            buckets[split] *= 2
    return buckets


def _bucket_key(bucket: int) -> str:
    return f"{bucket:06d}"


def _hashed_runs(photos: pa.Table, buckets: Mapping[str, int]) -> tuple[pa.Table, list[tuple[str, int, int]]]:
    """Return photos sorted by split, part and name, and key, start and stop of each part."""
    hashes_N = np.array([_hash64(name.encode()) & 0xFFFFFFFF for name in photos["photo"].to_pylist()], np.int64)
    splits_N = np.searchsorted(sorted(table.SPLITS), photos["split"].to_numpy().astype(str))
    sizes = np.array([buckets[split] for split in sorted(table.SPLITS)])
    buckets_N = hashes_N % sizes[splits_N]
    order_N = np.lexsort((np.arange(len(photos)), buckets_N, splits_N))  # the manifest is sorted by name
    places_N = np.stack([splits_N, buckets_N])[:, order_N]
    stops = [*(np.flatnonzero(np.diff(places_N).any(axis=0)) + 1).tolist(), len(photos)]
    runs = [(_bucket_key(int(places_N[1, first])), first, stop) for first, stop in pairwise([0, *stops])]
    return photos.take(pa.array(order_N)), runs


def _container_runs(photos: pa.Table, size: int) -> Iterator[tuple[str, int, int]]:
    """Yield key, start and stop of parts of about so many rows; they end between files, and between groups if they can.

    Each part reads the groups that it touches anew.
    """
    sources = photos["source"].combine_chunks().dictionary_encode().indices.to_numpy()
    groups = photos["group"].to_numpy()
    names = photos["source"]
    files = [0, *(np.flatnonzero(np.diff(sources)) + 1).tolist(), len(photos)]
    ends_of_groups = np.flatnonzero((np.diff(sources) != 0) | (np.diff(groups) != 0)) + 1
    for first, last in pairwise(files):
        key = f"c{digest_of([names[first].as_py() or ''])[:10]}"
        inside = ends_of_groups[(ends_of_groups > first) & (ends_of_groups < last)].tolist()
        for number, (start, stop) in enumerate(pairwise([first, *_stops([first, *inside, last], size)])):
            yield f"{key}.{number:06d}", start, stop


def _stops(ends: Sequence[int], size: int) -> list[int]:
    """Return where the parts of one file end, given where its groups do."""
    stops = [ends[0]]
    for start, end in pairwise(ends):
        if end - stops[-1] > size and start > stops[-1]:
            stops.append(start)
        num_pieces = min(-(-(end - start) // size), max(PIECES_OF_A_GROUP, -(-(end - start) // MAX_PART)))
        stops += [start + (end - start) * piece // num_pieces for piece in range(1, num_pieces)]
    return [*stops[1:], ends[-1]]


def _parts(photos: pa.Table, runs: Sequence[tuple[str, int, int]]) -> Iterator[Part]:
    columns = [photos[name].combine_chunks() for name in ("split", MADE_OF, "identity")]
    for key, start, stop in runs:
        rows = list(zip(*(column.slice(start, stop - start).to_pylist() for column in columns), strict=True))
        digest = digest_of(repr(row) for row in rows)
        splits = sorted({row[0] for row in rows})
        yield Part(key, start, stop, {split: part_name(split, key, digest) for split in splits})
