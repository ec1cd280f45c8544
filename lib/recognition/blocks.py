"""Embeds faces in blocks of one size. Threads decode ahead, and results are fetched while the next block computes.

Shape suffixes: N faces, H and W pixels, C channels, D embedding dimension.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lib import device as devices
from lib.device_errors import is_out_of_memory
from lib.errors import UserError
from lib.faces.alignment import Alignment, realign
from lib.recognition.embedder import Embedder, Pending
from lib.recognition.model import resized_crops
from lib.recognition.onnx_model import ARCFACE_SIZE
from lib.recognition.recognizer import decoded_crop
from lib.threads import ahead

logger = logging.getLogger(__name__)

CPU_BLOCK, GPU_BLOCK = 64, 256
"""Faces per forward pass. Not a flag, because the last digits of an embedding depend on it."""

BLOCKS_AHEAD = 4
"""Decoded blocks that wait for the model: of 256 faces of 240 pixels, 44 MB each."""


class Blocks:
    """Embeds the faces of a part in blocks that begin at multiples of `size`. Several threads may call it.

    Args:
        embedder: the model.
        size: faces of a block.
        is_padded: fill the last block with black images. Then every forward pass has the same shape, and a GPU uses the
            same kernels.
        num_threads: threads that decode.
    """

    def __init__(
        self, embedder: Embedder, *, size: int = CPU_BLOCK, is_padded: bool = False, num_threads: int = 1
    ) -> None:
        self._embedder = embedder
        self._size, self._is_padded = size, is_padded
        self._at_once = size
        self._one_at_a_time = threading.Lock()
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    def __call__(self, faces: Sequence[Mapping[str, Any]], made: Alignment) -> np.ndarray:
        """Return embeddings_ND, float32, of aligned rows of a faces table with the fingerprint `made`.

        A row has its `crop`. If the model needs another template, it has its `box` and `landmarks`, too.

        Raises:
            UserError: a crop cannot be decoded; an embedding is not finite; the device has no memory for one face.
        """
        embeddings_ND = np.empty((len(faces), self._embedder.embedding_dim), np.float32)
        starts = range(0, len(faces), self._size)
        decoded = ahead(
            self._pool,
            lambda start: self._decoded(faces[start : start + self._size], made),
            starts,
            num_ahead=BLOCKS_AHEAD,
        )
        before: tuple[int, np.ndarray, list[Pending]] | None = None
        for start, crops_NHWC in zip(starts, decoded, strict=True):
            launched = self._launched(crops_NHWC)
            if before is not None:
                self._fetch(*before, embeddings_ND)
            before = start, crops_NHWC, launched
        if before is not None:
            self._fetch(*before, embeddings_ND)
        self._check(embeddings_ND)
        return embeddings_ND

    def _decoded(self, faces: Sequence[Mapping[str, Any]], made: Alignment) -> np.ndarray:
        crops_NHWC = self._embedder.buffer(self._size if self._is_padded else len(faces))
        crops_NHWC[len(faces) :] = 0
        for crop_HWC, face in zip(crops_NHWC, faces, strict=False):
            wanted_HWC = _wanted_crop(self._embedder, face, made)
            crop_HWC[:] = resized_crops(wanted_HWC[None], crops_NHWC.shape[1])[0]
        return crops_NHWC

    def _launched(self, crops_NHWC: np.ndarray) -> list[Pending]:
        """Start the forward passes of a block, in smaller pieces if the device lacks the memory for all of it."""
        with self._one_at_a_time:
            while True:
                try:
                    size = self._at_once
                    return [self._embedder.launch(crops_NHWC[n : n + size]) for n in range(0, len(crops_NHWC), size)]
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    self._halve(error)
                devices.free_memory()  # outside of the handler, where the error no longer holds tensors

    def _halve(self, error: Exception) -> None:
        if self._at_once == 1:
            raise UserError(
                f"the GPU has no memory for one face of {self._embedder.url!r}: end what else runs on it, or give "
                "--gpus 0 to compute on the CPUs"
            ) from error
        self._at_once = -(-self._at_once // 2)
        logger.warning("the GPU has no memory for %d faces at once: going on with fewer", 2 * self._at_once)

    def _fetch(self, start: int, crops_NHWC: np.ndarray, launched: list[Pending], embeddings_ND: np.ndarray) -> None:
        """Wait for a block and write its embeddings. Its crops must exist until then, because they are copied late."""
        fetched_ND = np.concatenate([pending() for pending in launched])
        rest_ND = embeddings_ND[start : start + len(crops_NHWC)]
        rest_ND[:] = fetched_ND[: len(rest_ND)]

    def _check(self, embeddings_ND: np.ndarray) -> None:
        num_broken = int(np.count_nonzero(~np.isfinite(embeddings_ND).all(axis=1)))
        if num_broken:
            raise UserError(
                f"the model {self._embedder.url!r} gives NaN or infinity for {num_broken} of {len(embeddings_ND)} "
                "faces: it is broken; take an earlier checkpoint, or train again with a lower learning rate"
            )


def _wanted_crop(embedder: Embedder, face: Mapping[str, Any], made: Alignment) -> np.ndarray:
    crop_HWC = decoded_crop(face["crop"])
    if embedder.template == made.template:
        return crop_HWC
    landmarks_52 = np.asarray(face["landmarks"]).reshape(5, 2)
    wanted = Alignment(template=embedder.template, image_size=ARCFACE_SIZE)
    return realign(crop_HWC, np.asarray(face["box"]), landmarks_52, made=made, wanted=wanted)
