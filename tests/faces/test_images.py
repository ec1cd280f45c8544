import io
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

from lib.faces import images, table
from lib.faces.images import REDUCTIONS, BadPhotoError, Photo, reduction_for, to_jpeg
from lib.faces.photo_structure import read_structure

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


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of_size(width: int, height: int, rows: bytes = b"") -> bytes:
    """Return a PNG that claims a size, whatever its rows hold."""
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


MAX_MEGABYTES = 320
"""Memory that decoding may take: 300 MB of pixels and what the decoders need beside them."""

MEASURE = """
import io, os, struct, sys
from PIL import Image
from lib.faces.images import BadPhotoError, Photo

Image.init()
stream = io.BytesIO(sys.stdin.buffer.read())
while head := stream.read(8):
    data = stream.read(struct.unpack(">Q", head)[0])
    kilobytes_before = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024
    child = os.fork()
    if not child:
        try:
            photo = Photo(data, max_pixels=10**8)
            said = f"1/{photo.finest} of {photo.width}x{photo.height}"
            photo.pixels(photo.finest)
        except BadPhotoError as bad:
            said = bad.status
        print(said, end="\\t", flush=True)
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    print(status, usage.ru_maxrss - kilobytes_before, sep="\\t", flush=True)
"""


def measured(photos: list[bytes]) -> list[tuple[str, float]]:
    """Return what becomes of each photo, and the megabytes that it took.

    Each is read in a process of its own, the child of a small one: a process has the peak of the one that started it.
    """
    stream = b"".join(struct.pack(">Q", len(data)) + data for data in photos)
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", MEASURE], input=stream, cwd=root, capture_output=True, check=True)
    lines = [line.split("\t") for line in done.stdout.decode().splitlines()]
    assert [status for _, status, _ in lines] == ["0"] * len(photos)
    return [(said, int(kilobytes) * 1024 / 1e6) for said, _, kilobytes in lines]


def flat(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (10, 100, 200))


def test_what_a_file_declares_allocates_nothing() -> None:
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBBI", 13, b"IHDR", 8, 8, 8, 2, 0, 0, 0, 0)
    bombs = {
        header + struct.pack(">I4s", 2**31 - 1, b"IDAT"): table.CORRUPT,
        header + struct.pack(">I4s", 2**31 - 1, b"zTXt") + b"x" * 50: table.CORRUPT,
        png_of_size(1, 99_999_999): table.TOO_LARGE,
        png_of_size(10_000, 10_000): table.TOO_LARGE,
        png_of_size(30_000, 30_000): table.TOO_LARGE,
        png_of_size(12_000, 12_000, bytes(36_001 * 2_000)): table.TOO_LARGE,
        claiming(encoded(SMALL, "JPEG", progressive=True, subsampling=0), 10_000, 9_999): table.TOO_LARGE,
        with_chunk(encoded(SMALL, "PNG"), b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000))): table.CORRUPT,
    }
    for (said, megabytes), status in zip(measured(list(bombs)), bombs.values(), strict=True):
        assert (said, megabytes < 30) == (status, True)


def test_the_largest_photos_are_decoded_in_bounded_memory() -> None:
    photos = {
        claiming(encoded(SMALL, "JPEG", exif=exif(7)), 8190, 6103): "1/1 of 6103x8190",
        claiming(encoded(SMALL, "JPEG", progressive=True), 8190, 6103): "1/2 of 8190x6103",
        encoded(flat(6000, 4000), "JPEG", exif=exif(6))[:-2]: "1/1 of 4000x6000",
        encoded(flat(6000, 4000).convert("CMYK"), "JPEG", progressive=True): "1/1 of 6000x4000",
        encoded(flat(380, 65_000), "TIFF", compression="tiff_lzw", tiffinfo={ORIENTATION: 6}): "1/1 of 65000x380",
        encoded(flat(6000, 4000), "PNG", compress_level=1, save_all=True, append_images=[SMALL]): "1/1 of 6000x4000",
    }
    for (said, megabytes), wanted in zip(measured(list(photos)), photos.values(), strict=True):
        assert (said, megabytes < MAX_MEGABYTES) == (wanted, True)


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
    return png[:33] + chunk(kind, body) + png[33:]


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
    monkeypatch.setattr("lib.faces.images.decode_with_opencv", lambda *_: None)
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


