import io
import resource
import struct
import time
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from lib.faces import table
from lib.faces.images import REDUCTIONS, BadPhotoError, Photo, reduction_for, to_jpeg

MAX_PIXELS = 100_000_000
ORIENTATION = 0x0112


def gradient(width: int, height: int) -> Image.Image:
    """Return a smooth picture without symmetry: lossy formats keep it, and a wrong orientation shows."""
    across, down = np.linspace(0, 200, width), np.linspace(0, 120, height)[:, None]
    red = np.broadcast_to(across, (height, width))
    blue = np.broadcast_to(down, (height, width))
    return Image.fromarray(np.stack([red, (red + blue) / 2, 255 - blue], axis=-1).astype(np.uint8))


def encoded(picture: Image.Image, picture_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, picture_format, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def upright_rgb(data: bytes) -> np.ndarray:
    """Return what Pillow alone makes of a photo."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def png_of_size(width: int, height: int, rows: bytes = b"") -> bytes:
    """Return a PNG that claims a size, whatever its rows hold."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def status_of(data: bytes, max_pixels: int = MAX_PIXELS) -> str:
    with pytest.raises(BadPhotoError) as refused:
        Photo(data, max_pixels=max_pixels).pixels()
    return refused.value.status


SMALL = gradient(80, 60)
READABLE: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: encoded(SMALL, "JPEG", quality=95),
    "progressive JPEG": lambda: encoded(SMALL, "JPEG", quality=95, progressive=True),
    "JPEG without subsampling": lambda: encoded(SMALL, "JPEG", quality=95, subsampling=0),
    "greyscale JPEG": lambda: encoded(SMALL.convert("L"), "JPEG", quality=95),
    "CMYK JPEG": lambda: encoded(SMALL.convert("CMYK"), "JPEG", quality=95),
    "several pictures in one JPEG": lambda: encoded(
        SMALL, "MPO", quality=95, save_all=True, append_images=[SMALL.rotate(180)]
    ),
    "JPEG with a tail": lambda: encoded(SMALL, "JPEG", quality=95) + b"left by a phone" * 1000,
    "PNG": lambda: encoded(SMALL, "PNG"),
    "PNG with alpha": lambda: encoded(SMALL.convert("RGBA"), "PNG"),
    "PNG with a palette": lambda: encoded(SMALL.convert("P"), "PNG"),
    "greyscale PNG": lambda: encoded(SMALL.convert("L"), "PNG"),
    "greyscale PNG with alpha": lambda: encoded(SMALL.convert("LA"), "PNG"),
    "black and white PNG": lambda: encoded(SMALL.convert("1"), "PNG"),
    "WebP": lambda: encoded(SMALL, "WEBP", quality=95),
    "lossless WebP": lambda: encoded(SMALL, "WEBP", lossless=True),
    "WebP with alpha": lambda: encoded(SMALL.convert("RGBA"), "WEBP", lossless=True),
    "BMP": lambda: encoded(SMALL, "BMP"),
    "BMP with a palette": lambda: encoded(SMALL.convert("P"), "BMP"),
}


