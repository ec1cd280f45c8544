"""Extracts the faces of batches of photos on one device; `lib.faces.extraction` does the same for one photo on a CPU.

Decoding, shrinking, detection and the warps are tensor code on the device. Formats that the GPU's decoder cannot read
are decoded on the CPU. Headers are read and crops are encoded on the CPU, in threads.

Shape suffixes: H and W pixels, 3 colours (RGB), S side of a crop, F faces.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.nn import functional

from lib.errors import JobError
from lib.faces import table
from lib.faces.alignment import Alignment, alignment_matrix, reduction_wanted
from lib.faces.batch_detection import BatchDetector
from lib.faces.detection import Detections, detector_weights, is_torch_file
from lib.faces.extraction import (
    CLOSE_UP,
    JPEG_QUALITY,
    DetectionSize,
    ExtractionSettings,
    SecondLook,
    is_tilted,
    rows_without_crops,
)
from lib.faces.images import BadPhotoError, Photo, rgb_to_jpeg
from lib.faces.search import Look, Search, search

logger = logging.getLogger(__name__)

MAX_PHOTOS = 256
"""Photos in a batch."""
MAX_PIXELS = 120_000_000
"""Pixels of the decoded photos of a batch: 360 MB, and for a while as much again."""

Row = dict[str, Any]


@dataclass
class _Work:
    """A photo in progress.

    Attributes:
        photo: None if it cannot be read; `rows` then says why.
        rows: its rows of the faces table.
        pixels: upright, uint8 RGB [3, H, W] on the device, at 1/`photo.finest` of the photo's size.
        reduced: the pixels at further reductions.
    """

    photo: Photo | None
    rows: list[Row] = field(default_factory=list)
    pixels: Tensor | None = None
    reduced: dict[int, Tensor] = field(default_factory=dict)

    def at(self, reduction: int) -> Tensor:
        """Return the pixels at 1/`reduction` of the photo's size."""
        assert self.photo is not None
        assert self.pixels is not None
        if reduction <= self.photo.finest:
            return self.pixels
        if reduction not in self.reduced:
            self.reduced[reduction] = _shrunk(self.pixels, reduction // self.photo.finest)
        return self.reduced[reduction]


@dataclass(frozen=True)
class _Cut:
    """A face to be warped from a photo at 1/`reduction` of its size; `matrix_23` maps the photo to the crop."""

    work: _Work
    matrix_23: np.ndarray
    reduction: int


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
            works = list(self._pool.map(self._opened, photos))
        rows: list[list[Row]] = []
        for batch in _batches(works):
            cut, crops_FSS3 = self._extracted(batch)
            with self._timed("encode"):
                jpegs = list(self._pool.map(lambda crop: rgb_to_jpeg(crop, JPEG_QUALITY), crops_FSS3))
            for row, jpeg in zip(cut, jpegs, strict=True):
                row["crop"] = jpeg
            rows.extend(work.rows for work in batch)
        return rows

    def _opened(self, data: bytes) -> _Work:
        try:
            photo = Photo(data, max_pixels=int(self.settings.max_megapixels * 1e6))
            work = _Work(photo)
            if self.device.type != "cuda" or not photo.is_plain_jpeg:
                work.pixels = torch.from_numpy(_rgb_planes(photo.pixels(photo.finest)))
        except BadPhotoError as bad:
            return _Work(None, [_bad(bad)])
        return work

    def _extracted(self, batch: list[_Work]) -> tuple[list[Row], np.ndarray]:
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

    def _extract(self, batch: list[_Work]) -> tuple[list[Row], np.ndarray]:
        """Fill in the rows of a batch; return those that get a crop, and the crops [F, S, S, 3]."""
        with self._on_device, torch.inference_mode():
            with self._timed("decode"):
                self._decode(batch)
            works = [work for work in batch if work.photo is not None]
            self._find(works)
            faces = [(work, row) for work in works for row in work.rows if row["status"] == table.ALIGNED]
            with self._timed("second look"):
                self._look_again(faces)
            with self._timed("warp"):
                alignment = self.settings.alignment
                crops = self._warped([_cut(work, row, alignment) for work, row in faces], alignment.image_size)
                crops_FSS3 = _on_host(crops.permute(0, 2, 3, 1))
            for work in works:
                work.pixels, work.reduced = None, {}
        return [row for _, row in faces], crops_FSS3

    def _decode(self, batch: list[_Work]) -> None:
        """Bring the pixels of all photos to the device; those of plain JPEGs are decoded there."""
        waiting = [work for work in batch if work.photo is not None and work.pixels is None]
        for work, pixels in zip(waiting, self._decoded_on_gpu(waiting), strict=True):
            assert work.photo is not None
            stored = work.photo.stored_size
            if pixels is not None and tuple(pixels.shape[1:]) == (stored[1], stored[0]):
                work.pixels = _upright(pixels, work.photo.orientation)
                continue
            try:
                work.pixels = torch.from_numpy(_rgb_planes(work.photo.pixels(work.photo.finest)))
            except BadPhotoError as bad:
                work.photo, work.rows = None, [_bad(bad)]
        for work in batch:
            if work.pixels is not None and work.pixels.device != self.device:
                work.pixels = work.pixels.to(self.device)

    def _decoded_on_gpu(self, works: list[_Work]) -> list[Tensor | None]:
        """Return the pixels that nvJPEG makes of each photo, None where it refuses one."""
        files = [torch.frombuffer(bytearray(work.photo.data), dtype=torch.uint8) for work in works if work.photo]
        if not files:
            return []
        decode: Callable[[list[Tensor]], list[Tensor]] = lambda some: torchvision.io.decode_jpeg(  # noqa: E731
            some, mode=torchvision.io.ImageReadMode.RGB, device=self.device
        )
        try:
            return list(decode(files))
        except RuntimeError:
            pass
        decoded: list[Tensor | None] = []
        for file in files:  # one of them is the cause
            try:
                decoded.append(decode([file])[0])
            except RuntimeError:
                decoded.append(None)
        return decoded

    def _find(self, works: list[_Work]) -> None:
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

    def _seen(self, asked: list[tuple[_Work, Look]]) -> list[Detections]:
        """Return the faces of each look at a photo, in pixels of the photo."""
        with self._timed("shrink"):
            pictures = [_picture(work, look.long_side) for work, look in asked]
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

    def _look_again(self, faces: list[tuple[_Work, Row]]) -> None:
        """Replace the landmarks of tilted faces in their rows by refined ones."""
        tilted = [(work, row) for work, row in faces if is_tilted(row["landmarks"].reshape(5, 2))]
        looks = [
            SecondLook.at(row["box"], row["landmarks"].reshape(5, 2), self.settings.alignment) for _, row in tilted
        ]
        cuts = [_Cut(work, look.to_close_up_23, look.reduction) for (work, _), look in zip(tilted, looks, strict=True)]
        close_ups = self._warped(cuts, CLOSE_UP.image_size).flip(3)
        for (_, row), look, mirrored in zip(tilted, looks, self._detector.detect(list(close_ups)), strict=True):
            row["landmarks"] = look.merged(mirrored).reshape(10).astype(np.float32)

    def _warped(self, cuts: Sequence[_Cut], size: int) -> Tensor:
        """Return the faces, each by one bilinear warp, uint8 [F, 3, S, S]; black outside of the photo."""
        warped_F3SS = torch.zeros((len(cuts), 3, size, size), dtype=torch.uint8, device=self.device)
        if not cuts:
            return warped_F3SS
        windows, to_windows_F23 = [], np.empty((len(cuts), 2, 3), np.float32)
        for number, cut in enumerate(cuts):
            window, to_windows_F23[number] = _window(cut, size)
            windows.append(window)
        grids_FSS2 = _grids(torch.from_numpy(to_windows_F23).to(self.device), size)
        for number, window in enumerate(windows):
            if window is not None:
                warped = functional.grid_sample(
                    window[None].float(), grids_FSS2[number : number + 1], padding_mode="zeros", align_corners=False
                )
                warped_F3SS[number] = warped[0].round_().to(torch.uint8)
        return warped_F3SS

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began


def _batches(works: list[_Work]) -> Iterator[list[_Work]]:
    """Yield batches of photos that fit into the device's memory."""
    batch: list[_Work] = []
    num_pixels = 0
    for work in works:
        size = 0 if work.photo is None else work.photo.width * work.photo.height // work.photo.finest**2
        if batch and (len(batch) == MAX_PHOTOS or num_pixels + size > MAX_PIXELS):
            yield batch
            batch, num_pixels = [], 0
        batch.append(work)
        num_pixels += size
    if batch:
        yield batch


def _bad(error: BadPhotoError) -> Row:
    return {"status": error.status, "reason": str(error)}


def _rgb_planes(pixels_HW3: np.ndarray) -> np.ndarray:
    """Return BGR pixels as RGB [3, H, W]."""
    return np.ascontiguousarray(pixels_HW3[..., ::-1].transpose(2, 0, 1))


def _upright(pixels_3HW: Tensor, orientation: int) -> Tensor:
    """Turn stored pixels upright, by orientation (EXIF 2.32, section 4.6.4)."""
    if orientation in (5, 6, 7, 8):
        pixels_3HW = pixels_3HW.transpose(1, 2)
    flipped = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation)
    return pixels_3HW.flip(flipped) if flipped else pixels_3HW


