"""Embeddings of the images of an IJB set. They are written in parts, so that a killed job can go on.

Shapes: N images.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from lib import cluster, storage
from lib.errors import UserError
from lib.evaluation.ijb_files import IjbSet
from lib.faces import table
from lib.faces.aligned import ARCFACE_SIDE
from lib.faces.alignment import ARCFACE, Alignment, align
from lib.faces.images import MAX_PHOTO_BYTES, BadPhotoError, Photo
from lib.faces.sources.folder import NUM_READERS
from lib.part_workers import Share, run_parts
from lib.parts import MANIFEST_FOLDER, begin, digest_of, finish_version, part_name, settle
from lib.recognition.embed_job import CPU_PARTS, GPU_PARTS
from lib.recognition.embed_worker import Computing, EmbedWorker
from lib.recognition.embedder import Embedder, chosen_gpus
from lib.recognition.embeddings_table import counts_of
from lib.recognition.onnx_model import OnnxInput
from lib.storage_errors import MissingFileError

logger = logging.getLogger(__name__)

PART_IMAGES = 1_000
SPLIT = "test"
MAX_PIXELS = 100_000_000

_PLANNED = pa.schema(
    [
        pa.field("photo", pa.string()),
        pa.field("landmarks", pa.list_(pa.float32(), 10)),
        pa.field("score", pa.float32()),
    ]
)


def file_names(one: IjbSet, embedder: Embedder) -> list[str]:
    """Return the file of each part of `PART_IMAGES` images. Its name depends on what its embeddings are made of."""
    names = []
    for part, start in enumerate(range(0, len(one.images), PART_IMAGES)):
        rows = slice(start, start + PART_IMAGES)
        made_of = [
            *one.images[rows].to_pylist(),
            *one.marks[rows].to_pylist(),
            one.landmarks_NX[rows].tobytes().hex(),
            embedder.digest,
        ]
        names.append(part_name(SPLIT, f"{part:06d}", digest_of(made_of)))
    return names


def embed_ijb(one: IjbSet, embedder: Embedder, output: str, *, onnx: OnnxInput, gpus: cluster.Gpus) -> list[str]:
    """Make or complete the embeddings of all images below `output`, and return the files in the order of the images.

    Raises:
        UserError, JobError: as `embed_source` does.
    """
    alignment = {"template": ARCFACE, "image_size": ARCFACE_SIDE}
    fingerprint = {"id": digest_of([one.name, str(alignment)])[:16], "points": "given", **alignment}
    plan = {"job": "embed", "model": embedder.digest, "fingerprint": fingerprint, "of_splits": [SPLIT]}
    names = file_names(one, embedder)
    urls = [storage.join(output, name) for name in names]
    found = settle(output, plan, flag="--output", overwrite=True)
    if found.is_finished(names):
        logger.info("%s is complete: nothing to do", output)
        return urls
    missing = found.missing(names)
    begun = begin(found, plan, names)
    items: list[dict[str, Any]] = [{"part": part, "name": name} for part, name in enumerate(names) if name in missing]
    if len(items) < len(names):
        logger.info("resuming: %d of %d parts are done", len(names) - len(items), len(names))
    model: dict[str, Any] = {"digest": embedder.digest, "embedding_dim": embedder.embedding_dim}
    model |= {"template": embedder.template, "flip": embedder.flip}
    if items:
        planned = storage.join(output, MANIFEST_FOLDER, "images.parquet")
        _write_plan(one, planned)
        with cluster.connected():
            chosen = chosen_gpus(embedder.url, gpus)
            share = Share.of_gpus(chosen, most_a_gpu=1)
            share = replace(share, num_parts=GPU_PARTS if chosen else CPU_PARTS)
            how = Computing(
                use_gpu=chosen > 0,
                num_threads=share.num_cpus,
                num_faces=len(one.images) // max(1, share.num_workers),
            )
            run_parts(
                items,
                IjbWorker,
                (one.images_url, planned, ((embedder.url, onnx, embedder.flip), output, None, fingerprint, model, how)),
                unit="image",
                num_done=len(one.images) - sum(_num_images(one, item["part"]) for item in items),
                num_all=len(one.images),
                share=share,
            )
    storage.remove_unfinished(output)
    about: dict[str, Any] = {"model": {"url": storage.redacted(embedder.url), **model}, "fingerprint": fingerprint}
    about |= {"counts": counts_of(output, names), "photos": storage.redacted(one.images_url)}
    finish_version(output, begun, names, about, keep_versions=1)
    return urls


def _num_images(one: IjbSet, part: int) -> int:
    return min(PART_IMAGES, len(one.images) - part * PART_IMAGES)


def _write_plan(one: IjbSet, url: str) -> None:
    """Write name, landmarks and score of each image, a part a row group, for the workers."""
    landmarks = pa.FixedSizeListArray.from_arrays(pa.array(one.landmarks_NX.ravel()), 10)
    rows = pa.Table.from_arrays([one.images, landmarks, pa.array(one.score_N)], schema=_PLANNED)
    storage.write_parquet(url, rows, row_group_size=PART_IMAGES, compression="zstd")


class IjbWorker(EmbedWorker):
    """Ray Data's worker: reads and aligns the images of a part; the rest is as for a faces table."""

    def __init__(self, images_url: str, planned: str, arguments: tuple[Any, ...]) -> None:
        super().__init__(*arguments)
        self._images_url, self._planned = images_url, planned
        # All crops are aligned to ArcFace's template. Other templates need boxes, which the files do not have.
        self._made = Alignment(template=arguments[4]["template"], image_size=ARCFACE_SIDE)
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="image")

    def _rows(self, item: dict[str, Any]) -> Iterator[tuple[str, pa.Table, int]]:
        with storage.open_parquet(self._planned, list(_PLANNED)) as file:
            planned = file.read_row_group(item["part"]).to_pylist()
        found = self._readers.map(lambda row: aligned(self._images_url, row["photo"], row["landmarks"]), planned)
        rows = [
            {**row, "num_faces": 1, "status": status, "crop": crop}
            for row, (status, crop) in zip(planned, found, strict=True)
        ]
        yield item["name"], pa.Table.from_pylist(rows, schema=pa.schema(table.REQUIRED)), len(rows)


def aligned(images_url: str, name: str, landmarks: list[float]) -> tuple[str, bytes | None]:
    """Return a status of the faces table, and the face as a lossless 112x112 BMP, which is quick to decode."""
    try:
        photo = Photo(storage.read_bytes(storage.join(images_url, name), MAX_PHOTO_BYTES + 1), max_pixels=MAX_PIXELS)
        alignment = Alignment(template=ARCFACE, image_size=ARCFACE_SIDE)
        crop_HWC = align(photo, np.zeros(4), np.array(landmarks).reshape(5, 2), alignment)
    except MissingFileError:
        return table.MISSING, None
    except BadPhotoError as bad:
        return bad.status, None
    except UserError as error:
        logger.warning("%s: %s", name, error)
        return table.CORRUPT, None
    return table.ALIGNED, cv2.imencode(".bmp", crop_HWC)[1].tobytes()
