"""Augmentation: decodes crops at a reduced scale, moves them by one warp, and recolours them by one table.

An image is a function of the encoded crop and a row of random numbers. So it depends neither on the number of threads
nor on their order. Nothing here needs torch: the processes that decode start without it.

Shape suffixes: N images of a batch, H and W pixels, K numbers of one draw.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from lib.training.face_cache import Crops, decode_jpeg, plain

Image = npt.NDArray[np.uint8]

Level = Literal["none", "original", "strong"]

MAX_ANGLE_DEG = 10.0
AUTO_CONTRAST_SHARE = 0.5

MIN_AREA_SHARE = 0.7
"""Smallest share of the crop's area that `strong` keeps."""
MAX_LIGHT_CHANGE = 0.3
"""`strong` multiplies contrast and brightness by up to 1 -+ this."""
GREY_SHARE = 0.1
BLUR_SHARE = 0.2
BLUR_SIGMA_PIXELS = (0.4, 1.6)
JPEG_SHARE = 0.3
JPEG_QUALITY = (30, 90)


class Draw(NamedTuple):
    """Numbers drawn from [0, 1) for each image, which decide its augmentation."""

    flip: float
    angle: float
    auto_contrast: float
    area: float
    x: float
    y: float
    contrast: float
    brightness: float
    grey: float
    blur: float
    blur_sigma: float
    jpeg: float
    jpeg_quality: float


_WORDS_PER_STEP = 4
_STEPS_PER_DRAW = -(-len(Draw._fields) // _WORDS_PER_STEP)


def draws(first: int, num: int, *, seed: int, epoch: int, rank: int = 0) -> npt.NDArray[np.float64]:
    """Return the random numbers of images `first` to `first + num - 1` of an epoch [N, K].

    A counter-based generator jumps to them, so any thread gets the numbers of any image.
    """
    key = np.random.SeedSequence((seed, epoch, rank)).generate_state(2, np.uint64)
    stream = np.random.Philox(key=key).advance(first * _STEPS_PER_DRAW)
    numbers_NK = np.random.Generator(stream).random((num, _STEPS_PER_DRAW * _WORDS_PER_STEP))
    return numbers_NK[:, : len(Draw._fields)]


def augmented(jpeg: npt.NDArray[np.uint8], draw: Draw, *, level: Level, crop_size: int, size: int) -> Image | None:
    """Return the crop, decoded and augmented, as RGB of `size` x `size` pixels; None if it cannot be decoded.

    `crop_size` is the side of the encoded crop. The decoder shrinks by a power of two, so the warp shrinks by less than
    two. At such a factor bilinear sampling still reads every pixel.
    """
    side_share = np.sqrt(1 - (1 - MIN_AREA_SHARE) * draw.area) if level == "strong" else 1.0
    reduction = next((n for n in (8, 4, 2) if crop_size * side_share >= n * size), 1)
    pixels = decode_jpeg(jpeg, reduction)
    if pixels is None:
        return None
    matrix_23 = output_to_crop(pixels.shape[:2], size, draw, side_share)
    # The border is repeated. Black corners would show the angle, and leave nothing for auto contrast to stretch.
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    image = cv2.warpAffine(pixels, matrix_23, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return _degraded(_recoloured(image, draw, level), draw) if level == "strong" else _recoloured(image, draw, level)


def output_to_crop(crop_hw: tuple[int, ...], size: int, draw: Draw, side_share: float) -> npt.NDArray[np.float64]:
    """Return the 2 x 3 matrix from pixel centres of the image to pixel centres of the crop.

    It cuts a square of `side_share` of the crop's side, placed, turned about its middle and flipped by the draw.
    """
    height, width = crop_hw
    angle = np.deg2rad(MAX_ANGLE_DEG * (2 * draw.angle - 1))
    scale_x, scale_y = width * side_share / size, height * side_share / size
    cos, sin = np.cos(angle), np.sin(angle)
    mirror = -1.0 if draw.flip < 0.5 else 1.0
    matrix = np.array([[mirror * cos * scale_x, -sin * scale_x], [mirror * sin * scale_y, cos * scale_y]])
    centre_x = width * (0.5 + (1 - side_share) * (draw.x - 0.5)) - 0.5
    centre_y = height * (0.5 + (1 - side_share) * (draw.y - 0.5)) - 0.5
    offset = np.array([centre_x, centre_y]) - matrix @ np.full(2, (size - 1) / 2)
    return np.column_stack([matrix, offset])


def _recoloured(image: Image, draw: Draw, level: Level) -> Image:
    """Apply auto contrast, and for `strong` contrast and brightness, through one table of 256 values a channel."""
    stretch = draw.auto_contrast < AUTO_CONTRAST_SHARE
    if level == "original":
        return cv2.LUT(image, auto_contrast_table(image)) if stretch else image
    table = auto_contrast_table(image) if stretch else np.arange(256.0)[None, :, None]
    contrast, brightness = 1 + MAX_LIGHT_CHANGE * (2 * np.array([draw.contrast, draw.brightness]) - 1)
    table = ((table - 128.0) * contrast + 128.0) * brightness
    return cv2.LUT(image, np.broadcast_to(table.clip(0, 255), (1, 256, 3)).astype(np.uint8))


def auto_contrast_table(image: Image) -> npt.NDArray[np.uint8]:
    """Return the table [1, 256, 3] that stretches each channel to 0 … 255, as Pillow's `ImageOps.autocontrast` does."""
    table = np.empty((1, 256, 3), np.uint8)
    for channel, values in enumerate(cv2.split(image)):
        low, high, _, _ = cv2.minMaxLoc(values)
        scale = 255.0 / (high - low) if high > low else 1.0
        offset = -low * scale if high > low else 0.0
        table[0, :, channel] = (np.arange(256) * scale + offset).clip(0, 255)
    return table


def _degraded(image: Image, draw: Draw) -> Image:
    """Make some images grey, blurred, or badly compressed."""
    if draw.grey < GREY_SHARE:
        image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if draw.blur < BLUR_SHARE:
        image = cv2.GaussianBlur(image, (0, 0), _between(draw.blur_sigma, BLUR_SIGMA_PIXELS))
    if draw.jpeg < JPEG_SHARE:
        quality = round(_between(draw.jpeg_quality, JPEG_QUALITY))
        _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
        compressed = decode_jpeg(jpeg)
        assert compressed is not None, "OpenCV reads what it has written"
        return compressed
    return image


def _between(share: float, limits: tuple[float, float]) -> float:
    return limits[0] + share * (limits[1] - limits[0])


@dataclass(frozen=True, kw_only=True)
class Making:
    """How images are made from crops."""

    level: Level
    crop_size: int
    """Side of the encoded crops in pixels."""
    size: int
    """Side of the images for the model, in pixels."""

    def fill(
        self,
        images_NHWC: Image,
        crops: Crops,
        rows_N: npt.NDArray[np.integer],
        draws_NK: npt.NDArray[np.float64] | None,
    ) -> npt.NDArray[np.bool_]:
        """Write the images of some rows; return which crops cannot be decoded [N]. Their images are black.

        The draws are None for the level `none`.
        """
        failed_N = np.zeros(len(rows_N), bool)
        for place, row in enumerate(rows_N.tolist()):
            jpeg = crops.crop_bytes(row)
            if draws_NK is None:
                image = plain(jpeg, self.size)
            else:
                draw = Draw(*draws_NK[place].tolist())
                image = augmented(jpeg, draw, level=self.level, crop_size=self.crop_size, size=self.size)
            failed_N[place] = image is None
            images_NHWC[place] = 0 if image is None else image
        return failed_N