@pytest.mark.parametrize("kind", READABLE)
def test_every_kind_of_file_gives_the_pixels_that_pillow_gives(kind: str) -> None:
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


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("picture_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_exif_orientation_is_applied(picture_format: str, orientation: int, reduction: int) -> None:
    data = encoded(SMALL, picture_format, exif=exif(orientation))
    photo = Photo(data, max_pixels=MAX_PIXELS)
    wanted = upright_rgb(data)
    assert (photo.height, photo.width) == wanted.shape[:2]
    reduced = cv2.resize(wanted, (-(-photo.width // reduction), -(-photo.height // reduction)), interpolation=3)
    assert np.abs(photo.pixels(reduction)[:, :, ::-1].astype(int) - reduced).mean() < 4


@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_orientation_is_applied_to_cmyk_too(orientation: int) -> None:
    data = encoded(SMALL.convert("CMYK"), "JPEG", exif=exif(orientation))
    assert np.array_equal(Photo(data, max_pixels=MAX_PIXELS).pixels()[:, :, ::-1], upright_rgb(data))


@pytest.mark.parametrize("picture_format", ["JPEG", "WEBP"])
def test_broken_exif_does_not_cost_the_photo(picture_format: str) -> None:
    data = encoded(SMALL, picture_format, exif=exif(1)).replace(b"MM\0*", b"??\0*")
    assert b"??\0*" in data
    assert Photo(data, max_pixels=MAX_PIXELS).pixels().shape == (60, 80, 3)


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


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"This is a letter, called .jpg by mistake.\n" * 40,
        encoded(SMALL, "GIF"),
        encoded(SMALL, "TIFF"),
        b"\xff\xd8\xff\xe0",
        encoded(SMALL, "JPEG")[:2] + b"\xff\xd9",
        png_of_size(0, 5),
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 0, 0, 1, 24, 0, 0, 0, 0, 0, 0),
    ],
    ids=["nothing", "a byte", "text", "GIF", "TIFF", "JPEG marker", "JPEG without a picture", "no width", "empty BMP"],
)
def test_what_is_no_photo_is_corrupt(data: bytes) -> None:
    assert status_of(data) == table.CORRUPT


@pytest.mark.parametrize("picture_format", ["JPEG", "PNG", "WEBP", "BMP"])
def test_one_pixel_is_a_photo(picture_format: str) -> None:
    photo = Photo(encoded(gradient(1, 1), picture_format), max_pixels=MAX_PIXELS)
    assert [photo.pixels(reduction).shape for reduction in REDUCTIONS] == [(1, 1, 3)] * len(REDUCTIONS)


def test_a_huge_picture_is_refused_before_it_is_decoded() -> None:
    # 30,000 x 30,000 would take 2.7 GB, 12,000 x 12,000 half a gigabyte.
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    assert status_of(png_of_size(30_000, 30_000)) == table.TOO_LARGE
    assert status_of(png_of_size(12_000, 12_000, bytes(36_001 * 2_000))) == table.TOO_LARGE
    assert time.process_time() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 200_000


@pytest.mark.parametrize("picture_format", ["JPEG", "PNG", "WEBP", "BMP"])
def test_pillow_decodes_nothing_where_opencv_can(picture_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(SMALL, picture_format)

    def refuse(_: object) -> None:
        raise AssertionError("decoded by Pillow, which is slower")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    assert Photo(data, max_pixels=MAX_PIXELS).pixels().shape == (60, 80, 3)


def test_the_limit_on_pixels_counts_them_all() -> None:
    data = encoded(SMALL, "JPEG")
    assert Photo(data, max_pixels=4800).pixels().shape == (60, 80, 3)
    assert status_of(data, max_pixels=4799) == table.TOO_LARGE


def test_a_picture_longer_than_opencv_allows_is_read_all_the_same() -> None:
    data = png_of_size(1_100_000, 1, b"\0" + bytes([10, 20, 30]) * 1_100_000)
    assert np.array_equal(Photo(data, max_pixels=MAX_PIXELS).pixels()[0, [0, -1]], [[30, 20, 10]] * 2)


def test_jpeg_round_trip_keeps_bgr() -> None:
    pixels = np.full((16, 16, 3), (200, 100, 10), np.uint8)
    assert np.abs(upright_rgb(to_jpeg(pixels, 95)).astype(int) - (10, 100, 200)).max() <= 3


SEEDS = [
    *(READABLE[kind]() for kind in READABLE if kind != "JPEG with a tail"),
    *(encoded(SMALL, picture_format, exif=exif(6)) for picture_format in ("JPEG", "PNG", "WEBP")),
]


@st.composite
def damaged_photos(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 5))):
        # Headers are where readers trip.
        place = draw(st.integers(0, min(len(data), 400) if draw(st.booleans()) else len(data)))
        removed = draw(st.sampled_from([0, 1, 1, 1, 4, 64]))
        data[place : place + removed] = draw(st.binary(max_size=4))
    return bytes(data[: draw(st.integers(1, 2 * len(data) + 1))])


@settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    data=st.one_of(damaged_photos(), damaged_photos(), st.binary(max_size=300)), reduction=st.sampled_from(REDUCTIONS)
)
def test_no_bytes_whatever_raise_anything_but_bad_photo(data: bytes, reduction: int) -> None:
    try:
        photo = Photo(data, max_pixels=1_000_000)
        pixels = photo.pixels(reduction)
    except BadPhotoError:
        return
    assert pixels.shape == (-(-photo.height // reduction), -(-photo.width // reduction), 3)
