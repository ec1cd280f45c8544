"""Decoders: the header of a photo file, and its pixels as they are stored, by OpenCV or by Pillow."""

import hashlib
import io
import re
import warnings

import cv2
import numpy as np
from PIL import Image

from lib.faces import table
from lib.faces.photo_structure import PNG_START

BAND_PIXELS = 2**22
"""Pixels that are converted at a time, so that memory does not hold a large picture twice."""

_CV2_READ_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}

MAX_UNFINISHED_BYTES = 32 * 2**20
"""A longer JPEG without an end mark is refused, because telling whether it is complete takes two decodings."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # to Pillow an MPO is a JPEG until it is open

_FORMATS_NOT_READ = {
    "HEIC": re.compile(rb"....ftyp(heic|heix|hevc|hevx|heim|heis|mif1|msf1)", re.DOTALL),
    "JPEG XL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL ", re.DOTALL),
    "JPEG 2000": re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", re.DOTALL),
    "PDF": re.compile(rb"%PDF"),
    "SVG or HTML": re.compile(rb"\s*<(\?xml|svg|html|!DOCTYPE)", re.IGNORECASE),
    "video": re.compile(rb"....ftyp(isom|mp4|qt  |M4V)|\x1aE\xdf\xa3", re.DOTALL),
}


class BadPhotoError(Exception):
    """A photo cannot be used.

    Attributes:
        status: a status of the faces table (`corrupt` or `too_large`).
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def read_header(data: bytes) -> Image.Image:
    """Return the picture without decoding it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise BadPhotoError(table.TOO_LARGE, str(error)) from error
    except Exception as error:  # readers raise all kinds of errors for damaged files, such as RuntimeError
        for name, start in _FORMATS_NOT_READ.items():
            if start.match(data[:64]):
                raise BadPhotoError(table.CORRUPT, f"{name} is not read: convert it to JPEG or PNG") from error
        if data.startswith(PNG_START) and re.search("too large|too much memory", str(error), re.IGNORECASE):
            reason = "a text or colour profile in the PNG unpacks to far more than a photo needs: save it without"
            raise BadPhotoError(table.CORRUPT, reason) from error
        reason = (
            "the file is empty" if not data else "no picture in a known format (JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF)"
        )
        raise BadPhotoError(table.CORRUPT, reason) from error


def decode_with_opencv(data: bytes, reduction: int) -> np.ndarray | None:
    try:
        flags = _CV2_READ_FLAGS[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None


def decode_without_end(data: bytes) -> np.ndarray:
    """Return the pixels of a JPEG without an end mark, if none of them depends on missing bytes.

    Raises:
        BadPhotoError: some pixels do.
    """
    broken = BadPhotoError(table.CORRUPT, "the JPEG file is truncated")
    if len(data) > MAX_UNFINISHED_BYTES:
        raise broken
    data = data.rstrip(b"\0")  # an unfinished download may end with zeros
    with_noise = hashlib.sha256(decode_with_pillow(data + bytes(range(1, 200, 7)) + b"\xff\xd9").data).digest()
    pixels = decode_with_pillow(data + b"\xff\xd9")
    if hashlib.sha256(pixels.data).digest() != with_noise:
        raise broken
    return pixels


def decode_with_pillow(data: bytes) -> np.ndarray:
    """Return the pixels as stored, BGR.

    Raises:
        BadPhotoError: they cannot be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data), formats=_FORMATS)
            picture.load()
            pixels = np.empty((picture.height, picture.width, 3), np.uint8)
            rows = max(1, BAND_PIXELS // picture.width)
            for top in range(0, picture.height, rows):
                band = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
                pixels[top : top + rows] = _bgr(band, picture.format)
            return pixels
    except BadPhotoError:
        raise
    except Exception as error:
        raise BadPhotoError(table.CORRUPT, f"the picture cannot be decoded: {error}") from error


def _bgr(picture: Image.Image, picture_format: str | None) -> np.ndarray:
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture_format == "PNG"):
        grey_HW = np.clip(np.asarray(picture), 0, 65535).astype(np.uint32)
        return cv2.cvtColor(((grey_HW + 128) // 257).astype(np.uint8), cv2.COLOR_GRAY2BGR)
    if picture.mode in ("I", "F"):
        raise BadPhotoError(table.CORRUPT, f"not a photo: its pixels are single numbers of mode {picture.mode}")
    return cv2.cvtColor(np.asarray(picture.convert("RGB")), cv2.COLOR_RGB2BGR)
