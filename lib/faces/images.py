"""Photo files become upright BGR pixels, at full or reduced scale; what cannot be read says why."""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import pyjpegli
from PIL import Image, UnidentifiedImageError

from lib.faces import table

PHOTO_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp"),
    *(".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"),
)
"""What a photo's name ends in. Its content decides how it is read; HEIC is refused by its name."""

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

MAX_SIDE = 65_535
"""Pixels along one side. JPEG cannot hold more, and buffers of a row are allocated by it."""

MAX_DECODED_PIXELS = 50_000_000
"""Pixels that are decoded at once. Larger JPEGs are read at a reduced scale, other formats are refused."""

MAX_PILLOW_PIXELS = 25_000_000
"""The same for what Pillow decodes, which holds a picture several times."""

MAX_JPEG_SCANS = 100
MAX_SCANNED_PIXELS = 2_000_000_000
"""Scans of a progressive JPEG, and pixels times scans: a decoder passes over all pixels for each scan."""

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

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # to Pillow an MPO is a JPEG until it is open
_OPENCV_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP")

_FORMATS_NOT_READ = {
    "HEIC": re.compile(rb"....ftyp(heic|heix|hevc|hevx|heim|heis|mif1|msf1)", re.DOTALL),
    "JPEG XL": re.compile(rb"\xff\x0a|\0\0\0\x0cJXL ", re.DOTALL),
    "JPEG 2000": re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", re.DOTALL),
    "PDF": re.compile(rb"%PDF"),
    "SVG or HTML": re.compile(rb"\s*<(\?xml|svg|html|!DOCTYPE)", re.IGNORECASE),
    "video": re.compile(rb"....ftyp(isom|mp4|qt  |M4V)|\x1aE\xdf\xa3", re.DOTALL),
}

