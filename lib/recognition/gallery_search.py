"""The search of a gallery, cut into pieces: a group of probes against a shard of the gallery.

A worker holds the embeddings of one group, and reads the shard part by part. What it finds is a file, so a job that was
killed goes on with the pieces that have none. Groups and shards follow from the two tables alone, and the codes of
faces from the order of the gallery: so the matches depend neither on workers nor on the sizes of groups and shards.

Shapes: B probes of a group, K matches, M faces of a part, D embedding dimension.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lib import storage
from lib.errors import JobError
from lib.nearest import BLOCK_ROWS, NearestSoFar, merged
from lib.part_workers import summary
from lib.parts import digest_of
from lib.recognition.embeddings_table import finished_parts, finite_vectors, read_part
from lib.recognition.gallery import Gallery, known_vectors, runs_of
from lib.storage_errors import MissingFileError
from lib.threads import mapped

logger = logging.getLogger(__name__)

SEARCH_FOLDER = "_search"
"""Folder below the output with what an unfinished search has found."""

SHARD_FACES = 1 << 18
"""Gallery faces that a piece of work reads: about 500 MB at 512 dimensions."""
GROUP_ROWS, GROUP_NUMBERS, GROUP_MATCHES = 1 << 15, 1 << 24, 1 << 19
"""Rows of a group of probes, numbers in their embeddings (64 MB), and matches, at most."""
_READERS, _READ_AHEAD = 16, 2

Found = tuple[NDArray[np.int64], NDArray[np.floating]]
"""Codes and distances [B, K] of the nearest faces."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchPlan:
    """All pieces of a search.

    Attributes:
        url: folder of what is found.
        shards: runs of the gallery's parts, first and end.
        groups: runs of the probes' parts.
        num_rows: of each group.
        num_faces: of each shard.
        top: matches of a probe; the gallery has as many faces.
    """

    url: str
    gallery_url: str
    gallery_parts: list[str]
    shards: list[tuple[int, int]]
    num_faces: list[int]
    probes_url: str
    probe_parts: list[str]
    groups: list[tuple[int, int]]
    num_rows: list[int]
    model: dict[str, Any]
    top: int

    def piece_url(self, group: int, shard: int) -> str:
        """Return the file of what a shard holds for a group."""
        return storage.join(self.url, f"found-{group:05d}-{shard:05d}.parquet")

    def group_parts(self, group: int) -> list[str]:
        """Return the URLs of the probes of a group."""
        return [storage.join(self.probes_url, name) for name in self.probe_parts[slice(*self.groups[group])]]

    def known_part(self, part: int, columns: Sequence[str]) -> pa.Table:
        """Return columns of a part of the gallery."""
        with _still_there(self.gallery_url):
            return read_part(storage.join(self.gallery_url, self.gallery_parts[part]), self.model, columns)


