"""Tables of faces and of embeddings: makes a new version without some rows, and removes older versions with them.

Files are never changed. Parts with such rows are written again under new names, then plan and card, then `_SUCCESS`.
The new names depend on the old ones and the run_id of the new version, so a killed job finds its own files.
"""

import hashlib
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib import parts, storage
from lib.errors import JobError
from lib.faces import card
from lib.forgetting.leftovers import listing_in
from lib.forgetting.targets import FACE_OF, IDENTITY, PHOTO, Targets, named_columns
from lib.recognition.embeddings_table import counts_of
from lib.threads import mapped

_READERS = 16
_WRITERS = 4

TRAINED_ON = ("train", "val")
"""Splits that a model depends on: val chooses its epoch and threshold."""


@dataclass
class TableHits:
    """The rows of a table that name the targets.

    Attributes:
        rows: their number, by the part's file.
        runs: their number by split, by the run_id of a version.
    """

    url: str
    rows: dict[str, int] = field(default_factory=dict)
    runs: dict[str, dict[str, int]] = field(default_factory=dict)


def named_in(url: str, targets: Targets) -> set[tuple[str, str | None]]:
    """Return photo and identity of the rows that name the targets, in all files of all versions of a table.

    If a table has all faces of a photo, the name is that of the photo.
    """
    found = parts.found_at(url)

    def of_part(name: str) -> set[tuple[str, str | None]]:
        with storage.open_parquet(storage.join(url, name)) as file:
            rows = file.read(columns=[PHOTO, IDENTITY])
        rows = rows.filter(targets.rows(rows))
        photos = [_photo_of(photo, found) for photo in rows[PHOTO].to_pylist()]
        return set(zip(photos, rows[IDENTITY].to_pylist(), strict=True))

    with mapped(of_part, _part_names(found), num_threads=_READERS) as parts_of_targets:
        return {each for named in parts_of_targets for each in named}


def _photo_of(row: str, found: parts.Found) -> str:
    fingerprint = (found.plan or found.success or {}).get("fingerprint", {})
    return FACE_OF.sub("", row) if fingerprint.get("faces_policy") == "all" else row


def look_for(url: str, targets: Targets) -> TableHits:
    """Return the rows of a table that name the targets; reads only columns with names."""
    found = parts.found_at(url)

    def in_part(name: str) -> int:
        with storage.open_parquet(storage.join(url, name)) as file:
            rows = file.read(columns=named_columns(file.schema_arrow))
        return int(targets.rows(rows).true_count)

    # The list of photos of an unfinished version names them too.
    planned = storage.list_files(storage.join(url, parts.MANIFEST_FOLDER), suffix=".parquet")
    names = [f"{parts.MANIFEST_FOLDER}/{info.path}" for info in planned]
    names = [*_part_names(found), *(name for name in names if listing_in(name) is None)]
    with mapped(in_part, names, num_threads=_READERS) as counted:
        numbers = dict(zip(names, counted, strict=True))
    hits = TableHits(url, {name: num for name, num in numbers.items() if num})
    for success in (*([found.success] if found.success else []), *parts.kept_successes(url)):
        by_split: Counter[str] = Counter()
        for name in success["parts"].keys() & hits.rows.keys():
            by_split[parts.split_in(name)] += hits.rows[name]
        if by_split:
            hits.runs[success["run_id"]] = dict(by_split)
    return hits


def take_out(hits: TableHits, targets: Targets, op: str) -> dict[str, dict[str, Any]]:
    """Write the parts that name the targets again without them; return the new name of each, and digests of both.

    Nothing is removed, and readers do not see the new files yet.

    Raises:
        UserError, JobError: a part is damaged or cannot be written.
    """
    found = parts.found_at(hits.url)
    names = [name for name in hits.rows if found.success and name in found.success["parts"]]

    def rewritten(name: str) -> dict[str, Any]:
        data = storage.read_bytes(storage.join(hits.url, name))
        with pq.ParquetFile(io.BytesIO(data)) as file:
            rows, codec = file.read(), file.metadata.row_group(0).column(0).compression
        named = targets.rows(rows)
        kept = rows.filter(pc.invert(named))
        photos = {_photo_of(photo, found) for photo in rows[PHOTO].filter(named).to_pylist()}
        about = {"rows": named.true_count, "photos": len(photos), "sha256": hashlib.sha256(data).hexdigest()}
        if not len(kept):
            return {**about, "new_name": None}
        sink = io.BytesIO()
        pq.write_table(kept, sink, compression=codec.replace("UNCOMPRESSED", "none"))
        new_name = _new_name(name, op)
        storage.write_bytes(storage.join(hits.url, new_name), sink.getvalue())
        return {**about, "new_name": new_name, "new_sha256": hashlib.sha256(sink.getvalue()).hexdigest()}

    with mapped(rewritten, names, num_threads=_WRITERS) as written:
        return dict(zip(names, written, strict=True))


