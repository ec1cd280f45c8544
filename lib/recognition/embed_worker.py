"""The worker of the embed job: turns a part of faces, or of photos, into a part of the embeddings table."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from lib import storage
from lib.errors import UserError
from lib.faces import table
from lib.faces.alignment import Alignment, realign
from lib.faces.extraction import ExtractionSettings, FaceExtractor, settings_from_fingerprint
from lib.faces.photo_parts import PhotoReader
from lib.faces.sources.source import Source as PhotoFiles
from lib.part_workers import summary
from lib.recognition import embeddings_table
from lib.recognition.embedder import (
    Embedder,
    load_embedder,
)
from lib.recognition.onnx_model import ARCFACE_SIZE, OnnxInput
from lib.recognition.recognizer import decoded_crop

BATCH_SIZE = 64
"""Faces per forward pass. Not a flag, because the last digits of an embedding depend on it."""


class EmbedWorker:
    """Ray Data's worker: turns a part of a faces table, or of a manifest, into a part of the embeddings table."""

    def __init__(
        self,
        model_source: tuple[str, OnnxInput | None],
        output: str,
        photos: tuple[PhotoFiles, ExtractionSettings] | None,
        fingerprint: dict[str, Any],
        model: dict[str, Any],
        use_gpu: bool,
    ) -> None:
        torch.set_num_threads(1)  # a worker has one CPU, and the number of threads changes the last digits
        self._embedder = load_embedder(*model_source, device="cuda" if use_gpu else "cpu")
        if self._embedder.digest != model["digest"]:
            raise UserError(
                f"the model {storage.redacted(self._embedder.url)} changed since this job began: run it again when the "
                "training of that model has ended"
            )
        self._output = output
        self._schema = embeddings_table.schema(model["embedding_dim"], json.dumps(fingerprint), json.dumps(model))
        self._made = settings_from_fingerprint(fingerprint).alignment
        self._reader = None
        if photos is not None:
            files, settings = photos
            self._reader = PhotoReader(files, FaceExtractor(settings))

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Process one item of a source, and return its summary."""
        return summary(self._process, item)

    def _process(self, item: dict[str, Any]) -> tuple[int, int]:
        num_rows = 0
        for name, rows, num_photos in self._rows(item):
            faces = [row for row in rows if row.get("crop")]
            embeddings = iter(embed_faces(self._embedder, faces, self._made))
            for row in rows:
                row["embedding"] = next(embeddings) if row.get("crop") else None
            part = pa.Table.from_pylist(rows, schema=self._schema)
            storage.write_parquet(storage.join(self._output, name), part, compression="zstd")
            num_rows += num_photos
        return num_rows, 0

    def _rows(self, item: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]], int]]:
        """Yield each file, its rows of a faces table, and their number of photos."""
        if self._reader is None:
            rows = storage.read_parquet(item["faces"], table.REQUIRED).to_pylist()
            yield item["name"], rows, len(rows)
            return
        names = json.loads(item["names"])
        for split, made in self._reader.rows(item).items():
            yield names[split], made.rows, made.num_photos


def embed_faces(embedder: Embedder, faces: Sequence[Mapping[str, Any]], made: Alignment) -> np.ndarray:
    """Return embeddings_ND, float32, of aligned rows of a faces table with the fingerprint `made`, batch by batch.

    Raises:
        UserError: a crop cannot be decoded; an embedding is not finite.
    """
    embeddings_ND = np.empty((len(faces), embedder.embedding_dim), np.float32)
    for start in range(0, len(faces), BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        embeddings_ND[batch] = embedder.embed(np.stack([_wanted_crop(embedder, face, made) for face in faces[batch]]))
    num_broken = int(np.count_nonzero(~np.isfinite(embeddings_ND).all(axis=1)))
    if num_broken:
        raise UserError(
            f"the model {embedder.url!r} gives NaN or infinity for {num_broken} of {len(faces)} faces: it is broken; "
            "take an earlier checkpoint, or train again with a lower learning rate"
        )
    return embeddings_ND


def _wanted_crop(embedder: Embedder, face: Mapping[str, Any], made: Alignment) -> np.ndarray:
    crop_HWC = decoded_crop(face["crop"])
    if embedder.template == made.template:
        return crop_HWC
    landmarks_52 = np.asarray(face["landmarks"]).reshape(5, 2)
    wanted = Alignment(template=embedder.template, image_size=ARCFACE_SIZE)
    return realign(crop_HWC, np.asarray(face["box"]), landmarks_52, made=made, wanted=wanted)
