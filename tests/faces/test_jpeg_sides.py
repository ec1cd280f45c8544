"""The side of a JPEG by its header: many at once as one alone."""

import random

import cv2
import numpy as np
import pytest

from lib.faces.jpeg_sides import LARGEST, jpeg_side, jpeg_sides


def picture(width: int, height: int, *options: int, channels: int = 3) -> bytes:
    shape = (height, width, channels) if channels > 1 else (height, width)
    pixels = np.random.default_rng(width).integers(0, 255, shape, np.uint8)
    return cv2.imencode(".jpg", cv2.GaussianBlur(pixels, (0, 0), 2), options)[1].tobytes()


def sides(pictures: list[bytes]) -> list[int | None]:
    """Return the side of each by `jpeg_sides`, with other bytes between them."""
    data, starts, stops = bytearray(), [], []
    for number, each in enumerate(pictures):
        data += bytes(number % 5)
        starts.append(len(data))
        data += each
        stops.append(len(data))
    found = jpeg_sides(np.frombuffer(data + b"\xff", np.uint8), np.array(starts, np.int64), np.array(stops, np.int64))
    return [int(side) or None for side in found]


def test_many_headers_give_what_each_gives_alone() -> None:
    whole = [
        picture(112, 112),
        picture(112, 80),
        picture(240, 240, cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
        picture(64, 64, channels=1),
        picture(112, 112, cv2.IMWRITE_JPEG_OPTIMIZE, 1),
    ]
    assert sides(whole) == [112, None, 240, None, 112]
    draw = random.Random(5)
    damaged = []
    for _ in range(1000):
        data = bytearray(draw.choice(whole))
        for _ in range(draw.randint(0, 3)):
            data[draw.randrange(min(700, len(data)))] = draw.randrange(256)
        damaged.append(bytes(data[: draw.randint(0, len(data))] if draw.random() < 0.2 else data))
    damaged += [each[:cut] for each in whole for cut in range(30)] + [
        each[:cut] + b"\xff\xd9" for each in whole for cut in range(30)
    ]
    assert sides(damaged) == [jpeg_side(each) for each in damaged]


@pytest.mark.parametrize("num_bytes", [LARGEST, LARGEST + 1])
def test_a_picture_over_the_limit_has_no_side(num_bytes: int) -> None:
    data = picture(112, 112)
    padded = data[:-2] + bytes(num_bytes - len(data)) + data[-2:]
    assert sides([data, padded]) == [112, jpeg_side(padded)] == [112, 112 if num_bytes == LARGEST else None]


def test_no_pictures_have_no_sides() -> None:
    assert sides([]) == []
