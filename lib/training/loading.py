"""Batches of images, loaded from the cache ahead of the step that trains on them.

Shape suffixes: N images of a batch, H and W pixels, K numbers of one draw.
"""

import collections
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

import cv2
import numpy as np
import numpy.typing as npt

from lib.device import Upload, Uploaded
from lib.training.augmentation import Image, Level, Making, draws
from lib.training.decoders import Decoders
from lib.training.face_cache import FaceCache

Task = TypeVar("Task")
Loaded = TypeVar("Loaded")


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadTask:
    """A batch to be loaded."""

    rows: npt.NDArray[np.integer]
    """Rows of the cache, of any shape; the images are in the order of the flattened rows [N]."""
    first_draw: int
    """Number of images of the epoch before this batch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedBatch:
    """The images of a batch."""

    rows: npt.NDArray[np.integer]
    images: Image
    """uint8 RGB [N, H, W, 3]; black where `failed`."""
    failed: npt.NDArray[np.bool_]
    """True [N] for crops that cannot be decoded: their triplets must be left out of the loss."""
    uploaded: Uploaded | None = None
    """The images, being sent to the device, if the loader has one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchLoader:
    """Reads a batch from the cache: a call is a plain function of the task, so threads may share a loader."""

    cache: FaceCache
    size: int
    """Side of the images for the model, in pixels."""
    level: Level
    seed: int
    epoch: int
    rank: int = 0
    decoders: Decoders | None = None
    """Processes that make the images; without them the calling thread does."""
    upload: Upload | None = None
    """Sends them to the device."""

    def __call__(self, task: LoadTask) -> LoadedBatch:
        """Decode and augment the images of a batch."""
        rows_N = task.rows.ravel()
        shape = (len(rows_N), self.size, self.size, 3)
        images_NHWC = np.empty(shape, np.uint8) if self.upload is None else self.upload.empty(*shape)
        draws_NK = None
        if self.level != "none":
            draws_NK = draws(task.first_draw, len(rows_N), seed=self.seed, epoch=self.epoch, rank=self.rank)
        making = Making(level=self.level, crop_size=self.cache.crop_size, size=self.size)
        fill = making.fill if self.decoders is None else self.decoders.filling(making)
        failed_N = fill(images_NHWC, self.cache.at_hand(rows_N), rows_N, draws_NK)
        for row in rows_N[failed_N].tolist():
            self.cache.note_failed(row)
        uploaded = None if self.upload is None else self.upload(images_NHWC)
        return LoadedBatch(rows=task.rows, images=images_NHWC, failed=failed_N, uploaded=uploaded)


class Prefetcher(Generic[Task, Loaded]):
    """Loads ahead of the consumer on threads, in order.

    An error of `load` is raised in place of its batch. Tasks are drawn on the consumer's thread, with their errors.
    Leaving the `with` block drops batches that were not consumed, and waits for those being loaded.

    Attributes:
        wait_s: seconds that the consumer has waited, including the drawing of tasks.
    """

    def __init__(
        self, load: Callable[[Task], Loaded], tasks: Iterable[Task], *, num_threads: int, num_ahead: int
    ) -> None:
        """Start at the first `next`. `num_ahead` batches are ready or loading while the consumer works."""
        # OpenCV's own threads would compete with ours, and the tasks are too small for them.
        cv2.setNumThreads(1)
        self.wait_s = 0.0
        self._load = load
        self._tasks = iter(tasks)
        self._num_ahead = num_ahead
        self._futures: collections.deque[Future[Loaded]] = collections.deque()
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="load")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[Loaded]:
        return self

    def __next__(self) -> Loaded:
        began = time.perf_counter()
        try:
            while len(self._futures) <= self._num_ahead:
                try:
                    task = next(self._tasks)
                except StopIteration:
                    break
                self._futures.append(self._pool.submit(self._load, task))
            if not self._futures:
                raise StopIteration
            return self._futures.popleft().result()
        finally:
            self.wait_s += time.perf_counter() - began
