"""Encoded pictures of all kinds for tests of decoding."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageOps

from lib.faces.images import BadPhotoError, Photo

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


def with_app1(jpeg: bytes, body: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def with_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    return png[:33] + chunk(kind, body) + png[33:]


def claiming(jpeg: bytes, width: int, height: int) -> bytes:
    """Return a JPEG whose header claims a size."""
    place = max(jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xc2"))
    return jpeg[: place + 5] + struct.pack(">HH", height, width) + jpeg[place + 9 :]


# What phones, cameras and other programs put behind a picture, or into its header.
VIDEO = (
    b"\0\0\0\x18ftypmp42" + np.random.default_rng(1).bytes(20_000).replace(b"\xff\xd9", b"\xff\xda") + b"\xff\xda" * 500
)
