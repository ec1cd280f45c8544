"""The export of a faces table: shard by shard over Ray Data, resumable at any moment.

`_export.json` is written first, then the identities with their labels, then the shards, each under a temporary name or
by one put, and `_EXPORTED` last. A shard that is there is done. The shards of a folder are many files, so a marker says
that all of them are there.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lib import cluster, storage
from lib.errors import UserError
from lib.faces import table
from lib.faces.export_formats import DESCRIBED, tar_bytes, write_folder, write_parquet
from lib.faces.export_names import file_name
from lib.faces.export_plan import ExportPlan, FaceShard, FacesOut, Format, Piece, columns_of, faces_of, plan_export
from lib.faces.face_filter import FaceFilter
from lib.part_workers import run_parts, summary
from lib.parts import earlier_plan

logger = logging.getLogger(__name__)

PLAN_NAME, DONE_NAME = "_export.json", "_EXPORTED"
"""What is exported, written first, and that it is whole, written last. Other names than those of tables with versions,
for which every job would take the folder."""

IDENTITIES_NAME = "_identities.jsonl"
"""Label, name and folder of each person, one a line. Not Parquet: readers of photos would take it for photos."""

REPLACING = "replacing"
"""In the plan while an earlier export is removed."""

MARKERS_FOLDER = "_written"
"""Where the markers of a folder's shards lie."""


def export_faces(faces_url: str, output: str, to: Format, out: FacesOut, *, dry_run: bool = False) -> dict[str, Any]:
    """Write the faces of a table in another format, or what an earlier call left to do, and return the counts.

    Raises:
        UserError: no such table, no face to export, or the folder holds something else.
        JobError: a failure of the storage.
    """
    started = time.monotonic()
    success = table.read_success(faces_url)
    plan = plan_export(faces_url, success, out, with_nobody=to != "folder")
    content = _content(success, to, out)
    result: dict[str, Any] = {"job": "export", "to": to, "output": output, "faces": plan.num_faces}
    result |= {"identities": len(plan.identities), "shards": len(plan.shards), "left_out": plan.left_out}
    earlier = _settled(output, content, overwrite=out.overwrite)
    if dry_run:
        return {**result, "dry_run": True}
    storage.check_writable(output)
    if earlier and (earlier.get(REPLACING) or _differs(content, earlier)):
        _clear(output, content)
        earlier = None
    names = {shard: shard_name(shard, plan, to, out) for shard in plan.shards}
    done = _done(output, to) if earlier else set()
    todo = [(shard, name) for shard, name in names.items() if name not in done]
    if not todo and storage.exists(storage.join(output, DONE_NAME)):
        logger.info("%s is complete: nothing to do", storage.redacted(output))
        return {**result, "faces_written": 0}
    storage.write_json(storage.join(output, PLAN_NAME), content)
    storage.write_bytes(storage.join(output, IDENTITIES_NAME), identities_lines(plan.identities))
    num_written = _written(faces_url, output, to, out, plan, todo)
    if earlier:  # killed before, it may have left files that are not whole
        storage.remove_unfinished(output)
    storage.write_json(storage.join(output, DONE_NAME), {**content, **result, "output": storage.redacted(output)})
    return {**result, "faces_written": num_written, "seconds": round(time.monotonic() - started, 1)}


def _settled(output: str, content: dict[str, Any], *, overwrite: bool) -> dict[str, Any] | None:
    """Return the plan of the export that is there, None where there is none, once ours may be written.

    Raises:
        UserError: it has other settings, unless it may be replaced, or the folder holds what no export made.
    """
    earlier, problem = earlier_plan(output, PLAN_NAME, content)
    shown = storage.redacted(output)
    if earlier is not None and earlier.get("job") != content["job"]:
        raise UserError(f"{shown} holds what another job made: choose another folder by --output")
    if problem and earlier is None:
        raise UserError(f"{shown} {problem}: choose another folder by --output")
    if problem and not overwrite:
        raise UserError(f"{shown} {problem}: choose another folder by --output, or replace it with --overwrite")
    return None if earlier is None else dict(earlier)


def _differs(content: dict[str, Any], earlier: dict[str, Any]) -> bool:
    return any(earlier.get(name) != value for name, value in content.items())


def _clear(output: str, content: dict[str, Any]) -> None:
    """Remove an earlier export. The plan says so meanwhile: who is killed here goes on removing."""
    storage.write_json(storage.join(output, PLAN_NAME), {**content, REPLACING: True})
    files, folders = storage.children(output)
    for name in files:
        if name != PLAN_NAME:
            storage.remove(storage.join(output, name))
    for name in folders:
        storage.remove_tree(storage.join(output, name))


def _done(output: str, to: Format) -> set[str]:
    """Return the names, as `shard_name` gives them, of the shards that are written."""
    if to != "folder":
        return {info.path for info in storage.list_files(output)}
    return {f"{MARKERS_FOLDER}/{info.path}" for info in storage.list_files(storage.join(output, MARKERS_FOLDER))}


