"""Faces as files that other projects train on: tars of WebDataset, Parquet of Hugging Face, a folder per person.

JPEG bytes are those of the faces table. The same rows give the same bytes.
"""

import io
import json
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lib import storage
from lib.faces import table
from lib.faces.export_names import file_name, photo_file
from lib.faces.export_plan import FaceShard

NOBODY = -1
"""Label of a face of nobody known, as Hugging Face's datasets writes it."""

DESCRIBED = ("photo", "identity", "score", "num_faces")
"""Columns that describe a face in a sample's .json."""

_WRITERS = 16
_ROW_GROUP = 500

_FEATURES = {
    "image": {"_type": "Image"},
    "label": {"dtype": "int64", "_type": "Value"},
    "identity": {"dtype": "string", "_type": "Value"},
    "photo": {"dtype": "string", "_type": "Value"},
}
"""What Hugging Face's datasets reads in the metadata: without it, an image would be a struct."""


def labels_of(identities: pa.ChunkedArray, known: pa.Array) -> pa.ChunkedArray:
    """Return the label of each identity, int64: its place among the `known` ones; -1 for nobody."""
    return pc.fill_null(pc.index_in(identities, known), NOBODY).cast(pa.int64())


def tar_bytes(faces: pa.Table, known: pa.Array, shard: FaceShard) -> bytes:
    """Return the faces of a shard as a tar, as img2dataset writes it: `KEY.jpg` and `KEY.json`.

    A key is the number of the shard and, in four digits, the place in it. The .json has the columns of `DESCRIBED`,
    `label`, `split` and `key`.
    """
    sink = io.BytesIO()
    labels = labels_of(faces["identity"], known).to_pylist()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        rows = zip(faces.select([*DESCRIBED, "crop"]).to_pylist(), labels, strict=True)
        for place, (row, label) in enumerate(rows):
            key = f"{shard.number:06d}{place:04d}"
            crop = row.pop("crop")
            about = {**row, "label": label, "split": shard.split, "key": key}
            text = json.dumps(about, ensure_ascii=False).encode("utf-8", "surrogateescape")
            for suffix, data in (("jpg", crop), ("json", text)):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def parquet_table(faces: pa.Table, known: pa.Array) -> pa.Table:
    """Return the faces with the columns that Hugging Face's datasets reads: image (bytes and path), label and names."""
    images = pa.StructArray.from_arrays(
        [faces["crop"].combine_chunks(), faces["photo"].combine_chunks()], names=["bytes", "path"]
    )
    columns = {
        "image": images,
        "label": labels_of(faces["identity"], known),
        "identity": faces["identity"],
        "photo": faces["photo"],
    }
    features = json.dumps({"info": {"features": _FEATURES}}).encode()
    return pa.table(columns).replace_schema_metadata({b"huggingface": features})


def write_parquet(url: str, faces: pa.Table, known: pa.Array) -> None:
    """Write the faces as one Parquet file; JPEGs do not get smaller by compression."""
    storage.write_parquet(url, parquet_table(faces, known), row_group_size=_ROW_GROUP, **table.WRITING)


def write_folder(url: str, faces: pa.Table, *, has_folders: bool) -> None:
    """Write each face as `PERSON/PHOTO.jpg` below a folder."""
    rows: Sequence[dict[str, Any]] = faces.select(["photo", "identity", "crop"]).to_pylist()

    def write(row: dict[str, Any]) -> None:
        name = photo_file(row["photo"], row["identity"], has_folders=has_folders)
        storage.write_bytes(storage.join(url, file_name(row["identity"]), name), row["crop"])

    with ThreadPoolExecutor(_WRITERS) as pool:
        for _ in pool.map(write, rows):
            pass