_EXIF_ORIENTATION = 0x0112
_XMP_ORIENTATION = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>\s*)([1-8])""")
_TRANSPOSED_ORIENTATIONS = (5, 6, 7, 8)

# How stored pixels become upright, by orientation (EXIF 2.32, section 4.6.4).
_TURN: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: cv2.flip(pixels, 1),
    3: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_180),
    4: lambda pixels: cv2.flip(pixels, 0),
    5: cv2.transpose,
    6: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_CLOCKWISE),
    7: lambda pixels: cv2.rotate(cv2.transpose(pixels), cv2.ROTATE_180),
    8: lambda pixels: cv2.rotate(pixels, cv2.ROTATE_90_COUNTERCLOCKWISE),
}


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
        width, height: pixels of the upright photo: the orientation that EXIF or XMP tells is applied.
        finest: the smallest reduction at which its pixels can be had, 1 but for very large ones.
    """

    finest: int
    _orientation: int

    def __init__(self, data: bytes, *, max_pixels: int) -> None:
        """Read the header.

        Raises:
            BadPhotoError: no picture, or one of more than `max_pixels` pixels (nothing is decoded then).
        """
        if len(data) > MAX_PHOTO_BYTES:
            raise BadPhotoError(table.TOO_LARGE, f"the file is longer than {MAX_PHOTO_BYTES} bytes")
        _check_chunks(data)
        self._data = data
        self._decoded: dict[int, np.ndarray] = {}
        header = _read_header(data)
        self.width, self.height = header.size
        if self.width * self.height > max_pixels:
            raise BadPhotoError(table.TOO_LARGE, f"{self.width}x{self.height} is over {max_pixels} pixels")
        if max(header.size) > MAX_SIDE:
            raise BadPhotoError(table.TOO_LARGE, f"{self.width}x{self.height} has a side over {MAX_SIDE} pixels")
        self._is_jpeg = header.format in ("JPEG", "MPO")
        if self._is_jpeg:
            _check_scans(data, self.width * self.height)
        # OpenCV neither converts CMYK as browsers do nor reports a file that breaks off: Pillow decodes those.
        self._needs_pillow = (
            header.format not in _OPENCV_FORMATS or header.mode == "CMYK" or not _is_complete(data, header.format)
        )
        self.finest = _finest_reduction(self.width * self.height, in_steps=self._is_jpeg and not self._needs_pillow)
        if self._needs_pillow and self.width * self.height > MAX_PILLOW_PIXELS:
            raise BadPhotoError(
                table.TOO_LARGE, f"{self.width}x{self.height} {header.format} is over {MAX_PILLOW_PIXELS} pixels"
            )
        self._orientation = _orientation(header, data)
        if self._orientation in _TRANSPOSED_ORIENTATIONS:
            self.width, self.height = self.height, self.width

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
        photo._orientation = photo.finest = 1
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
            if pixels is not None and self._fits(upright := self._upright(pixels), reduction):
                return upright
        if reduction > self.finest:
            return _shrink(self.pixels(self.finest), reduction // self.finest)
        if not self._needs_pillow:
            pixels = _decode_with_opencv(self._data, reduction)
            if pixels is not None and self._fits(upright := self._upright(pixels), reduction):
                return upright
        if self.width * self.height > MAX_PILLOW_PIXELS:
            raise BadPhotoError(table.CORRUPT, "the picture cannot be decoded")
        return self._upright(_decode_with_pillow(self._data, self._is_jpeg))

    def _upright(self, pixels: np.ndarray) -> np.ndarray:
        turn = _TURN.get(self._orientation)
        return pixels if turn is None else turn(pixels)

    def _fits(self, pixels: np.ndarray, reduction: int) -> bool:
        return pixels.shape[:2] == (-(-self.height // reduction), -(-self.width // reduction))


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


def _check_chunks(data: bytes) -> None:
    """Refuse a PNG with a chunk longer than the file: decoders allocate what a chunk declares before they read it.

    Raises:
        BadPhotoError: there is one.
    """
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return
    place = 8
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"IEND":
            return
        if place + 12 + length > len(data):
            raise BadPhotoError(table.CORRUPT, "the PNG file breaks off")
        place += 12 + length


def _check_scans(data: bytes, num_pixels: int) -> None:
    """Refuse a JPEG of absurdly many scans, which takes a decoder minutes.

    Raises:
        BadPhotoError: it is one.
    """
    # Between markers the byte ff is followed by 00; a thumbnail in the header adds a few scans.
    num_scans = data.count(b"\xff\xda")
    if num_scans > MAX_JPEG_SCANS or num_scans * num_pixels > max(MAX_SCANNED_PIXELS, 12 * num_pixels):
        raise BadPhotoError(table.CORRUPT, f"a JPEG of {num_scans} scans would take too long to decode")


def _finest_reduction(num_pixels: int, *, in_steps: bool) -> int:
    """Return the smallest reduction at which a picture stays within `MAX_DECODED_PIXELS`.

    Raises:
        BadPhotoError: it does not, and its format has no reduced scales.
    """
    if num_pixels <= MAX_DECODED_PIXELS:
        return 1
    if not in_steps:
        raise BadPhotoError(
            table.TOO_LARGE, f"a picture of {num_pixels} pixels; over {MAX_DECODED_PIXELS} only whole JPEGs are read"
        )
    return next((n for n in reversed(REDUCTIONS) if num_pixels <= MAX_DECODED_PIXELS * n * n), REDUCTIONS[0])


def _read_header(data: bytes) -> Image.Image:
    """Return the picture, not decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise BadPhotoError(table.TOO_LARGE, str(error)) from error
    except (UnidentifiedImageError, *_UNREADABLE) as error:
        for name, start in _FORMATS_NOT_READ.items():
            if start.match(data[:64]):
                raise BadPhotoError(table.CORRUPT, f"{name} is not read: convert it to JPEG or PNG") from error
        reason = (
            "the file is empty" if not data else "no picture that can be read (JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF)"
        )
        raise BadPhotoError(table.CORRUPT, reason) from error


def _orientation(header: Image.Image, data: bytes) -> int:
    """Return how the pixels are stored, 1 (upright) to 8: by EXIF wherever a format keeps it, else by XMP.

    Decoders differ in what they heed, so none of them is let turn a picture.
    """
    if header.format == "TIFF":
        return 1  # Pillow turns it when it decodes it
    # Pillow decodes the whole of a PNG to look for EXIF behind the pixels.
    if header.format == "PNG" and not any(key in data for key in (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")):
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exif = header.getexif()
            _read_app1_profile(header, exif)
            value = exif.get(_EXIF_ORIENTATION)
    except _UNREADABLE:
        value = None
    if value is None:
        xmp = header.info.get("xmp") or header.info.get("XML:com.adobe.xmp") or b""
        found = _XMP_ORIENTATION.search(xmp if isinstance(xmp, bytes) else xmp.encode("utf-8", "replace"))
        value = int(found[1]) if found else 1
    return value if isinstance(value, int) and value in _TURN else 1


def _read_app1_profile(header: Image.Image, exif: Image.Exif) -> None:
    """Read EXIF or XMP as ImageMagick keeps the segment of a JPEG in a PNG: as hexadecimal text after three lines."""
    text = header.info.get("Raw profile type APP1") or header.info.get("Raw profile type app1")
    if not isinstance(text, str) or _EXIF_ORIENTATION in exif:
        return
    profile = bytes.fromhex("".join(text.split("\n")[3:]))
    if profile.startswith(b"Exif\0\0"):
        exif.load(profile)
    else:
        header.info.setdefault("xmp", profile)


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
        flags = _CV2_READ_FLAGS[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None


def _decode_with_pillow(data: bytes, is_jpeg: bool) -> np.ndarray:
    """Return the pixels as they are stored, BGR.

    A JPEG may lack its end mark, as long as no pixel depends on the bytes that would follow.
    """
    try:
        return _pillow_pixels(data)
    except BadPhotoError:
        if not is_jpeg:
            raise
        followed_by_nothing = _pillow_pixels(data + b"\xff\xd9")
        followed_by_noise = _pillow_pixels(data + bytes(range(1, 200, 7)) + b"\xff\xd9")
        if not np.array_equal(followed_by_nothing, followed_by_noise):
            raise
        return followed_by_nothing


def _pillow_pixels(data: bytes) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data), formats=_FORMATS)
            picture.load()
            if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
                grey_HW = np.clip(np.asarray(picture), 0, 65535).astype(np.uint32)
                return cv2.cvtColor(((grey_HW + 128) // 257).astype(np.uint8), cv2.COLOR_GRAY2BGR)
            if picture.mode in ("I", "F"):
                raise BadPhotoError(table.CORRUPT, f"no photo: one number of mode {picture.mode} a pixel")
            rgb = picture.convert("RGB")
            del picture
            return cv2.cvtColor(np.asarray(rgb), cv2.COLOR_RGB2BGR)
    except (Image.DecompressionBombError, cv2.error, *_UNREADABLE) as error:
        raise BadPhotoError(table.CORRUPT, f"the picture cannot be decoded: {error}") from error
