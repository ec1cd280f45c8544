"""The worker of the embed job: turns a part of faces, or of photos, into a part of the embeddings table."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from lib import device as devices
from lib import storage
from lib.cluster import Precision
from lib.device_errors import is_lost
from lib.errors import UserError
from lib.faces import table
from lib.faces.aligned import AlignedCrops
from lib.faces.extraction import ExtractionSettings, settings_from_fingerprint
from lib.faces.sources.source import Source as PhotoFiles
from lib.part_workers import end_worker, summary
from lib.recognition import embeddings_table
from lib.recognition.blocks import CPU_BLOCK, GPU_BLOCK, Blocks
from lib.recognition.embedder import COMPILING_PAYS, TorchEmbedder, load_embedder
from lib.recognition.onnx_model import OnnxInput
from lib.recognition.photo_faces import PhotoFaces


@dataclass(frozen=True, kw_only=True)
class Computing:
    """How a worker computes.

    Attributes:
        use_gpu: on a GPU, else on a CPU.
        precision: arithmetic of a model folder; an ONNX file has its own.
        num_threads: threads that decode crops.
        num_faces: faces of the whole job for each worker, done or not: what it is compiled for does not depend on where
            a restart began.
    """

    use_gpu: bool = False
    precision: Precision = "auto"
    num_threads: int = 1
    num_faces: int = 0


class EmbedWorker:
    """Ray Data's worker: turns a part of a faces table, or of a manifest, into a part of the embeddings table."""

    def __init__(
        self,
        model_source: tuple[str, OnnxInput | None, bool],
        output: str,
        photos: tuple[PhotoFiles, ExtractionSettings, AlignedCrops | None] | None,
        fingerprint: dict[str, Any],
        model: dict[str, Any],
        how: "Computing",
    ) -> None:
        torch.set_num_threads(1)  # a worker has one CPU, and the number of threads changes the last digits
        device = devices.worker_device(use_gpu=how.use_gpu)
        devices.prepare(device, by_trial=False)
        url, onnx, flip = model_source
        embedder = load_embedder(url, onnx, device=str(device), precision=how.precision, flip=flip)
        if embedder.digest != model["digest"]:
            raise UserError(
                f"the model {storage.redacted(embedder.url)} changed since this job began: run it again when the "
                "training of that model has ended"
            )
        size = GPU_BLOCK if how.use_gpu else CPU_BLOCK
        if isinstance(embedder, TorchEmbedder):
            embedder.compile("auto", size=size, pays=how.num_faces >= COMPILING_PAYS)
        self._blocks = Blocks(embedder, size=size, is_padded=how.use_gpu, num_threads=how.num_threads)
        self._output = output
        self._schema = embeddings_table.schema(model["embedding_dim"], json.dumps(fingerprint), json.dumps(model))
        self._made = settings_from_fingerprint(fingerprint).alignment
        self._photo_faces = PhotoFaces(*photos) if photos is not None else None

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Process one item of a source, and return its summary, once its files are written."""
        try:
            return summary(self._process, item)
        except Exception as error:
            if is_lost(error):
                end_worker(f"its GPU failed ({str(error).strip().splitlines()[0][:200]})")
            raise

    def _process(self, item: dict[str, Any]) -> tuple[int, int]:
        num_rows = 0
        for name, rows, num_photos in self._rows(item):
            has_crop = pc.fill_null(pc.greater(pc.binary_length(rows["crop"]), 0), False)
            faces = rows.filter(has_crop).select(["crop", "box", "landmarks"]).to_pylist()
            part = _with_embeddings(rows, has_crop.to_numpy(), self._blocks(faces, self._made), self._schema)
            storage.write_parquet(storage.join(self._output, name), part, compression="zstd")
            num_rows += num_photos
        return num_rows, 0

    def _rows(self, item: dict[str, Any]) -> Iterator[tuple[str, pa.Table, int]]:
        """Yield each file, its rows of a faces table, and their number of photos."""
        if self._photo_faces is None:
            rows = storage.read_parquet(item["faces"], table.REQUIRED)
            if item["rows"] is not None:
                rows = rows.take(json.loads(item["rows"]))
            yield item["name"], rows, len(rows)
            return
        names = json.loads(item["names"])
        for split, rows, num_photos in self._photo_faces.tables(item):
            yield names[split], rows, num_photos


def _with_embeddings(rows: pa.Table, has_crop_N: np.ndarray, embeddings_ND: np.ndarray, schema: pa.Schema) -> pa.Table:
    """Return rows of a faces table as rows of the embeddings table; one without a crop has no embedding."""
    vectors_ND = np.zeros((len(rows), embeddings_ND.shape[1]), np.float32)
    vectors_ND[has_crop_N] = embeddings_ND
    vectors = pa.FixedSizeListArray.from_arrays(
        pa.array(vectors_ND.ravel()), vectors_ND.shape[1], mask=pa.array(~has_crop_N)
    )
    columns = {"embedding": vectors, **{name: rows[name] for name in schema.names if name != "embedding"}}
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)
