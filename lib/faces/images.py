"""Photo files become upright BGR pixels, at full or reduced scale; what cannot be read says why."""

import io
import struct
import warnings
import zlib

import cv2
import numpy as np
import pyjpegli
from PIL import Image, ImageOps, UnidentifiedImageError

from lib.faces import table

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp")

MAX_PHOTO_BYTES = 256 * 2**20
"""A file longer than this is refused unread: no camera writes one."""

REDUCTIONS = (8, 4, 2, 1)
"""Scales (1/n) at which a JPEG can be decoded cheaply, the coarsest first."""

_CV2_READ_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}

# What Pillow's readers are seen to raise on damaged files.
_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    MemoryError,
    NotImplementedError,
    struct.error,
    zlib.error,
)

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # to Pillow an MPO is a JPEG until it is open
_EXIF_ORIENTATION = 0x0112
_TRANSPOSED_ORIENTATIONS = (5, 6, 7, 8)


class BadPhotoError(Exception):
    """One photo that cannot be used.

    Attributes:
        status: a status of the faces table (`corrupt` or `too_large`).
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Photo:
    """One encoded photo: its upright size is known at once, its pixels are decoded when asked for.

    Attributes:
        width, height: pixels, after the EXIF orientation is applied.
    """

    def __init__(self, data: bytes, *, max_pixels: int) -> None:
        """Read the header.

        Raises:
            BadPhotoError: no picture, or one of more than `max_pixels` pixels (nothing is decoded then).
        """
        if len(data) > MAX_PHOTO_BYTES:
            raise BadPhotoError(table.TOO_LARGE, f"the file is longer than {MAX_PHOTO_BYTES} bytes")
        self._data = data
        self._decoded: dict[int, np.ndarray] = {}
        header = _read_header(data)
        self.width, self.height = header.size
        if self.width * self.height > max_pixels:
            raise BadPhotoError(table.TOO_LARGE, f"{self.width}x{self.height} is over {max_pixels} pixels")
        if _orientation(header, data) in _TRANSPOSED_ORIENTATIONS:
            self.width, self.height = self.height, self.width
        self._is_jpeg = header.format in ("JPEG", "MPO")
        # OpenCV neither converts CMYK as browsers do nor reports a file that breaks off: Pillow decodes those.
        self._needs_pillow = header.mode == "CMYK" or not _is_complete(data, header.format)

    @classmethod
    def of_pixels(cls, pixels_HW3: np.ndarray, *, max_pixels: int) -> "Photo":
        """Return a photo of upright BGR uint8 pixels that somebody has decoded already.

        Raises:
            BadPhotoError: more than `max_pixels` pixels, or none.
        """
        photo = cls.__new__(cls)
        photo.height, photo.width = pixels_HW3.shape[:2]
        if not 0 < photo.width * photo.height <= max_pixels:
            raise BadPhotoError(table.TOO_LARGE, f"{photo.width}x{photo.height}: 1 to {max_pixels} pixels are read")
        photo._data, photo._decoded = b"", {1: pixels_HW3}
        photo._is_jpeg = photo._needs_pillow = False
        return photo

    def pixels(self, reduction: int = 1) -> np.ndarray:
        """Return the upright photo at 1/`reduction` of its size, [H, W, 3] uint8 BGR.

        Raises:
            BadPhotoError: the pixels cannot be decoded.
        """
        if reduction not in self._decoded:
            self._decoded[reduction] = self._decode(reduction)
        return self._decoded[reduction]

    def _decode(self, reduction: int) -> np.ndarray:
        if self._is_jpeg and not self._needs_pillow and not any(n < reduction for n in self._decoded):
            pixels = _decode_with_opencv(self._data, reduction)
            expected = (-(-self.height // reduction), -(-self.width // reduction))
            if pixels is not None and pixels.shape[:2] == expected:
                return pixels
        if reduction > 1:
            return _shrink(self.pixels(1), reduction)
        pixels = None
        if not self._needs_pillow:
            pixels = _decode_with_opencv(self._data, 1)
        if pixels is None or pixels.shape[:2] != (self.height, self.width):
            pixels = _decode_with_pillow(self._data)
        return pixels


def reduction_for(scale: float) -> int:
    """Return the largest n of `REDUCTIONS` such that a photo at 1/n still has the pixels that `scale` asks for."""
    return next((n for n in REDUCTIONS if n * scale <= 1.0), 1)


def to_jpeg(pixels_HW3: np.ndarray, quality: int) -> bytes:
    """Return BGR pixels as a baseline JPEG file with 4:2:0 chroma.

    The encoder is jpegli: at the same quality and the same error as libjpeg's its files are a seventh smaller
    (docs/measurements.md).
    """
    height, width = pixels_HW3.shape[:2]
    rgb_HW3 = cv2.cvtColor(pixels_HW3, cv2.COLOR_BGR2RGB)
    return bytes(pyjpegli.encode(rgb_HW3.tobytes(), width, height, quality=quality))


def _shrink(pixels: np.ndarray, reduction: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    size = (-(-width // reduction), -(-height // reduction))
    # Replicating up to a multiple keeps the scale exactly 1/n, as the JPEG decoder does.
    bottom, right = size[1] * reduction - height, size[0] * reduction - width
    padded = cv2.copyMakeBorder(pixels, 0, bottom, 0, right, cv2.BORDER_REPLICATE) if bottom or right else pixels
    return cv2.resize(padded, size, interpolation=cv2.INTER_AREA)


def _read_header(data: bytes) -> Image.Image:
    """Return the picture, not decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise BadPhotoError(table.TOO_LARGE, str(error)) from error
    except (UnidentifiedImageError, *_UNREADABLE) as error:
        raise BadPhotoError(table.CORRUPT, "no picture in a format that is read (JPEG, PNG, WebP, BMP)") from error


def _orientation(header: Image.Image, data: bytes) -> int:
    """Return the EXIF orientation, 1 (upright) where there is none that can be read."""
    # Pillow decodes the whole of a PNG to look for EXIF behind the pixels.
    if header.format == "PNG" and b"eXIf" not in data:
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return header.getexif().get(_EXIF_ORIENTATION, 1)
    except _UNREADABLE:
        return 1


def _is_complete(data: bytes, picture_format: str | None) -> bool:
    """Return whether the file ends where its format says it ends; False asks for a closer look."""
    if picture_format in ("JPEG", "MPO"):
        return b"\xff\xd9" in data[-64:]
    if picture_format == "PNG":
        return b"IEND" in data[-64:]
    if picture_format == "WEBP":
        return len(data) >= 8 + int.from_bytes(data[4:8], "little")
    if picture_format == "BMP":
        return len(data) >= int.from_bytes(data[2:6], "little")
    return False


def _decode_with_opencv(data: bytes, reduction: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), _CV2_READ_FLAGS[reduction])
    except cv2.error:
        return None


def _decode_with_pillow(data: bytes) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data), formats=_FORMATS)
            picture.load()
            upright = ImageOps.exif_transpose(picture)
            rgb_HW3 = np.asarray(upright.convert("RGB"))
        return np.ascontiguousarray(rgb_HW3[:, :, ::-1])
    except (Image.DecompressionBombError, *_UNREADABLE) as error:
        raise BadPhotoError(table.CORRUPT, f"the picture cannot be decoded: {error}") from error