def planned_search(
    gallery: Gallery, probes_url: str, output: str, top: int, told_apart_by: Sequence[str]
) -> SearchPlan:
    """Return the pieces of a search of all probes in a finished embeddings table.

    What was found for other tables, another `top` or other texts in `told_apart_by` is not used.
    """
    success, names = finished_parts(probes_url)

    def rows_in(name: str) -> int:
        with storage.open_parquet(storage.join(probes_url, name)) as file:
            return int(file.metadata.num_rows)

    with mapped(rows_in, names, num_threads=_READERS) as counted:
        num_rows = list(counted)
    top = min(top, len(gallery))
    most = min(GROUP_ROWS, GROUP_NUMBERS // gallery.model["embedding_dim"], GROUP_MATCHES // top)
    groups, shards = runs_of(num_rows, most), runs_of(gallery.num_faces, SHARD_FACES)
    made_of = [gallery.run_id, *gallery.file_names, success["run_id"], *names, str(groups), str(shards), str(top)]
    return SearchPlan(
        url=storage.join(output, SEARCH_FOLDER, digest_of([*made_of, *told_apart_by])[:16]),
        gallery_url=gallery.url,
        gallery_parts=gallery.file_names,
        shards=shards,
        num_faces=[sum(gallery.num_faces[slice(*shard)]) for shard in shards],
        probes_url=probes_url,
        probe_parts=names,
        groups=groups,
        num_rows=[sum(num_rows[slice(*group)]) for group in groups],
        model=gallery.model,
        top=top,
    )


def left_to_search(plan: SearchPlan) -> list[dict[str, Any]]:
    """Return the pieces that no file is there for, those of a group together."""
    there = {info.path for info in storage.list_files(plan.url)}
    return [
        {"group": group, "shard": shard}
        for group in range(len(plan.groups))
        for shard in range(len(plan.shards))
        if plan.piece_url(group, shard).rpartition("/")[2] not in there
    ]


class SearchWorker:
    """Searches pieces: a group of probes in a shard of the gallery. It keeps the probes of its last group."""

    def __init__(self, plan: SearchPlan) -> None:
        self._plan = plan
        self._group, self._probes_BD = -1, np.empty((0, plan.model["embedding_dim"]), np.float32)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Search one piece, and return its summary, once its file is written."""
        return summary(self.search, item)

    def search(self, item: dict[str, Any]) -> tuple[int, int]:
        """Search one piece, write what was found, and return the number of comparisons."""
        plan, group, shard = self._plan, item["group"], item["shard"]
        if group != self._group:
            self._group, self._probes_BD = group, _probes_of(plan, group)
        found = NearestSoFar(self._probes_BD, plan.top)
        for vectors_MD, code_M in _blocks(plan, shard):
            found.add(vectors_MD, code_M)
        columns = {"code": found.codes_BK.ravel(), "distance": found.distances_BK.ravel()}
        storage.write_parquet(plan.piece_url(group, shard), pa.table(columns), compression="zstd")
        return plan.num_rows[group] * plan.num_faces[shard], 0


def found_for(plan: SearchPlan, group: int) -> Found:
    """Return what all shards hold for a group, whose pieces are all searched."""
    best: Found | None = None
    for shard in range(len(plan.shards)):
        rows = storage.read_parquet(plan.piece_url(group, shard))
        piece = tuple(rows[name].to_numpy().reshape(-1, plan.top) for name in ("code", "distance"))
        best = piece if best is None else merged(best, piece, plan.top)
    assert best is not None
    return best


def _probes_of(plan: SearchPlan, group: int) -> NDArray[np.float32]:
    """Return the embeddings [B, D] of the probes of a group that have one, in the order of their table."""
    vectors = []
    for url in plan.group_parts(group):
        rows = read_part(url, plan.model, ["embedding"])
        vectors.append(finite_vectors(rows.filter(rows["embedding"].is_valid()), url))
    return np.concatenate(vectors)


def _blocks(plan: SearchPlan, shard: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Yield embeddings and codes of a shard, in blocks that are worth a product."""

    def read(part: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        with _still_there(plan.gallery_url):
            return known_vectors(plan.gallery_url, part, plan.gallery_parts[part], plan.model)

    waiting: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
    with mapped(read, range(*plan.shards[shard]), num_threads=_READ_AHEAD) as parts:
        for each in parts:
            waiting.append(each)
            if sum(len(code_M) for code_M, _ in waiting) >= BLOCK_ROWS:
                yield _joined(waiting)
                waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(
    parts: Sequence[tuple[NDArray[np.int64], NDArray[np.float32]]],
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    return np.concatenate([vectors_MD for _, vectors_MD in parts]), np.concatenate([code_M for code_M, _ in parts])


@contextmanager
def _still_there(gallery_url: str) -> Iterator[None]:
    """Say what it means that a part of the gallery is gone in the middle of a search."""
    try:
        yield
    except MissingFileError as error:
        raise JobError(
            f"{error}: another job made a new version of the gallery {storage.redacted(gallery_url)} meanwhile; run "
            "the same command again"
        ) from error
