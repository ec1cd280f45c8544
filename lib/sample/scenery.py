"""One sample photo around its people: background, light, camera, file format, and files broken on purpose.

Shape suffixes: H rows, W columns, F faces, 5 landmarks, 2 coordinates (x y).
"""

import struct
from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np

from lib.sample.drawing import BLACK, WHITE, Colour, colour, mix
from lib.sample.people import Moment, Person
from lib.sample.portrait import draw_person

WALLS = tuple(map(colour, ("c9bfae", "8a9a8b", "6f8191", "b88a78", "40464f", "d8d3c8", "7b6a86", "a3b4bd", "5e4b3c")))

_COARSE = 8
"""Backgrounds and light are drawn at this reduction, because they are out of focus."""


def photo_size(rng: np.random.Generator) -> tuple[int, int]:
    """Return width and height: 250 to 640 pixels, one in forty 1.6 to 2.4 times that."""
    width, ratio = rng.uniform(250, 560), rng.uniform(0.85, 1.3)
    enlarged = rng.uniform(1.6, 2.4) if rng.random() < 0.025 else 1.0
    return round(width * enlarged), round(min(width * ratio, 640) * enlarged)


def take_photo(
    people: list[tuple[Person, Moment]], width: int, height: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return a photo [H, W, 3] uint8 BGR and the landmarks [F, 5, 2] of its people, the most prominent first.

    The others are smaller, beside and behind that one.
    """
    places = _places(len(people), width, height, rng)
    picture, mask = _background(width, height, rng), np.zeros((height, width), np.uint8)
    landmarks_F52 = [
        draw_person(picture, mask, person, moment, eyes_2, unit)
        for (person, moment), (eyes_2, unit) in zip(reversed(people), reversed(places), strict=True)
    ]
    if people:
        _light_people(picture, mask, *places[0], rng)
    return _develop(picture, rng), np.array(landmarks_F52[::-1]).reshape(-1, 5, 2)


def _places(num_people: int, width: int, height: int, rng: np.random.Generator) -> list[tuple[np.ndarray, float]]:
    """Return for each of up to two people the point between the eyes and the length of a face unit, in pixels."""
    size, y = min(width, height) * rng.uniform(0.13, 0.21), height * rng.uniform(0.4, 0.52)
    if num_people == 2:
        side, size = rng.choice((-1, 1)), min(size, width * 0.115)
        near, far = width * (0.5 - side * 0.12), width * (0.5 + side * 0.33)
        return [(np.array([near, y]), size), (np.array([far, y * rng.uniform(0.85, 1.0)]), size * 0.62)]
    return [(np.array([width * rng.uniform(0.42, 0.58), y]), size)][:num_people]


def _background(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Return an out-of-focus wall with a few things in front of it, [H, W, 3] uint8."""
    rows, columns = -(-height // _COARSE), -(-width // _COARSE)
    first, second, third = (_any_colour(rng) for _ in range(3))
    slope = np.linspace(0, 1, rows)[:, None, None] * rng.uniform(0.3, 1) + np.linspace(0, 0.6, columns)[None, :, None]
    coarse = (np.array(first) + np.clip(slope, 0, 1) * (np.array(second) - np.array(first))).astype(np.uint8)
    kind = rng.integers(4)
    for _ in range(rng.integers(3, 9)):
        x, y, reach = int(rng.integers(columns)), int(rng.integers(rows)), int(rng.integers(2, 2 + columns // 4))
        ink = mix(mix(third, WHITE if rng.random() < 0.5 else BLACK, rng.uniform(0, 0.5)), first, 0.4)
        if kind == 0:
            cv2.circle(coarse, (x, y), reach, ink, -1, cv2.LINE_AA)
        elif kind == 1:
            cv2.rectangle(coarse, (x, 0), (x + reach, rows), ink, -1)
        elif kind == 2:
            cv2.rectangle(coarse, (x, y), (x + reach, y + 2 * reach), ink, -1)
    coarse = cv2.GaussianBlur(coarse, (0, 0), rng.uniform(0.4, 2.0))
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def _any_colour(rng: np.random.Generator) -> Colour:
    return mix(WALLS[rng.integers(len(WALLS))], BLACK, rng.uniform(0, 0.4))


def _light_people(
    picture: np.ndarray, mask: np.ndarray, eyes_2: np.ndarray, size: float, rng: np.random.Generator
) -> None:
    """Light the people from one side, with light of one colour and shadows of another."""
    height, width = mask.shape
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.45)
    x_1W = (np.arange(0, width, _COARSE) - eyes_2[0])[None, :] / (1.3 * size)
    y_H1 = (np.arange(0, height, _COARSE) - eyes_2[1] - 0.5 * size)[:, None] / (1.3 * size)
    side_HW = np.tanh(np.cos(angle) * x_1W + 0.6 * np.sin(angle) * y_H1)
    tint_3 = strength + rng.uniform(-0.07, 0.07, 3)
    light = cv2.convertScaleAbs(1 + side_HW[..., None] * tint_3, alpha=128)
    light = cv2.resize(light, (width, height), interpolation=cv2.INTER_LINEAR)
    cv2.copyTo(cv2.multiply(picture, light, scale=1 / 128), mask, picture)


def _develop(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the picture after lens and film: blur, exposure, contrast, colour cast, noise."""
    # A lens is never as sharp as a drawn edge.
    picture = cv2.GaussianBlur(picture, (0, 0), max(1.0, rng.uniform(-0.002, 0.0035) * max(picture.shape)))
    exposure, gamma = rng.uniform(0.68, 1.25), rng.uniform(0.82, 1.22)
    cast_3 = exposure * (1 + rng.uniform(-0.15, 0.15, 3))
    values_V3 = 255 * (np.linspace(0, 1, 256)[:, None] ** gamma * cast_3)
    picture = cv2.LUT(picture, np.clip(values_V3, 0, 255).astype(np.uint8)[None])
    height, width = picture.shape[:2]
    grain = _grain(-(-max(height, width) // _GRAIN_STEP) * _GRAIN_STEP + _GRAIN_STEP)
    y, x = rng.integers(0, _GRAIN_STEP, 2)
    strength = rng.uniform(0.0, 0.1)
    return cv2.addWeighted(picture, 1.0, grain[y : y + height, x : x + width], strength, -128 * strength)


_GRAIN_STEP = 512


@lru_cache(maxsize=4)
def _grain(side: int) -> np.ndarray:
    """Return grey noise around 128, [side, side, 3] uint8, tiled from one square."""
    tile = np.random.default_rng(0).normal(128, 40, (_GRAIN_STEP, _GRAIN_STEP, 3)).clip(0, 255).astype(np.uint8)
    return np.tile(tile, (side // _GRAIN_STEP, side // _GRAIN_STEP, 1))


def _jpeg(picture: np.ndarray, rng: np.random.Generator, *options: int) -> bytes:
    quality = int(rng.integers(60, 96))
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality, *options])[1].tobytes()


def _progressive(picture: np.ndarray, rng: np.random.Generator) -> bytes:
    return _jpeg(picture, rng, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)


def _greyscale(picture: np.ndarray, rng: np.random.Generator) -> bytes:
    return _jpeg(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY), rng)


def _exif_rotated(picture: np.ndarray, rng: np.random.Generator) -> bytes:
    """Return a JPEG stored on its side, which its EXIF orientation (6: turn clockwise) makes upright."""
    lying = _jpeg(cv2.rotate(picture, cv2.ROTATE_90_COUNTERCLOCKWISE), rng)
    directory = struct.pack("<HHHIII", 1, 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0" + b"II*\0" + struct.pack("<I", 8) + directory
    return lying[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + lying[2:]


def _png(picture: np.ndarray, _: np.random.Generator) -> bytes:
    return cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def _webp(picture: np.ndarray, rng: np.random.Generator) -> bytes:
    return cv2.imencode(".webp", picture, [cv2.IMWRITE_WEBP_QUALITY, int(rng.integers(60, 90))])[1].tobytes()


def _truncated(picture: np.ndarray, rng: np.random.Generator) -> bytes:
    whole = _jpeg(picture, rng)
    return whole[: len(whole) // 3]


def _text(_picture: np.ndarray, _rng: np.random.Generator) -> bytes:
    return b"This is a text file that somebody called .jpg.\n"


def _nothing(_picture: np.ndarray, _rng: np.random.Generator) -> bytes:
    return b""


Encode = Callable[[np.ndarray, np.random.Generator], bytes]

ENCODINGS: dict[str, Encode] = {
    "jpeg": _jpeg,
    "progressive": _progressive,
    "greyscale": _greyscale,
    "exif": _exif_rotated,
    "png": _png,
    "webp": _webp,
    "truncated": _truncated,
    "text": _text,
    "nothing": _nothing,
}
"""Encoders of a photo; the last three make a broken file."""
