"""The gallery: the known people of an embeddings table, and the codes of their faces.

A face counts if it has an embedding and an identity. Its code is the number of its part among the parts in the order of
their names, times 2^32, plus its row there. So the order of codes is that of the gallery, whoever reads which parts.

Shapes: G faces of the gallery, M faces of one part, D embedding dimension.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lib import storage
from lib.errors import UserError
from lib.faces import table as faces_table
from lib.recognition.embedder import Embedder
from lib.recognition.embeddings_table import about_part, finished_parts, finite_vectors, read_part
from lib.threads import mapped

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

_READERS = 16
_ROW_BITS = 32
_MANY_HASHES = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Gallery:
    """The known faces of an embeddings table.

    Attributes:
        file_names: its parts, sorted.
        num_faces: known faces of each part.
        people: a hash of each identity, in rising order: 8 bytes a person.
        run_id: of the version of the table.
    """

    url: str
    file_names: list[str]
    num_faces: list[int]
    people: Hashes
    model: dict[str, Any]
    run_id: str

    def __len__(self) -> int:
        return sum(self.num_faces)


def known_people(url: str, embedder: Embedder) -> Gallery:
    """Return the gallery in an embeddings table. Names and statuses are read, no embedding.

    Raises:
        UserError: the table does not exist or has lost parts, another model made it or one of its parts, or none of its
            faces has an identity.
    """
    success, names = finished_parts(url)
    model, _ = about_part(storage.join(url, names[0]))
    if bool(model.get("flip")) != embedder.flip:
        one, other = ("without", "with") if embedder.flip else ("with", "without")
        raise UserError(
            f"the gallery {storage.redacted(url)} was embedded {one} mirror images, and {embedder.url} embeds {other} "
            f"them: embed it again with jobs/embed.py, or give --{'no-' if embedder.flip else ''}flip"
        )
    if model["digest"] != embedder.digest:
        raise UserError(
            f"the gallery {storage.redacted(url)} was made by another model than {embedder.url}: embed it again with "
            "jobs/embed.py --model, or name the model that made it"
        )
    num_rows, num_faces, hashes = 0, [], [np.empty(0, np.uint64)]

    def people_in(name: str) -> tuple[int, int, Hashes]:
        rows = read_part(storage.join(url, name), model, ["identity", "status"])
        known = rows["identity"].filter(_is_known(rows)).unique()
        return len(rows), pc.sum(_is_known(rows)).as_py() or 0, hashes_of(known)

    with mapped(people_in, names, num_threads=_READERS) as counted:
        for rows_in_part, faces_in_part, people in counted:
            num_rows += rows_in_part
            num_faces.append(faces_in_part)
            hashes.append(people)
            if sum(map(len, hashes[1:])) > max(_MANY_HASHES, len(hashes[0])):
                hashes = [np.unique(np.concatenate(hashes))]
    if not any(num_faces):
        raise UserError(
            f"the gallery {storage.redacted(url)} is empty: none of its {num_rows} rows has both a face and an "
            "identity; embed photos in a folder per person, or with identities.txt beside them"
        )
    return Gallery(
        url=url,
        file_names=names,
        num_faces=num_faces,
        people=np.unique(np.concatenate(hashes)),
        model=model,
        run_id=success["run_id"],
    )


def hashes_of(identities: pa.Array | pa.ChunkedArray) -> Hashes:
    """Return a hash of each identity, the same on every machine; null has one of its own."""
    hashes: Hashes = pd.util.hash_array(identities.to_numpy(zero_copy_only=False), categorize=False)
    return hashes


def known_vectors(url: str, part: int, name: str, model: dict[str, Any]) -> tuple[Ints, NDArray[np.float32]]:
    """Return the codes [M] and embeddings [M, D] of the known faces of one part; raises as `read_part`."""
    rows = read_part(storage.join(url, name), model, ["identity", "status", "embedding"])
    row_M = np.flatnonzero(_is_known(rows).to_numpy())
    known, part_url = rows.take(row_M), storage.join(url, name)
    if num_without := known["embedding"].null_count:
        raise UserError(
            f"{num_without} aligned faces of {storage.redacted(part_url)} have no embedding: make them again with "
            "jobs/embed.py"
        )
    return (part << _ROW_BITS) + row_M, finite_vectors(known, part_url)


def runs_of(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Return runs, first and end, of parts of these sizes: each of `most` at most, or of one part."""
    runs, first, size = [], 0, 0
    for part, of_part in enumerate(sizes):
        if part > first and size + of_part > most:
            runs.append((first, part))
            first, size = part, 0
        size += of_part
    return [*runs, (first, len(sizes))]


def names_of(codes: Ints, read: Callable[[int], pa.Table], columns: Sequence[str]) -> dict[str, NDArray[np.object_]]:
    """Return these columns of the faces with these codes, in the shape of `codes`. `read` returns the rows of a part.

    The parts that hold them are read, one after the other.
    """
    distinct, place = np.unique(codes, return_inverse=True)
    part_G, row_G = distinct >> _ROW_BITS, distinct & ((1 << _ROW_BITS) - 1)
    found = {name: np.empty(len(distinct), object) for name in columns}
    parts, first_G = np.unique(part_G, return_index=True)
    runs = list(pairwise([*first_G.tolist(), len(distinct)]))
    with mapped(read, parts.tolist(), num_threads=_READERS) as tables:
        for rows, run in zip(tables, runs, strict=True):
            some = slice(*run)
            for name in columns:
                found[name][some] = rows[name].take(row_G[some]).to_numpy(zero_copy_only=False)
    return {name: values[place].reshape(codes.shape) for name, values in found.items()}


def parts_of(codes: Ints) -> list[int]:
    """Return the parts that hold the faces with these codes, in rising order."""
    return [int(part) for part in np.unique(codes >> _ROW_BITS)]


def _is_known(rows: pa.Table) -> pa.ChunkedArray:
    """Return whether a row has an embedding and an identity."""
    return pc.and_(pc.equal(rows["status"], faces_table.ALIGNED), pc.is_valid(rows["identity"]))