def swap(url: str, rewritten: Mapping[str, Mapping[str, Any]], unwanted: Sequence[str], op: str) -> None:
    """Let readers see the version without the targets; remove other versions with them, and the files `unwanted`.

    After a kill it continues. Older versions without any of the targets stay. A table without a finished version only
    loses those files. A table with nobody else in it is removed.

    Raises:
        JobError: new files are gone, or another job began a version meanwhile.
    """
    found = parts.found_at(url)
    success = found.success
    if success is not None and not any(_successor(name, rewritten) for name in success["parts"]):
        # _SUCCESS first: readers see a complete table or none.
        storage.remove(storage.join(url, parts.SUCCESS_NAME))
        storage.remove_tree(url)
        return
    if success is not None:
        run_id = parts.digest_of([op, url])[:12]
        if any(name in success["parts"] for name in rewritten):
            success = _new_version(found, rewritten, run_id)
        # Jobs that read a version with a target would miss some of its files, so that version goes as a whole.
        parts.remove_unused(url, success, found.present, keep_versions=None, unwanted=unwanted)
    if any(name.startswith(parts.MANIFEST_FOLDER) for name in unwanted):
        storage.remove(storage.join(url, parts.MANIFEST_FOLDER, "listed.json"))  # without it, the list does not count
        storage.remove_tree(storage.join(url, parts.MANIFEST_FOLDER))
    for name in unwanted:
        if success is None or name not in success["parts"]:
            storage.remove(storage.join(url, name))
    storage.remove_unfinished(url)


def _new_version(found: parts.Found, rewritten: Mapping[str, Mapping[str, Any]], run_id: str) -> dict[str, Any]:
    assert found.success is not None
    names = sorted(filter(None, (_successor(name, rewritten) for name in found.success["parts"])))
    if gone := [name for name in names if name not in found.present]:
        raise JobError(
            f"{len(gone)} parts of {storage.redacted(found.url)} are gone, such as {gone[0]}: run the job "
            "that made them, then this command again"
        )
    about = {"run_id": run_id, "version": parts.next_version(found)}
    if not found.is_old and "content" in found.success:
        about["content"] = parts.digest_of(names)
    begun = {**(found.plan or {"fingerprint": found.success["fingerprint"]}), **about}
    storage.write_json(storage.join(found.url, parts.PLAN_NAME), begun)
    num_photos = sum(rewritten[name]["photos"] for name in rewritten if name in found.success["parts"])
    is_faces = begun.get("job") != "embed"
    counts = (
        card.remake(found.url, names, begun, found.success["counts"], num_forgotten=num_photos)
        if is_faces
        else counts_of(found.url, names)
    )
    parts.check_ours(found.url, begun)
    success = {**found.success, **about, "counts": counts, "parts": {name: found.present[name] for name in names}}
    storage.write_json(storage.join(found.url, parts.SUCCESS_NAME), success)
    return success


def _successor(name: str, rewritten: Mapping[str, Mapping[str, Any]]) -> str | None:
    return rewritten[name]["new_name"] if name in rewritten else name


def _part_names(found: parts.Found) -> list[str]:
    return sorted(name for name in found.present if name.startswith(parts.PART_PREFIX))


def _new_name(name: str, op: str) -> str:
    """Return the name of a part without the targets. A table without versions has other names than one with."""
    digest = parts.digest_of([name, op])
    key = parts.part_key(name)
    if key is not None:
        return parts.part_name(parts.split_in(name), key, digest)
    stem = re.sub(r"\.[0-9a-f]{8}$", "", name.removesuffix(".parquet"))
    return f"{stem}.{digest[:8]}.parquet"
