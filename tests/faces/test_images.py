import struct
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile

from lib.faces import images, table
from lib.faces.images import REDUCTIONS, BadPhotoError, Photo, reduction_for, to_jpeg
from tests.faces.pictures import (
    MAX_PIXELS,
    READABLE,
    SMALL,
    VIDEO,
    encoded,
    gradient,
    png_of_size,
    status_of,
    upright_rgb,
    with_app1,
)


@pytest.mark.parametrize("kind", READABLE)
def test_every_kind_of_file_gives_the_pixels_that_pillow_gives(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("images", "photo_decoders"):  # in several bands, as a large photo
        monkeypatch.setattr(f"lib.faces.{module}.BAND_PIXELS", 600)
    data = READABLE[kind]()
    photo = Photo(data, max_pixels=MAX_PIXELS)
    pixels = photo.pixels()
    assert (photo.width, photo.height) == SMALL.size
    assert pixels.dtype == np.uint8
    # JPEG and WebP decoders may differ in the last bits of their colour conversion.
    assert np.abs(pixels[:, :, ::-1].astype(int) - upright_rgb(data)).max() <= 4


@pytest.mark.parametrize("colour", ["grey", "RGB"])
def test_sixteen_bits_become_the_upper_eight(colour: str) -> None:
    deep = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    if colour == "RGB":
        deep = np.dstack([deep, deep.T, deep[::-1]])
    data = cv2.imencode(".png", deep)[1].tobytes()
    wanted = (deep if colour == "RGB" else np.dstack([deep] * 3)) / 257
    assert np.abs(Photo(data, max_pixels=MAX_PIXELS).pixels() - wanted).max() <= 1


@pytest.mark.parametrize("size", [(99, 133), (100, 100), (641, 481), (1024, 683), (5616, 3744)])
@pytest.mark.parametrize("picture_format", ["JPEG", "PNG"])
def test_a_reduced_photo_shows_each_point_in_its_place(size: tuple[int, int], picture_format: str) -> None:
    width, height = size
    picture = np.full((height, width, 3), 30, np.uint8)
    x, y, radius = 0.62 * width, 0.37 * height, 0.11 * min(size)
    cv2.circle(picture, (round(x * 16), round(y * 16)), round(radius * 16), (220, 220, 220), -1, cv2.LINE_AA, shift=4)
    data = encoded(Image.fromarray(picture), picture_format, compress_level=1)
    for reduction in REDUCTIONS:
        photo = Photo(data, max_pixels=MAX_PIXELS)
        pixels = photo.pixels(reduction)
        assert pixels.shape == (-(-height // reduction), -(-width // reduction), 3)
        disc = cv2.moments(cv2.subtract(np.ascontiguousarray(pixels[:, :, 1]), 50))
        found_x, found_y = disc["m10"] / disc["m00"], disc["m01"] / disc["m00"]
        wanted_x, wanted_y = (x + 0.5) / reduction - 0.5, (y + 0.5) / reduction - 0.5
        assert np.hypot(found_x - wanted_x, found_y - wanted_y) < 0.1


def test_a_photo_decoded_in_full_is_shrunk_rather_than_decoded_again() -> None:
    photo = Photo(encoded(gradient(203, 101), "JPEG", quality=95), max_pixels=MAX_PIXELS)
    first = photo.pixels(8)
    assert photo.pixels(8) is first
    full = photo.pixels()
    halved = photo.pixels(2)
    assert halved.shape == (51, 102, 3)
    assert np.abs(halved[:50, :101].astype(float) - full[:100, :202].reshape(50, 2, 101, 2, 3).mean((1, 3))).max() <= 1


def test_reduction_keeps_the_pixels_that_are_asked_for() -> None:
    assert [reduction_for(scale) for scale in (3.0, 1.0, 0.51, 0.5, 0.26, 0.25, 0.125, 0.01)] == [
        1,
        1,
        1,
        2,
        2,
        4,
        8,
        8,
    ]


@pytest.mark.parametrize("picture_format", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_file_that_breaks_off_is_corrupt(picture_format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (120, 90, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), picture_format)
    assert status_of(data[: int(len(data) * share)]) == table.CORRUPT


def test_a_file_of_noise_behind_its_header_is_corrupt() -> None:
    whole = encoded(SMALL, "AVIF", quality=95)
    place = whole.index(b"mdat") + 4
    assert status_of(whole[:place] + np.random.default_rng(0).bytes(len(whole) - place)) == table.CORRUPT


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"This is a letter, called .jpg by mistake.\n" * 40,
        b"\xff\xd8\xff\xe0",
        encoded(SMALL, "JPEG")[:2] + b"\xff\xd9",
        png_of_size(0, 5),
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 0, 0, 1, 24, 0, 0, 0, 0, 0, 0),
    ],
    ids=["nothing", "a byte", "text", "JPEG marker", "JPEG without a picture", "no width", "empty BMP"],
)
def test_what_is_no_photo_is_corrupt(data: bytes) -> None:
    assert status_of(data) == table.CORRUPT


@pytest.mark.parametrize("picture_format", ["JPEG", "PNG", "WEBP", "BMP"])
def test_one_pixel_is_a_photo(picture_format: str) -> None:
    photo = Photo(encoded(gradient(1, 1), picture_format), max_pixels=MAX_PIXELS)
    assert [photo.pixels(reduction).shape for reduction in REDUCTIONS] == [(1, 1, 3)] * len(REDUCTIONS)


@pytest.mark.parametrize("picture_format", ["JPEG", "PNG", "WEBP", "BMP"])
def test_pillow_decodes_nothing_where_opencv_can(picture_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(SMALL, picture_format)

    def refuse(_: object) -> None:
        raise AssertionError("decoded by Pillow, which is slower")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    assert Photo(data, max_pixels=MAX_PIXELS).pixels().shape == (60, 80, 3)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_mark_keeps_every_pixel(progressive: bool) -> None:
    whole = encoded(SMALL, "JPEG", quality=95, progressive=progressive)
    assert whole.endswith(b"\xff\xd9")
    pixels = Photo(whole[:-2], max_pixels=MAX_PIXELS).pixels()
    assert np.abs(pixels.astype(int) - Photo(whole, max_pixels=MAX_PIXELS).pixels()).max() <= 4
    assert status_of(whole[:-40]) == table.CORRUPT


@pytest.mark.parametrize("tail", [b"", b"camera" * 50])
def test_sixteen_bit_grey_is_scaled_with_or_without_bytes_after_its_end(tail: bytes) -> None:
    grey = np.asarray(SMALL.convert("L"))
    data = encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG") + tail
    assert np.array_equal(Photo(data, max_pixels=MAX_PIXELS).pixels(), np.dstack([grey] * 3))


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\0\0\0\x18ftypisom", "video"),
        (b"%PDF-1.7", "PDF"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"", "empty"),
    ],
)
def test_a_format_that_is_not_read_is_named(start: bytes, name: str) -> None:
    data = start and start + bytes(500)
    with pytest.raises(BadPhotoError, match=name):
        Photo(data, max_pixels=MAX_PIXELS)