def _content(success: dict[str, Any], to: Format, out: FacesOut) -> dict[str, Any]:
    """Return what decides the files."""
    return {
        "job": "export",
        "to": to,
        "faces_run": success["run_id"],
        "fingerprint": success["fingerprint"],
        "of_splits": list(dict.fromkeys(out.splits)),
        "faces_within": str(out.taken),
        "shard_faces": out.shard_faces,
    }


def shard_name(shard: FaceShard, plan: ExportPlan, to: Format, out: FacesOut) -> str:
    """Return the file of a shard below the output: of a folder, the marker that says that it is written."""
    folder = f"{shard.split}/" if len(set(out.splits)) > 1 else ""
    if to == "webdataset":
        return f"{folder}{shard.number:06d}.tar"
    if to == "parquet":
        num = sum(each.split == shard.split for each in plan.shards)
        return f"{shard.split}-{shard.number:05d}-of-{num:05d}.parquet"
    return f"{MARKERS_FOLDER}/{folder}{shard.number:06d}"


def identities_lines(identities: Sequence[str]) -> bytes:
    """Return the content of `IDENTITIES_NAME`: the label of a person is its place."""
    lines = (
        json.dumps({"label": label, "identity": identity, "folder": file_name(identity)})
        for label, identity in enumerate(identities)
    )
    return "".join(f"{line}\n" for line in lines).encode()


def _written(
    faces_url: str,
    output: str,
    to: Format,
    out: FacesOut,
    plan: ExportPlan,
    todo: Sequence[tuple[FaceShard, str]],
) -> int:
    """Write shards on the cluster, and return how many faces they have."""
    num_todo = sum(shard.num_faces for shard, _ in todo)
    if not todo:
        return 0
    if num_todo < plan.num_faces:
        logger.info("resuming: %d of %d faces are written", plan.num_faces - num_todo, plan.num_faces)
    how = ShardSettings(
        faces_url=faces_url,
        output=output,
        to=to,
        taken=out.taken,
        has_folders=plan.has_folders,
        has_splits=len(set(out.splits)) > 1,
    )
    items = [
        {"split": shard.split, "number": shard.number, "name": name, "pieces": json.dumps(shard.pieces)}
        for shard, name in todo
    ]
    with cluster.connected():
        processed = run_parts(
            items, ShardWorker, (how,), unit="face", num_done=plan.num_faces - num_todo, num_all=plan.num_faces
        )
    return processed.num


@dataclass(frozen=True, kw_only=True)
class ShardSettings:
    """What every shard is written by.

    Attributes:
        has_folders: see `ExportPlan`.
        has_splits: whether several splits are exported, each into a folder of its own.
    """

    faces_url: str
    output: str
    to: Format
    taken: FaceFilter
    has_folders: bool
    has_splits: bool


class ShardWorker:
    """Ray Data's worker: writes a shard."""

    def __init__(self, how: ShardSettings) -> None:
        self._how = how
        lines = storage.read_bytes(storage.join(how.output, IDENTITIES_NAME)).splitlines()
        self._known = pa.array([json.loads(line)["identity"] for line in lines], pa.string())

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Write one shard, and return its summary."""
        return summary(self._process, item)

    def _process(self, item: dict[str, Any]) -> tuple[int, int]:
        pieces = tuple(Piece(*piece) for piece in json.loads(item["pieces"]))
        shard = FaceShard(split=item["split"], number=item["number"], pieces=pieces)
        faces = self._faces(shard)
        url = storage.join(self._how.output, item["name"])
        if self._how.to == "webdataset":
            storage.write_bytes(url, tar_bytes(faces, self._known, shard))
        elif self._how.to == "parquet":
            write_parquet(url, faces, self._known)
        else:
            folder = storage.join(self._how.output, shard.split) if self._how.has_splits else self._how.output
            write_folder(folder, faces, has_folders=self._how.has_folders)
            storage.write_bytes(url, str(len(faces)).encode())
        return len(faces), 0

    def _faces(self, shard: FaceShard) -> pa.Table:
        """Return the faces of a shard, one part of the table at a time in memory beside them."""
        wanted = columns_of(self._how.taken, "crop", *DESCRIBED)
        found = []
        for piece in shard.pieces:
            url = storage.join(self._how.faces_url, piece.part)
            with storage.open_parquet(url, table.columns("photo", "identity", "status", "crop")) as file:
                rows = file.read(columns=wanted)
            faces = faces_of(rows, self._how.taken, with_nobody=self._how.to != "folder")
            found.append(faces.select(["crop", *DESCRIBED]).slice(piece.first, piece.num))
        faces = pa.concat_tables(found)
        if len(faces) != shard.num_faces:
            raise UserError(
                f"{storage.redacted(self._how.faces_url)} changed since the export began: run the same command again"
            )
        return faces