def _shrunk(pixels_3HW: Tensor, reduction: int) -> Tensor:
    """Return the mean of each square of `reduction` pixels, uint8; the edges are replicated to whole squares."""
    bottom, right = (-pixels_3HW.shape[1]) % reduction, (-pixels_3HW.shape[2]) % reduction
    pixels = pixels_3HW[None].float()
    if bottom or right:
        pixels = functional.pad(pixels, (0, right, 0, bottom), mode="replicate")
    return functional.avg_pool2d(pixels, reduction)[0].round_().to(torch.uint8)


def _picture(work: _Work, long_side: int) -> Tensor:
    """Return a photo for the detector, uint8 [3, H, W], with a long side of `long_side` pixels at most."""
    assert work.photo is not None
    look = DetectionSize.of(work.photo, long_side)
    pixels = work.at(look.reduction)
    if look.interpolation is None:
        return pixels
    size = (look.height, look.width)
    mode = {"mode": "area"} if look.interpolation == cv2.INTER_AREA else {"mode": "bilinear", "align_corners": False}
    return functional.interpolate(pixels[None].float(), size, **mode)[0].round_().to(torch.uint8)


def _cut(work: _Work, row: Row, alignment: Alignment) -> _Cut:
    landmarks_52 = row["landmarks"].reshape(5, 2)
    matrix_23 = alignment_matrix(row["box"], landmarks_52, alignment)
    return _Cut(work, matrix_23, reduction_wanted(row["box"], landmarks_52, alignment))