def test_a_large_jpeg_is_read_at_a_reduced_scale() -> None:
    data = encoded(Image.new("RGB", (9000, 8000), (10, 100, 200)), "JPEG")
    photo = Photo(data, max_pixels=MAX_PIXELS)
    assert (photo.width, photo.height, photo.finest) == (9000, 8000, 2)
    assert photo.pixels(photo.finest).shape == (4000, 4500, 3)
    assert photo.pixels(8).shape == (1000, 1125, 3)


def claiming(jpeg: bytes, width: int, height: int) -> bytes:
    """Return a JPEG whose header claims a size."""
    place = max(jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xc2"))
    return jpeg[: place + 5] + struct.pack(">HH", height, width) + jpeg[place + 9 :]


@pytest.mark.parametrize(
    ("picture_format", "options", "size", "finest"),
    [
        ("JPEG", {}, (8190, 6103), 1),
        ("JPEG", {}, (10_000, 10_000), 2),
        ("JPEG", {"progressive": True}, (6000, 4000), 1),
        ("JPEG", {"progressive": True, "subsampling": 0}, (6000, 4000), 1),
        ("JPEG", {"progressive": True}, (8190, 6103), 2),
        ("JPEG", {"progressive": True, "subsampling": 0}, (7000, 6900), 4),
        ("JPEG", {"progressive": True, "subsampling": 0}, (8190, 6103), None),
        ("JPEG", {"progressive": True}, (10_000, 10_000), None),
    ],
)
def test_a_large_jpeg_is_read_at_the_scale_that_memory_allows(
    picture_format: str, options: dict[str, object], size: tuple[int, int], finest: int | None
) -> None:
    data = claiming(encoded(SMALL, picture_format, **options), *size)
    if finest:
        assert Photo(data, max_pixels=MAX_PIXELS).finest == finest
        return
    with pytest.raises(BadPhotoError, match=r"as progressive JPEG takes \d+ MB to decode, over 300: save it") as bad:
        Photo(data, max_pixels=MAX_PIXELS)
    assert bad.value.status == table.TOO_LARGE


def with_scans(data: bytes, number: int) -> bytes:
    """Return a progressive JPEG whose first scan comes so many times more."""
    place = data.index(b"\xff\xda")
    end = data.index(b"\xff", place + 2)
    return data[:place] + data[place:end] * number + data[place:]


def test_a_jpeg_of_thousands_of_scans_is_refused() -> None:
    with pytest.raises(BadPhotoError, match="a JPEG of 2010 scans"):
        Photo(with_scans(encoded(SMALL, "JPEG", progressive=True), 2000), max_pixels=MAX_PIXELS)
    some = claiming(with_scans(encoded(SMALL, "JPEG", progressive=True), 80), 6000, 4000)
    with pytest.raises(BadPhotoError, match="samples in 90 scans") as bad:
        Photo(some, max_pixels=MAX_PIXELS)
    assert bad.value.status == table.TOO_LARGE


# What phones, cameras and other programs put behind a picture, or into its header.
VIDEO = (
    b"\0\0\0\x18ftypmp42" + np.random.default_rng(1).bytes(20_000).replace(b"\xff\xd9", b"\xff\xda") + b"\xff\xda" * 500
)
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


def test_a_long_file_is_looked_through_at_once() -> None:
    pixels = np.random.default_rng(0).bytes(20_000_000).replace(b"\xff", b"\xff\0")
    whole = encoded(SMALL, "JPEG", quality=95)
    comments = whole[:2] + b"\xff\xfe\0\2" * 2_000_000 + whole[2:]
    chunks = encoded(SMALL, "PNG")[:33] + chunk(b"teSt", b"") * 2_000_000
    started = time.process_time()
    assert read_structure(whole[:-2] + pixels + whole[-2:]).is_whole
    junk = (whole[:4] + bytes(200_000), whole[:2] + b"\xff" * 200_000, whole[:2] + b"\xff\xd0" * 100_000)
    for data in (comments, chunks, *junk):
        with pytest.raises(BadPhotoError, match="too long to read"):
            Photo(data, max_pixels=MAX_PIXELS)
    assert time.process_time() - started < 1.5


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


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_png_that_unpacks_to_too_much_says_so(kind: bytes) -> None:
    body = b"a\0" + (b"\1\0\0\0" if kind == b"iTXt" else b"\0") + zlib.compress(bytes(5_000_000))
    with pytest.raises(BadPhotoError, match="a text or colour profile in the PNG unpacks") as bad:
        Photo(with_chunk(encoded(SMALL, "PNG"), kind, body), max_pixels=MAX_PIXELS)
    assert bad.value.status == table.CORRUPT


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
