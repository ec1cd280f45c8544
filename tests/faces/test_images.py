import io
import resource
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

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
    "GIF": lambda: encoded(SMALL, "GIF"),
    "first picture of a moving GIF": lambda: encoded(
        SMALL, "GIF", save_all=True, append_images=[SMALL.rotate(180), SMALL.rotate(90)]
    ),
    "TIFF": lambda: encoded(SMALL, "TIFF"),
    "compressed TIFF": lambda: encoded(SMALL, "TIFF", compression="tiff_lzw"),
    "AVIF": lambda: encoded(SMALL, "AVIF", quality=95),
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


def test_a_picture_with_an_absurd_side_is_refused() -> None:
    assert status_of(png_of_size(1_100_000, 1, b"\0" + bytes([10, 20, 30]) * 1_100_000)) == table.TOO_LARGE
    wide = png_of_size(65_535, 1, b"\0" + bytes([10, 20, 30]) * 65_535)
    assert np.array_equal(Photo(wide, max_pixels=MAX_PIXELS).pixels()[0, [0, -1]], [[30, 20, 10]] * 2)


# How the pixels of an upright picture are stored under each orientation (EXIF 2.32, section 4.6.4).
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda up: up,
    2: lambda up: up[:, ::-1],
    3: lambda up: up[::-1, ::-1],
    4: lambda up: up[::-1],
    5: lambda up: up.swapaxes(0, 1),
    6: lambda up: np.rot90(up, 1),
    7: lambda up: np.rot90(up, 2).swapaxes(0, 1),
    8: lambda up: np.rot90(up, -1),
}


def tiff_block(orientation: int, kind: int, endian: str) -> bytes:
    """Return a TIFF structure of one tag, a short (kind 3) or a long (kind 4) as some phones write it."""
    head = b"II*\0" if endian == "<" else b"MM\0*"
    value = struct.pack(endian + ("H2x" if kind == 3 else "I"), orientation)
    return head + struct.pack(endian + "IHHHI", 8, 1, ORIENTATION, kind, 1) + value + bytes(4)


def xmp(orientation: int, *, as_element: bool = False) -> bytes:
    tag = f'tiff:Orientation="{orientation}"'
    body = f"><tiff:Orientation>{orientation}</tiff:Orientation></rdf:Description>" if as_element else f" {tag}/>"
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description{body}</x:xmpmeta>'.encode()


def with_app1(jpeg: bytes, body: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def with_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return png[:33] + chunk + png[33:]


def raw_profile(name: bytes, blob: bytes) -> bytes:
    """Return a text chunk that holds a profile as ImageMagick writes it."""
    text = f"\n{name.decode()}\n{len(blob):8d}\n{blob.hex()}\n".encode()
    return b"Raw profile type " + name + b"\0\0" + zlib.compress(text)


def stored(orientation: int) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(SMALL))))


CARRIERS: dict[str, Callable[[int], bytes]] = {
    "EXIF of a JPEG": lambda o: with_app1(jpeg(o), b"Exif\0\0" + tiff_block(o, 3, "<")),
    "long EXIF of a JPEG": lambda o: with_app1(jpeg(o), b"Exif\0\0" + tiff_block(o, 4, ">")),
    "XMP of a JPEG": lambda o: with_app1(jpeg(o), b"http://ns.adobe.com/xap/1.0/\0" + xmp(o)),
    "XMP element of a JPEG": lambda o: with_app1(jpeg(o), b"http://ns.adobe.com/xap/1.0/\0" + xmp(o, as_element=True)),
    "XMP of a JPEG with a tail": lambda o: CARRIERS["XMP of a JPEG"](o) + b"tail" * 100,
    "EXIF of a WebP": lambda o: encoded(stored(o), "WEBP", quality=95, exif=exif(o)),
    "XMP of a WebP": lambda o: encoded(stored(o), "WEBP", quality=95, xmp=xmp(o)),
    "EXIF of a PNG": lambda o: with_chunk(encoded(stored(o), "PNG"), b"eXIf", tiff_block(o, 3, "<")),
    "raw EXIF profile of a PNG": lambda o: with_chunk(
        encoded(stored(o), "PNG"), b"zTXt", raw_profile(b"exif", b"Exif\0\0" + tiff_block(o, 3, "<"))
    ),
    "raw APP1 profile of a PNG": lambda o: with_chunk(
        encoded(stored(o), "PNG"), b"zTXt", raw_profile(b"APP1", b"Exif\0\0" + tiff_block(o, 3, "<"))
    ),
    "XMP of a PNG": lambda o: with_chunk(encoded(stored(o), "PNG"), b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(o)),
    "EXIF of a PNG with a tail": lambda o: CARRIERS["EXIF of a PNG"](o) + b"camera" * 50,
    "TIFF": lambda o: encoded(stored(o), "TIFF", tiffinfo={ORIENTATION: o}),
    "EXIF of an AVIF": lambda o: encoded(stored(o), "AVIF", quality=95, exif=exif(o)),
}


