"""The orientation of a photo: read once from EXIF or XMP for all formats, and undone once for both decoders."""

import re
import warnings
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

_EXIF_TAG = 0x0112
_XMP_VALUE = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>\s*)([1-8])""")
TRANSPOSED = (5, 6, 7, 8)
"""Orientations that exchange width and height."""


def _flipped(pixels: np.ndarray, axis: int) -> np.ndarray:
    return cv2.flip(pixels, axis, pixels)


# How stored pixels become upright, by orientation (EXIF 2.32, section 4.6.4); in place where possible.
_TURN: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: _flipped(pixels, 1),
    3: lambda pixels: _flipped(pixels, -1),
    4: lambda pixels: _flipped(pixels, 0),
    5: cv2.transpose,
    6: lambda pixels: _flipped(cv2.transpose(pixels), 1),
    7: lambda pixels: _flipped(cv2.transpose(pixels), -1),
    8: lambda pixels: _flipped(cv2.transpose(pixels), 0),
}


def turned_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return stored pixels [H, W, 3] turned upright; the stored ones may be overwritten."""
    turn = _TURN.get(orientation)
    return pixels if turn is None else turn(pixels)


def read_orientation(header: Image.Image, data: bytes) -> int:
    """Return how the pixels are stored, 1 (upright) to 8: from EXIF, wherever a format keeps it, else from XMP.

    Decoders read different tags, so they decode the pixels as stored.
    """
    if header.format == "TIFF":
        return 1  # Pillow turns it while decoding
    # Pillow decodes the whole of a PNG to look for EXIF behind the pixels.
    if header.format == "PNG" and not any(key in data for key in (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")):
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exif = header.getexif()
            _read_app1_profile(header, exif)
            value = exif.get(_EXIF_TAG)
    except Exception:  # noqa: BLE001 - readers raise all kinds of errors: a damaged tag must not cost the photo
        value = None
    if value is None:
        xmp = header.info.get("xmp") or header.info.get("XML:com.adobe.xmp") or b""
        found = _XMP_VALUE.search(xmp if isinstance(xmp, bytes) else xmp.encode("utf-8", "replace"))
        value = int(found[1]) if found else 1
    return value if isinstance(value, int) and value in _TURN else 1


def _read_app1_profile(header: Image.Image, exif: Image.Exif) -> None:
    """Read EXIF or XMP that ImageMagick has copied from a JPEG into a PNG: hexadecimal text after three lines."""
    text = header.info.get("Raw profile type APP1") or header.info.get("Raw profile type app1")
    if not isinstance(text, str) or _EXIF_TAG in exif:
        return
    profile = bytes.fromhex("".join(text.split("\n")[3:]))
    if profile.startswith(b"Exif\0\0"):
        exif.load(profile)
    else:
        header.info.setdefault("xmp", profile)
