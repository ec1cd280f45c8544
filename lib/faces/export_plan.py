"""Which faces of a table leave it, and the shards that they go into: the same for the same version and flags."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from lib import storage
from lib.errors import UserError
from lib.faces import table
from lib.faces.face_filter import FaceFilter, face_filter
from lib.parts import split_in
from lib.threads import mapped

Format = Literal["webdataset", "folder", "parquet"]

MAX_SHARD_FACES = 10_000
"""The key of a sample has four digits for its place in the shard."""

_READERS = 16


@dataclass(frozen=True, kw_only=True)
class FacesOut:
    """With --to webdataset, folder or parquet."""

    splits: tuple[str, ...] = table.SPLITS
    """Splits to export, out of train, val and test. Several have a folder each."""
    min_quality: float = 0.0
    """Export faces of at least this quality, 0 to 1."""
    where: str = ""
    """Export faces within ranges of the columns eye_distance, sharpness, brightness, contrast, yaw, pitch, roll and
    quality, such as yaw=-30:30,sharpness=50: with one end or both."""
    shard_faces: int = 2_000
    """Largest number of faces in a tar or Parquet file."""
    overwrite: bool = False
    """Replace an export of another table or of other settings."""

    def __post_init__(self) -> None:
        unknown = [split for split in self.splits if split not in table.SPLITS]
        if unknown or not self.splits:
            raise UserError(f"--splits is {' '.join(self.splits) or 'empty'}: allowed are {', '.join(table.SPLITS)}")
        if not 1 <= self.shard_faces <= MAX_SHARD_FACES:
            raise UserError(f"--shard-faces is {self.shard_faces}: allowed are 1 to {MAX_SHARD_FACES}")
        _ = self.taken

    @property
    def taken(self) -> FaceFilter:
        """Which faces leave."""
        return face_filter(self.min_quality, self.where)


class Piece(NamedTuple):
    """Consecutive faces of a part: those `first` to `first + num` of the faces that `faces_of` returns."""

    part: str
    first: int
    num: int


@dataclass(frozen=True, kw_only=True)
class FaceShard:
    """Faces that are written in one go.

    Attributes:
        number: in its split, from 0 on.
    """

    split: str
    number: int
    pieces: tuple[Piece, ...]

    @property
    def num_faces(self) -> int:
        """How many they are."""
        return sum(piece.num for piece in self.pieces)


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """What is exported.

    Attributes:
        identities: of all faces that leave, sorted; the place of one is its label.
        has_folders: whether photos of the table lie in folders.
        left_out: rows that do not leave, by reason.
    """

    shards: tuple[FaceShard, ...]
    identities: tuple[str, ...]
    has_folders: bool
    left_out: dict[str, int]

    @property
    def num_faces(self) -> int:
        """How many faces leave."""
        return sum(shard.num_faces for shard in self.shards)


def columns_of(taken: FaceFilter, *more: str) -> list[str]:
    """Return the columns that `faces_of` needs, and others."""
    return list(dict.fromkeys(("status", "identity", *more, *taken.columns)))


def faces_of(rows: pa.Table, taken: FaceFilter, *, with_nobody: bool) -> pa.Table:
    """Return the rows that leave: aligned faces within the ranges; those of nobody known only `with_nobody`."""
    kept = pc.and_(pc.equal(rows["status"], table.ALIGNED), taken.keeps(rows))
    return rows.filter(kept if with_nobody else pc.and_(kept, pc.is_valid(rows["identity"])))


def plan_export(faces_url: str, success: dict[str, Any], out: FacesOut, *, with_nobody: bool) -> ExportPlan:
    """Return the plan for a version of a faces table, from its names, statuses and measures, a few parts at a time.

    Raises:
        UserError: no face leaves, or the table lacks a column of quality.
    """
    names = table.part_names(success, out.splits)
    if not names:
        raise UserError(f"{faces_url} has no photo in split {', '.join(out.splits)}: name others by --splits")
    counts: list[tuple[str, int]] = []
    identities: set[str] = set()
    left_out = Counter[str]()
    has_folders = False
    # A few at a time: together they name everybody many times.
    with mapped(
        lambda name: _counted(storage.join(faces_url, name), out.taken, with_nobody), names, num_threads=_READERS
    ) as counted:
        for name, part in zip(names, counted, strict=True):
            counts.append((name, part.num_faces))
            identities.update(part.identities)
            has_folders = has_folders or part.has_folders
            left_out["no_face"] += part.num_rows - part.num_aligned
            left_out["not_within"] += part.num_aligned - part.num_within
            left_out["no_identity"] += part.num_within - part.num_faces
    shards = tuple(shard for split in dict.fromkeys(out.splits) for shard in _shards(split, counts, out.shard_faces))
    if not shards:
        raise UserError(
            f"{faces_url} has no face to export: widen --where, lower --min-quality, or name other --splits"
        )
    return ExportPlan(
        shards=shards,
        identities=tuple(sorted(identities)),
        has_folders=has_folders,
        left_out={reason: num for reason, num in left_out.items() if num},
    )


class _Counted(NamedTuple):
    """What a part holds: of its rows those with a face, of these those within the ranges, of these those that leave."""

    num_rows: int
    num_aligned: int
    num_within: int
    num_faces: int
    identities: list[str]
    has_folders: bool


def _counted(url: str, taken: FaceFilter, with_nobody: bool) -> _Counted:
    with storage.open_parquet(url, table.columns("photo", "identity", "status")) as file:
        taken.check(file.schema_arrow, storage.redacted(url))
        rows = file.read(columns=columns_of(taken, "photo"))
    faces = faces_of(rows, taken, with_nobody=with_nobody)
    return _Counted(
        num_rows=len(rows),
        num_aligned=int(pc.sum(pc.equal(rows["status"], table.ALIGNED)).as_py() or 0),
        num_within=len(faces_of(rows, taken, with_nobody=True)),
        num_faces=len(faces),
        identities=pc.unique(faces["identity"].drop_null()).to_pylist(),
        has_folders=bool(pc.any(pc.match_substring(faces["photo"], "/")).as_py()),
    )


def _shards(split: str, counts: Sequence[tuple[str, int]], size: int) -> list[FaceShard]:
    """Cut the faces of a split, part after part, into shards of `size`; the last one has the rest."""
    shards: list[FaceShard] = []
    pieces: list[Piece] = []
    room = size
    for part, num in counts:
        first = 0
        while split_in(part) == split and first < num:
            taken = min(room, num - first)
            pieces.append(Piece(part, first, taken))
            first, room = first + taken, room - taken
            if not room:
                shards.append(FaceShard(split=split, number=len(shards), pieces=tuple(pieces)))
                pieces, room = [], size
    if pieces:
        shards.append(FaceShard(split=split, number=len(shards), pieces=tuple(pieces)))
    return shards