def jpeg(orientation: int) -> bytes:
    return encoded(stored(orientation), "JPEG", quality=95)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_photo_is_upright_wherever_its_orientation_stands_and_whoever_decodes_it(
    carrier: str, orientation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = CARRIERS[carrier](orientation)
    wanted = np.asarray(SMALL).astype(int)

    def upright() -> np.ndarray:
        photo = Photo(data, max_pixels=MAX_PIXELS)
        assert (photo.width, photo.height) == SMALL.size
        return photo.pixels()[:, :, ::-1]

    assert np.abs(upright() - wanted).mean() < 3
    monkeypatch.setattr("lib.faces.images._decode_with_opencv", lambda *_: None)
    assert np.abs(upright() - wanted).mean() < 3


def test_exif_goes_before_xmp() -> None:
    both = with_app1(CARRIERS["EXIF of a JPEG"](6), b"http://ns.adobe.com/xap/1.0/\0" + xmp(3))
    assert np.abs(Photo(both, max_pixels=MAX_PIXELS).pixels()[:, :, ::-1] - np.asarray(SMALL).astype(int)).mean() < 3


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


def test_what_a_file_declares_allocates_nothing() -> None:
    """Each in a process of its own: the peak of this one is higher already."""
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBBI", 13, b"IHDR", 8, 8, 8, 2, 0, 0, 0, 0)
    bombs = [
        header + struct.pack(">I4s", 2**31 - 1, b"IDAT"),
        header + struct.pack(">I4s", 2**31 - 1, b"zTXt") + b"x" * 50,
        png_of_size(1, 99_999_999),
        png_of_size(10_000, 10_000),
    ]
    program = (
        "import resource, sys\n"
        "from lib.faces.images import BadPhotoError, Photo\n"
        "data = sys.stdin.buffer.read()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    Photo(data, max_pixels=10**8).pixels()\n"
        "except BadPhotoError as bad:\n"
        "    print(bad.status)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    root = Path(__file__).parents[2]
    for data, status in zip(bombs, ["corrupt", "corrupt", "too_large", "too_large"], strict=True):
        done = subprocess.run([sys.executable, "-c", program], input=data, cwd=root, capture_output=True, check=True)
        said, kilobytes = done.stdout.decode().split()
        assert (said, int(kilobytes) < 300_000) == (status, True)


def test_a_large_jpeg_is_read_at_a_reduced_scale() -> None:
    data = encoded(Image.new("RGB", (9000, 8000), (10, 100, 200)), "JPEG")
    photo = Photo(data, max_pixels=MAX_PIXELS)
    assert (photo.width, photo.height, photo.finest) == (9000, 8000, 2)
    assert photo.pixels(photo.finest).shape == (4000, 4500, 3)
    assert photo.pixels(8).shape == (1000, 1125, 3)


def test_a_jpeg_of_thousands_of_scans_is_refused() -> None:
    data = encoded(SMALL, "JPEG", progressive=True)
    place = data.index(b"\xff\xda")
    end = data.index(b"\xff", place + 2)
    bomb = data[:place] + data[place:end] * 2000 + data[place:]
    with pytest.raises(BadPhotoError, match="scans"):
        Photo(bomb, max_pixels=MAX_PIXELS)


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
