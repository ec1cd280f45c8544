import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lib.faces import table
from lib.faces.images import REDUCTIONS, BadPhotoError, Photo
from lib.faces.photo_structure import read_structure
from tests.faces.pictures import (
    MAX_PIXELS,
    ORIENTATION,
    READABLE,
    SMALL,
    chunk,
    claiming,
    encoded,
    exif,
    png_of_size,
    status_of,
    with_chunk,
)

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


def test_the_limit_on_pixels_counts_them_all() -> None:
    data = encoded(SMALL, "JPEG")
    assert Photo(data, max_pixels=4800).pixels().shape == (60, 80, 3)
    assert status_of(data, max_pixels=4799) == table.TOO_LARGE


def test_a_picture_with_an_absurd_side_is_refused() -> None:
    assert status_of(png_of_size(1_100_000, 1, b"\0" + bytes([10, 20, 30]) * 1_100_000)) == table.TOO_LARGE
    wide = png_of_size(65_535, 1, b"\0" + bytes([10, 20, 30]) * 65_535)
    assert np.array_equal(Photo(wide, max_pixels=MAX_PIXELS).pixels()[0, [0, -1]], [[30, 20, 10]] * 2)


def test_a_large_jpeg_is_read_at_a_reduced_scale() -> None:
    data = encoded(Image.new("RGB", (9000, 8000), (10, 100, 200)), "JPEG")
    photo = Photo(data, max_pixels=MAX_PIXELS)
    assert (photo.width, photo.height, photo.finest) == (9000, 8000, 2)
    assert photo.pixels(photo.finest).shape == (4000, 4500, 3)
    assert photo.pixels(8).shape == (1000, 1125, 3)


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


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_png_that_unpacks_to_too_much_says_so(kind: bytes) -> None:
    body = b"a\0" + (b"\1\0\0\0" if kind == b"iTXt" else b"\0") + zlib.compress(bytes(5_000_000))
    with pytest.raises(BadPhotoError, match="a text or colour profile in the PNG unpacks") as bad:
        Photo(with_chunk(encoded(SMALL, "PNG"), kind, body), max_pixels=MAX_PIXELS)
    assert bad.value.status == table.CORRUPT


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
