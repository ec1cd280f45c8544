"""Embeddings of aligned faces that are encoded pictures in memory. Threads decode ahead.

Shape suffixes: N images, H and W pixels, D embedding dimension.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import cv2
import numpy as np
from numpy.typing import NDArray

from lib.faces.aligned import ARCFACE_SIDE
from lib.faces.images import BadPhotoError, Photo
from lib.faces.jpeg_sides import jpeg_side
from lib.progress import ProgressLine
from lib.recognition.embedder import Embedder

BATCH_SIZE = 64
_BATCHES_AHEAD = 4
_MAX_THREADS = 8
_PLAIN_SIDE = 1024
"""Up to this side, a JPEG is decoded without further checks: it cannot take much memory."""
_MAX_PIXELS = 16_000_000


def embed_images(
    embedder: Embedder, images: Sequence[bytes], *, label: str = "embedding"
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the embedding of each image, [N, D], and which images are not square pictures. These have zeros."""
    vectors_ND = np.zeros((len(images), embedder.embedding_dim), np.float32)
    failed_N = np.ones(len(images), bool)
    with ProgressLine(label, unit="image", total=len(images)) as progress:
        for start, crops_NHWC, places_N in _decoded_batches(images):
            rows_N = start + places_N
            failed_N[rows_N] = False
            if len(rows_N):
                vectors_ND[rows_N] = embedder.embed(crops_NHWC)
            progress.update(min(start + BATCH_SIZE, len(images)))
    return vectors_ND, failed_N


def unit_vectors(vectors_ND: np.ndarray) -> np.ndarray:
    """Return the vectors scaled to length 1. A vector of length 0 stays as it is."""
    length_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return vectors_ND / np.where(length_N1 == 0, 1, length_N1)


def _decoded_batches(images: Sequence[bytes]) -> Iterator[tuple[int, np.ndarray, NDArray[np.int64]]]:
    """Yield for each batch its start, its RGB crops [n, S, S, 3], and their places in the batch. It decodes ahead."""
    num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: deque[tuple[int, Future]] = deque()
        try:
            for start in range(0, len(images), BATCH_SIZE):
                waiting.append((start, pool.submit(_decoded_batch, images[start : start + BATCH_SIZE])))
                if len(waiting) > _BATCHES_AHEAD:
                    first, batch = waiting.popleft()
                    yield first, *batch.result()
            for first, batch in waiting:
                yield first, *batch.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _decoded_batch(images: Sequence[bytes]) -> tuple[np.ndarray, NDArray[np.int64]]:
    crops = [decoded_square(image) for image in images]
    places_N = np.array([place for place, crop in enumerate(crops) if crop is not None], np.int64)
    found = [crop for crop in crops if crop is not None]
    return np.stack(found) if found else np.empty((0, ARCFACE_SIDE, ARCFACE_SIDE, 3), np.uint8), places_N


def decoded_square(image: bytes) -> np.ndarray | None:
    """Return an encoded crop as 112x112 RGB pixels, uint8. None if it is not a square picture."""
    side = jpeg_side(image)
    crop_HWC = None
    if side and side <= _PLAIN_SIDE:
        crop_HWC = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR_RGB)
    if crop_HWC is None:
        try:
            crop_HWC = np.ascontiguousarray(Photo(image, max_pixels=_MAX_PIXELS).pixels(1)[:, :, ::-1])
        except BadPhotoError:
            return None
    if crop_HWC.shape[0] != crop_HWC.shape[1]:
        return None
    if len(crop_HWC) != ARCFACE_SIDE:
        crop_HWC = cv2.resize(crop_HWC, (ARCFACE_SIDE, ARCFACE_SIDE), interpolation=cv2.INTER_AREA)
    return crop_HWC
