"""The photos of a batch: opened on the CPU, decoded onto the device, and shrunk there.

Shape suffixes: H and W pixels, 3 colours (RGB).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.nn import functional

from lib.faces.extraction import DetectionSize, ExtractionSettings
from lib.faces.images import BadPhotoError, Photo

MAX_PHOTOS = 256
"""Photos in a batch."""
MAX_PIXELS = 120_000_000
"""Pixels of the decoded photos of a batch: 360 MB, and for a while as much again."""

Row = dict[str, Any]


@dataclass
class BatchPhoto:
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
            self.reduced[reduction] = shrunk(self.pixels, reduction // self.photo.finest)
        return self.reduced[reduction]


def opened(data: bytes, settings: ExtractionSettings, device: torch.device) -> BatchPhoto:
    """Read the header of a photo. Decode it if the GPU's decoder cannot read its format, or if there is no GPU."""
    try:
        photo = Photo(data, max_pixels=int(settings.max_megapixels * 1e6))
        work = BatchPhoto(photo)
        if device.type != "cuda" or not photo.is_plain_jpeg:
            work.pixels = torch.from_numpy(_rgb_planes(photo.pixels(photo.finest)))
    except BadPhotoError as bad:
        return BatchPhoto(None, [_bad(bad)])
    return work


def decode(batch: list[BatchPhoto], device: torch.device) -> None:
    """Bring the pixels of all photos to the device; those of plain JPEGs are decoded there."""
    waiting = [work for work in batch if work.photo is not None and work.pixels is None]
    for work, pixels in zip(waiting, _decoded_on_gpu(waiting, device), strict=True):
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
        if work.pixels is not None and work.pixels.device != device:
            work.pixels = work.pixels.to(device)


def _decoded_on_gpu(works: list[BatchPhoto], device: torch.device) -> list[Tensor | None]:
    """Return the pixels that nvJPEG makes of each photo, None where it refuses one."""
    files = [torch.frombuffer(bytearray(work.photo.data), dtype=torch.uint8) for work in works if work.photo]
    if not files:
        return []
    read: Callable[[list[Tensor]], list[Tensor]] = lambda some: torchvision.io.decode_jpeg(  # noqa: E731
        some, mode=torchvision.io.ImageReadMode.RGB, device=device
    )
    try:
        return list(read(files))
    except RuntimeError:
        pass
    decoded: list[Tensor | None] = []
    for file in files:  # one of them is the cause
        try:
            decoded.append(read([file])[0])
        except RuntimeError:
            decoded.append(None)
    return decoded


def batches(works: list[BatchPhoto]) -> Iterator[list[BatchPhoto]]:
    """Yield batches of photos that fit into the device's memory."""
    batch: list[BatchPhoto] = []
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


def shrunk(pixels_3HW: Tensor, reduction: int) -> Tensor:
    """Return the mean of each square of `reduction` pixels, uint8; the edges are replicated to whole squares."""
    bottom, right = (-pixels_3HW.shape[1]) % reduction, (-pixels_3HW.shape[2]) % reduction
    pixels = pixels_3HW[None].float()
    if bottom or right:
        pixels = functional.pad(pixels, (0, right, 0, bottom), mode="replicate")
    return functional.avg_pool2d(pixels, reduction)[0].round_().to(torch.uint8)


def detector_picture(work: BatchPhoto, long_side: int) -> Tensor:
    """Return a photo for the detector, uint8 [3, H, W], with a long side of `long_side` pixels at most."""
    assert work.photo is not None
    look = DetectionSize.of(work.photo, long_side)
    pixels = work.at(look.reduction)
    if look.interpolation is None:
        return pixels
    size = (look.height, look.width)
    mode = {"mode": "area"} if look.interpolation == cv2.INTER_AREA else {"mode": "bilinear", "align_corners": False}
    return functional.interpolate(pixels[None].float(), size, **mode)[0].round_().to(torch.uint8)