def _window(cut: _Cut, size: int) -> tuple[Tensor | None, np.ndarray]:
    """Return the part of the reduced photo that a crop shows, [3, h, w], and the matrix [2, 3] from the crop to it.

    The matrix maps to the coordinates of `grid_sample`: -1 and 1 are the edges of the window. The window is None if the
    crop shows nothing of the photo.
    """
    photo = cut.work.photo
    assert photo is not None
    reduction = max(cut.reduction, photo.finest)
    # The point x of the photo is at (x + 0.5) / n - 0.5 in the reduced photo.
    to_photo = np.array([[reduction, 0, (reduction - 1) / 2], [0, reduction, (reduction - 1) / 2], [0, 0, 1.0]])
    to_reduced_23 = cv2.invertAffineTransform(cut.matrix_23 @ to_photo)
    corners_42 = np.array([[x, y] for x in (0, size - 1) for y in (0, size - 1)]) @ to_reduced_23[:, :2].T
    corners_42 = corners_42 + to_reduced_23[:, 2]
    assert cut.work.pixels is not None
    step = reduction // photo.finest
    height, width = (-(-side // step) for side in cut.work.pixels.shape[1:])
    x0, y0 = np.maximum(np.floor(corners_42.min(axis=0)).astype(int) - 1, 0)
    x1, y1 = np.minimum(np.ceil(corners_42.max(axis=0)).astype(int) + 2, [width, height])
    if x1 <= x0 or y1 <= y0:
        return None, to_reduced_23
    window = cut.work.pixels[:, y0 * step : y1 * step, x0 * step : x1 * step]
    if step > 1:
        window = _shrunk(window, step)
    scale_2 = 2 / np.array([x1 - x0, y1 - y0])
    to_window_23 = to_reduced_23 - np.array([[0, 0, x0 - 0.5], [0, 0, y0 - 0.5]])
    return window, to_window_23 * scale_2[:, None] - np.array([[0, 0, 1.0], [0, 0, 1.0]])


def _on_host(tensor: Tensor) -> np.ndarray:
    """Return a copy in the host's memory. From a GPU it goes through pinned memory, which is ten times as fast."""
    if tensor.device.type != "cuda":
        return tensor.contiguous().numpy()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return host.numpy()


def _grids(to_windows_F23: Tensor, size: int) -> Tensor:
    """Return the position of each pixel of each crop in its window [F, S, S, 2]."""
    places = torch.arange(size, device=to_windows_F23.device, dtype=torch.float32)
    y_SS, x_SS = torch.meshgrid(places, places, indexing="ij")
    points_P3 = torch.stack([x_SS, y_SS, torch.ones_like(x_SS)], dim=-1).reshape(-1, 3)
    # Not a matrix product: TF32 would round the positions.
    grids = (points_P3[None, :, None, :] * to_windows_F23[:, None]).sum(dim=-1)
    return grids.reshape(len(to_windows_F23), size, size, 2)