TAILED: dict[str, Callable[[], bytes]] = {
    "motion photo": lambda: encoded(SMALL, "JPEG", quality=95) + VIDEO,
    "two pictures": lambda: encoded(SMALL, "JPEG", quality=95) + encoded(SMALL.rotate(180), "JPEG", progressive=True),
    "cut second picture": lambda: encoded(SMALL, "JPEG", quality=95) + encoded(SMALL, "JPEG")[:-100],
    "zeros": lambda: encoded(SMALL, "JPEG", quality=95) + bytes(5000),
    "progressive motion photo": lambda: encoded(SMALL, "JPEG", quality=95, progressive=True) + VIDEO,
    "thumbnail of many scans": lambda: with_app1(encoded(SMALL, "JPEG", quality=95), b"Exif\0\0" + VIDEO),
    "PNG and text": lambda: encoded(SMALL, "PNG") + b"left by a program" * 100,
}


@pytest.mark.parametrize("kind", TAILED)
def test_what_lies_around_a_picture_does_not_matter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise AssertionError("decoded by Pillow, which takes no large photos")

    data = TAILED[kind]()
    wanted = upright_rgb(data)
    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    assert np.abs(Photo(data, max_pixels=MAX_PIXELS).pixels()[:, :, ::-1].astype(int) - wanted).max() <= 4


@pytest.mark.parametrize("progressive", [False, True])
def test_what_follows_does_not_make_a_cut_picture_whole(progressive: bool) -> None:
    whole = encoded(SMALL, "JPEG", quality=95, progressive=progressive)
    for tail in (whole, bytes(20_000), bytes(20_000) + whole):
        assert status_of(whole[:-40] + tail) == table.CORRUPT
    assert Photo(whole[:-2] + bytes(500), max_pixels=MAX_PIXELS).pixels().shape == (60, 80, 3)


def test_a_slow_jpeg_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = images.decode_with_opencv
    monkeypatch.setattr(images, "decode_with_opencv", lambda *given: decoded.append(given[1]) or decode(*given))
    data = encoded(gradient(203, 101), "JPEG", quality=95, progressive=True)
    never = {"SLOW_SAMPLES": 10**9, "SLOW_BYTES": len(data)}
    for limits, wanted in (
        (never, [8, 4, 1]),
        (never | {"SLOW_SAMPLES": 100}, [1]),
        (never | {"SLOW_BYTES": 100}, [1]),
    ):
        for name, limit in limits.items():
            monkeypatch.setattr(images, name, limit)
        decoded.clear()
        photo = Photo(data + VIDEO, max_pixels=MAX_PIXELS)
        assert [photo.pixels(n).shape[:2] for n in (8, 4, 1)] == [(13, 26), (26, 51), (101, 203)]
        assert decoded == wanted


def test_jpeg_round_trip_keeps_bgr() -> None:
    pixels = np.full((16, 16, 3), (200, 100, 10), np.uint8)
    assert np.abs(upright_rgb(to_jpeg(pixels, 95)).astype(int) - (10, 100, 200)).max() <= 3
