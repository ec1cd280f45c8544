"""The embeddings table: one row for each row of a faces table, in Parquet files under `split=<train|val|test>/`.

Shape suffixes: N rows, D embedding dimension.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lib import storage
from lib.errors import UserError
from lib.faces import table as faces_table
from lib.faces.people import People
from lib.faces.table import FINGERPRINT_KEY
from lib.faces.table import SCHEMA as FACES_SCHEMA
from lib.parts import read_success, split_in
from lib.threads import mapped

_READERS = 16

MODEL_KEY = b"conv-facenet.model"
"""Key in the Parquet metadata for the model as JSON: digest, embedding_dim, template, flip (older tables lack it)."""


def schema(embedding_dim: int, fingerprint_json: str, model_json: str) -> pa.Schema:
    """Return the schema: `embedding` is null unless the status is `aligned`, the other columns are as in faces."""
    columns = [FACES_SCHEMA.field(name) for name in ("photo", "identity", "status", "num_faces", "score", "box")]
    columns.append(pa.field("embedding", pa.list_(pa.float32(), embedding_dim)))
    metadata = {FINGERPRINT_KEY: fingerprint_json.encode(), MODEL_KEY: model_json.encode()}
    return pa.schema(columns).with_metadata(metadata)


@dataclass(frozen=True, kw_only=True, eq=False)
class Embeddings:
    """Rows of an embeddings table, in the order of its files."""

    photos: list[str]
    identities: list[str | None]
    statuses: list[str]
    splits: list[str]
    boxes_N4: np.ndarray
    """Pixels of the upright photo; zeros where no face was found."""
    embeddings_ND: np.ndarray
    """float32, zeros where `failed_N`."""
    failed_N: np.ndarray
    """Whether a row has no embedding; its status is the reason."""
    model: dict[str, Any]
    fingerprint: dict[str, Any]

    def __len__(self) -> int:
        return len(self.photos)


def read_embeddings(url: str, file_names: Sequence[str] | None = None) -> Embeddings:
    """Return the rows of a finished embeddings folder, or of these files of it.

    Raises:
        UserError: the folder does not exist, is not finished, is no embeddings table, or has an embedding that is not
            finite.
    """
    _, names = finished_parts(url)
    file_names = names if file_names is None else file_names
    model, fingerprint = about_part(storage.join(url, file_names[0]))
    tables = [read_part(storage.join(url, name), model) for name in file_names]
    splits = [split_in(name) for name, part in zip(file_names, tables, strict=True) for _ in range(len(part))]
    rows = pa.concat_tables(tables)
    return Embeddings(
        photos=rows["photo"].to_pylist(),
        identities=rows["identity"].to_pylist(),
        statuses=rows["status"].to_pylist(),
        splits=splits,
        boxes_N4=filled(rows["box"]),
        embeddings_ND=finite_vectors(rows, url),
        failed_N=rows["embedding"].is_null().to_numpy(),
        model=model,
        fingerprint=fingerprint,
    )


def finished_parts(url: str) -> tuple[dict[str, Any], list[str]]:
    """Return `_SUCCESS` of a finished embeddings folder, and the paths of its files, sorted.

    Raises:
        UserError: the folder does not exist, is not finished, has lost files, or holds none.
    """
    success = read_success(url, what="embeddings", job="jobs/embed.py")
    if not success["parts"]:
        raise UserError(f"{storage.redacted(url)} holds no embeddings: run jobs/embed.py on photos with faces")
    return success, sorted(success["parts"])


def about_part(url: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return model and faces of a file; raises UserError if it is none of an embeddings table."""
    return _about(url, storage.parquet_schema(url))


def read_part(url: str, model: Mapping[str, Any], columns: Sequence[str] | None = None) -> pa.Table:
    """Return the rows of a file, or these columns of them.

    Raises:
        UserError: it is none of an embeddings table, or another model than `model` made it.
    """
    with storage.open_parquet(url) as file:
        made_by, _ = _about(url, file.schema_arrow)
        if (made_by["digest"], made_by["embedding_dim"]) != (model["digest"], model["embedding_dim"]):
            raise UserError(
                f"{storage.redacted(url)} was made by another model than the other parts of its table: run "
                "jobs/embed.py again"
            )
        return file.read(columns=columns)


def finite_vectors(rows: pa.Table, url: str) -> NDArray[np.float32]:
    """Return the column `embedding` as [N, D], zeros where it is null.

    Raises:
        UserError: an embedding is not finite. `url` names the place.
    """
    embeddings_ND = filled(rows["embedding"])
    num_broken = int(np.count_nonzero(~np.isfinite(embeddings_ND).all(axis=1)))
    if num_broken:
        raise UserError(
            f"{num_broken} of {len(rows)} embeddings in {storage.redacted(url)} hold NaN or infinity: make them again "
            "with jobs/embed.py"
        )
    return embeddings_ND


def _about(url: str, found: pa.Schema) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check the columns of a file; return model and faces from its metadata."""
    metadata = found.metadata or {}
    try:
        model, fingerprint = json.loads(metadata[MODEL_KEY]), json.loads(metadata[FINGERPRINT_KEY])
        wanted = schema(model["embedding_dim"], "", "")
        is_ours = isinstance(model["digest"], str) and all(found.field(each.name).type == each.type for each in wanted)
    except (KeyError, TypeError, ValueError):
        is_ours = False
    if not is_ours:
        raise UserError(
            f"{storage.redacted(url)} is no embeddings table, its columns are {', '.join(found.names)}: "
            "name a folder that jobs/embed.py made"
        )
    return model, fingerprint


def filled(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """Return a column of lists of one length W as [N, W] float32, zeros where it is null."""
    width = column.type.list_size
    filled_NW = np.zeros((len(column), width), np.float32)
    valid_N = column.is_valid().to_numpy()
    filled_NW[valid_N] = column.combine_chunks().flatten().to_numpy().reshape(-1, width)
    return filled_NW


def counts_of(url: str, file_names: Sequence[str]) -> dict[str, Any]:
    """Return how many rows, of which statuses, and how many identities these files hold."""
    statuses, people = Counter[str](), People()
    columns = faces_table.columns("identity", "status")
    with mapped(
        lambda name: storage.read_parquet(storage.join(url, name), columns), file_names, num_threads=_READERS
    ) as parts:
        for name, rows in zip(file_names, parts, strict=True):
            statuses.update(rows["status"].to_pylist())
            people.add(split_in(name), rows["identity"])
    return {
        "rows": statuses.total(),
        **{status: statuses[status] for status in faces_table.STATUSES},
        "identities": people.num(),
    }
