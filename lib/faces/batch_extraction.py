"""Extracts the faces of batches of photos on one device; `lib.faces.extraction` does the same for one photo on a CPU.

Decoding, shrinking, detection and the warps are tensor code on the device. Formats that the GPU's decoder cannot read
are decoded on the CPU. Headers are read and crops are encoded on the CPU, in threads.

Shape suffixes: H and W pixels, 3 colours (RGB), S side of a crop, F faces.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import cv2
import numpy as np
import torch
from torch import Tensor

from lib.errors import JobError
from lib.faces import table
from lib.faces.alignment import Alignment, alignment_matrix, reduction_wanted
from lib.faces.batch_detection import BatchDetector
from lib.faces.batch_photos import BatchPhoto, Row, batches, decode, detector_picture, opened
from lib.faces.batch_warps import Cut, warped
from lib.faces.detection import Detections, detector_weights, is_torch_file
from lib.faces.extraction import JPEG_QUALITY, ExtractionSettings, rows_without_crops
from lib.faces.images import rgb_to_jpeg
from lib.faces.search import Look, Search, search
from lib.faces.second_look import CLOSE_UP, SecondLook, is_tilted

logger = logging.getLogger(__name__)


class BatchExtractor:
    """Turns batches of encoded photos into rows of the faces table; several threads may call it.

    Attributes:
        made_on: the device and the network's arithmetic, such as `cuda float16`.
        seconds: time of each stage so far; for the device, the time spent waiting for it.
    """

    def __init__(self, settings: ExtractionSettings, device: torch.device, *, num_threads: int = 2) -> None:
        """Load the detector onto the device.

        Raises:
            UserError: missing or wrong weights.
        """
        cv2.setNumThreads(1)
        self.settings = settings
        self.device = device
        weights = detector_weights(settings.detector, settings.detector_weights)
        self._detector = BatchDetector(weights, device, is_torch=is_torch_file(settings.detector_weights))
        self.made_on = f"{device.type} {self._detector.arithmetic}"
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="photo")
        self._on_device = threading.Lock()
        self.seconds: dict[str, float] = {}

    def rows(self, photos: Sequence[bytes]) -> list[list[Row]]:
        """Return the rows of each photo, as `FaceExtractor.rows` does."""
        with self._timed("read headers"):
            works = list(self._pool.map(lambda data: opened(data, self.settings, self.device), photos))
        rows: list[list[Row]] = []
        for batch in batches(works):
            cut, crops_FSS3 = self._extracted(batch)
            with self._timed("encode"):
                jpegs = list(self._pool.map(lambda crop: rgb_to_jpeg(crop, JPEG_QUALITY), crops_FSS3))
            for row, jpeg in zip(cut, jpegs, strict=True):
                row["crop"] = jpeg
            rows.extend(work.rows for work in batch)
        return rows

    def _extracted(self, batch: list[BatchPhoto]) -> tuple[list[Row], np.ndarray]:
        """Do `_extract`, in halves if the device has too little memory.

        Raises:
            JobError: it has too little memory for one photo.
        """
        try:
            return self._extract(batch)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise JobError(
                    f"the GPU has too little memory left for one photo ({str(error).splitlines()[0]}): stop other "
                    "programs on it, or compute on the CPUs with --gpus 0"
                ) from error
        for work in batch:
            work.reduced = {}
        torch.cuda.empty_cache()
        middle = len(batch) // 2
        halves = [self._extracted(half) for half in (batch[:middle], batch[middle:])]
        return [row for rows, _ in halves for row in rows], np.concatenate([crops for _, crops in halves])

    def _extract(self, batch: list[BatchPhoto]) -> tuple[list[Row], np.ndarray]:
        """Fill in the rows of a batch; return those that get a crop, and the crops [F, S, S, 3]."""
        with self._on_device, torch.inference_mode():
            with self._timed("decode"):
                decode(batch, self.device)
            works = [work for work in batch if work.photo is not None]
            self._find(works)
            faces = [(work, row) for work in works for row in work.rows if row["status"] == table.ALIGNED]
            with self._timed("second look"):
                self._look_again(faces)
            with self._timed("warp"):
                alignment = self.settings.alignment
                crops = warped([_cut(work, row, alignment) for work, row in faces], alignment.image_size, self.device)
                crops_FSS3 = _on_host(crops.permute(0, 2, 3, 1))
            for work in works:
                work.pixels, work.reduced = None, {}
        return [row for _, row in faces], crops_FSS3

    def _find(self, works: list[BatchPhoto]) -> None:
        """Search all photos for faces, a round of looks at a time, and make their rows."""
        settings = self.settings
        searches: list[Search] = []
        waiting: dict[int, list[Look]] = {}
        for number, work in enumerate(works):
            assert work.photo is not None
            width, height = work.photo.width, work.photo.height
            searches.append(search(width, height, detection_size=settings.detection_size, min_score=settings.min_score))
            waiting[number] = next(searches[number])
        while waiting:
            asked = [(number, look) for number, looks in waiting.items() for look in looks]
            seen = self._seen([(works[number], look) for number, look in asked])
            answers: dict[int, list[Detections]] = {number: [] for number in waiting}
            for (number, _), faces in zip(asked, seen, strict=True):
                answers[number].append(faces)
            waiting = {}
            for number, answer in answers.items():
                try:
                    waiting[number] = searches[number].send(answer)
                except StopIteration as done:
                    photo = works[number].photo
                    assert photo is not None
                    works[number].rows = rows_without_crops(done.value, photo.width, photo.height, settings)

    def _seen(self, asked: list[tuple[BatchPhoto, Look]]) -> list[Detections]:
        """Return the faces of each look at a photo, in pixels of the photo."""
        with self._timed("shrink"):
            pictures = [detector_picture(work, look.long_side) for work, look in asked]
            turned = [p.rot90(look.quarter_turns, (1, 2)) for p, (_, look) in zip(pictures, asked, strict=True)]
        with self._timed("detect"):
            detections = self._detector.detect(turned)
        seen = []
        for (work, look), picture, found in zip(asked, pictures, detections, strict=True):
            assert work.photo is not None
            height, width = picture.shape[1:]
            seen.append(
                found.turned_back(look.quarter_turns, width, height).scaled(
                    max(work.photo.width, work.photo.height) / max(width, height)
                )
            )
        return seen

    def _look_again(self, faces: list[tuple[BatchPhoto, Row]]) -> None:
        """Replace the landmarks of tilted faces in their rows by refined ones."""
        tilted = [(work, row) for work, row in faces if is_tilted(row["landmarks"].reshape(5, 2))]
        looks = [
            SecondLook.at(row["box"], row["landmarks"].reshape(5, 2), self.settings.alignment) for _, row in tilted
        ]
        cuts = [Cut(work, look.to_close_up_23, look.reduction) for (work, _), look in zip(tilted, looks, strict=True)]
        close_ups = warped(cuts, CLOSE_UP.image_size, self.device).flip(3)
        for (_, row), look, mirrored in zip(tilted, looks, self._detector.detect(list(close_ups)), strict=True):
            row["landmarks"] = look.merged(mirrored).reshape(10).astype(np.float32)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began


def _cut(work: BatchPhoto, row: Row, alignment: Alignment) -> Cut:
    landmarks_52 = row["landmarks"].reshape(5, 2)
    matrix_23 = alignment_matrix(row["box"], landmarks_52, alignment)
    return Cut(work, matrix_23, reduction_wanted(row["box"], landmarks_52, alignment))


def _on_host(tensor: Tensor) -> np.ndarray:
    """Return a copy in the host's memory. From a GPU it goes through pinned memory, which is ten times as fast."""
    if tensor.device.type != "cuda":
        return tensor.contiguous().numpy()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return host.numpy()
