"""Decodes photo files to upright BGR pixels, at full or reduced scale; an error says why a file cannot be read."""

import hashlib
import io
import re
import warnings

import cv2
import numpy as np
import pyjpegli
from PIL import Image

from lib.faces import table
from lib.faces.orientation import TRANSPOSED, read_orientation, turned_upright
from lib.faces.photo_structure import MAX_PIECES, OPENCV_BYTES, PNG_START, Structure, read_structure

PHOTO_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp"),
    *(".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"),
)
"""Suffixes of photos. The content decides how a file is read; HEIC is listed, so that its refusal names the format."""

MAX_PHOTO_BYTES = 256 * 2**20
"""A longer file is refused unread: no camera writes one."""

_BAND_PIXELS = 2**22
"""Pixels that are converted at a time, so that memory does not hold a large picture twice."""

REDUCTIONS = (8, 4, 2, 1)
"""Scales (1/n) at which a JPEG can be decoded cheaply, the coarsest first."""

_CV2_READ_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}

MAX_SIDE = 65_535
"""Pixels along one side. JPEG cannot hold more, and decoders allocate buffers by the length of a row."""

MAX_DECODED_BYTES = 300_000_000
"""Memory for decoding a photo, without its file. JPEGs that need more are read at a reduced scale, others are
refused."""

_PILLOW_BYTES, _AVIF_BYTES = 12, 16
"""Bytes per pixel that Pillow holds while it decodes, as measured (docs/measurements.md)."""

MAX_JPEG_SCANS = 100
MAX_SCANNED_SAMPLES = 1_000_000_000
"""Scans of a progressive JPEG, and samples that a decoder passes in all of them, at 1 to 3 ns each."""

SLOW_SAMPLES, SLOW_BYTES = 200_000_000, 32 * 2**20
"""A JPEG beyond these is decoded once and shrunk, instead of decoded for each scale."""

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


class BadPhotoError(Exception):
    """A photo cannot be used.

    Attributes:
        status: a status of the faces table (`corrupt` or `too_large`).
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Photo:
    """An encoded photo. Its upright size comes from the header; its pixels are decoded on demand.

    Attributes:
        width, height: pixels of the upright photo, after the orientation in EXIF or XMP.
        finest: the smallest reduction at which it can be decoded; 1 except for very large photos.
        orientation: as in EXIF; 1 if it is stored upright.
        data: the file.
    """

    finest: int
    orientation: int
    data: bytes

    def __init__(self, data: bytes, *, max_pixels: int) -> None:
        """Read the header.

        Raises:
            BadPhotoError: no picture, or one of more than `max_pixels` pixels, which is not decoded.
        """
        if len(data) > MAX_PHOTO_BYTES:
            raise BadPhotoError(table.TOO_LARGE, f"the file is longer than {MAX_PHOTO_BYTES} bytes")
        structure = read_structure(data)
        _check_work(structure)
        self.data = data
        self._decoded: dict[int, np.ndarray] = {}
        header = _read_header(data)
        self.width, self.height = header.size
        if self.width * self.height > max_pixels:
            raise BadPhotoError(table.TOO_LARGE, f"{self.width}x{self.height} is over {max_pixels} pixels")
        if max(header.size) > MAX_SIDE:
            raise BadPhotoError(table.TOO_LARGE, f"{self.width}x{self.height} has a side over {MAX_SIDE} pixels")
        self._is_jpeg = header.format in ("JPEG", "MPO")
        self._is_whole = structure.is_whole
        self._is_slow = structure.num_scanned > SLOW_SAMPLES or structure.num_coded > SLOW_BYTES
        # OpenCV does not convert CMYK as browsers do, and does not report a truncated file: Pillow decodes both.
        self._needs_pillow = header.format not in _OPENCV_FORMATS or header.mode == "CMYK" or not self._is_whole
        self.finest = _finest_reduction(header, structure, needs_pillow=self._needs_pillow)
        self.orientation = read_orientation(header, data)
        if self.orientation in TRANSPOSED:
            self.width, self.height = self.height, self.width

    @classmethod
    def of_pixels(cls, pixels_HW3: np.ndarray, *, max_pixels: int) -> "Photo":
        """Return a photo of decoded, upright BGR uint8 pixels.

        Raises:
            BadPhotoError: more than `max_pixels` pixels, or none.
        """
        photo = cls.__new__(cls)
        photo.height, photo.width = pixels_HW3.shape[:2]
        if not 0 < photo.width * photo.height <= max_pixels:
            raise BadPhotoError(table.TOO_LARGE, f"{photo.width}x{photo.height}: 1 to {max_pixels} pixels are read")
        photo.data, photo._decoded = b"", {1: pixels_HW3}
        photo._is_jpeg = photo._needs_pillow = False
        photo.orientation = photo.finest = 1
        return photo

    @property
    def is_plain_jpeg(self) -> bool:
        """Whether it is a whole grey or YCbCr JPEG, small enough to be decoded at full size."""
        return self._is_jpeg and not self._needs_pillow and not self._is_slow and self.finest == 1

    @property
    def stored_size(self) -> tuple[int, int]:
        """Width and height of the stored pixels, before they are turned upright."""
        is_turned = self.orientation in TRANSPOSED
        return (self.height, self.width) if is_turned else (self.width, self.height)

    def pixels(self, reduction: int = 1) -> np.ndarray:
        """Return the upright photo at 1/`reduction` of its size, [H, W, 3] uint8 BGR.

        Raises:
            BadPhotoError: the pixels cannot be decoded.
        """
        if reduction not in self._decoded:
            self._decoded[reduction] = self._decode(reduction)
        return self._decoded[reduction]

    def _decode(self, reduction: int) -> np.ndarray:
        in_steps = self._is_jpeg and not self._needs_pillow and not self._is_slow
        if reduction > self.finest and (not in_steps or any(n < reduction for n in self._decoded)):
            return _shrink(self.pixels(self.finest), reduction // self.finest)
        if not self._needs_pillow:
            if 2 * OPENCV_BYTES * self.width * self.height > MAX_DECODED_BYTES * reduction**2:
                self._decoded.clear()  # coarser scales: there is no room for both
            pixels = _decode_with_opencv(self.data, reduction)
            if pixels is not None and self._fits(upright := turned_upright(pixels, self.orientation), reduction):
                return upright
        if reduction > self.finest:
            return _shrink(self.pixels(self.finest), reduction // self.finest)
        if _PILLOW_BYTES * self.width * self.height > MAX_DECODED_BYTES:
            raise BadPhotoError(table.CORRUPT, "the picture cannot be decoded")
        lacks_end = self._is_jpeg and not self._is_whole
        pixels = _jpeg_without_end(self.data) if lacks_end else _decode_with_pillow(self.data)
        return turned_upright(pixels, self.orientation)

    def _fits(self, pixels: np.ndarray, reduction: int) -> bool:
        return pixels.shape[:2] == (-(-self.height // reduction), -(-self.width // reduction))


def reduction_for(scale: float) -> int:
    """Return the largest n of `REDUCTIONS` for which a photo at 1/n still has the pixels that `scale` needs."""
    return next((n for n in REDUCTIONS if n * scale <= 1.0), 1)


def to_jpeg(pixels_HW3: np.ndarray, quality: int) -> bytes:
    """Return BGR pixels as a baseline JPEG file with 4:2:0 chroma.

    The encoder is jpegli: with the same quality and error, its files are a seventh smaller than those of libjpeg
    (docs/measurements.md).
    """
    return rgb_to_jpeg(cv2.cvtColor(pixels_HW3, cv2.COLOR_BGR2RGB), quality)


def rgb_to_jpeg(pixels_HW3: np.ndarray, quality: int) -> bytes:
    """Do the same as `to_jpeg` for RGB pixels."""
    height, width = pixels_HW3.shape[:2]
    return bytes(pyjpegli.encode(pixels_HW3.tobytes(), width, height, quality=quality))


def _shrink(pixels: np.ndarray, reduction: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    shrunk = np.empty((-(-height // reduction), -(-width // reduction), 3), np.uint8)
    # Padding to a multiple of n keeps the scale exactly 1/n, as in the JPEG decoder. It is done band by band.
    right = shrunk.shape[1] * reduction - width
    rows = max(1, _BAND_PIXELS // (width * reduction))
    for top in range(0, len(shrunk), rows):
        band = shrunk[top : top + rows]
        source = pixels[top * reduction : (top + len(band)) * reduction]
        bottom = len(band) * reduction - len(source)
        padded = cv2.copyMakeBorder(source, 0, bottom, 0, right, cv2.BORDER_REPLICATE) if bottom or right else source
        band[:] = cv2.resize(padded, (band.shape[1], band.shape[0]), interpolation=cv2.INTER_AREA)
    return shrunk


def _check_work(structure: Structure) -> None:
    """Check that a decoder takes neither minutes, nor gigabytes that the file only declares.

    Raises:
        BadPhotoError: it would.
    """
    if structure.declares_more:
        raise BadPhotoError(table.CORRUPT, "the PNG file is truncated")
    if structure.too_many_pieces:
        raise BadPhotoError(table.CORRUPT, f"a file of over {MAX_PIECES} chunks would take too long to read")
    if structure.num_scans > MAX_JPEG_SCANS:
        raise BadPhotoError(
            table.CORRUPT,
            f"a JPEG of {structure.num_scans} scans, over {MAX_JPEG_SCANS}, would take too long to decode",
        )


def _finest_reduction(header: Image.Image, structure: Structure, *, needs_pillow: bool) -> int:
    """Return the smallest reduction at which a picture is decoded within `MAX_DECODED_BYTES`; 1 unless a whole JPEG.

    Raises:
        BadPhotoError: it needs more at every reduction.
    """
    num_pixels = header.width * header.height
    bytes_a_pixel = structure.bytes_a_pixel
    if needs_pillow:
        bytes_a_pixel = _AVIF_BYTES if header.format == "AVIF" else _PILLOW_BYTES
    in_steps = header.format in ("JPEG", "MPO") and not needs_pillow
    for n in reversed(REDUCTIONS) if in_steps else (1,):
        # A decoder frees what it holds for the scans before it copies the pixels.
        needed = max(bytes_a_pixel * num_pixels, n**2 * structure.bytes_held + 3 * num_pixels) / n**2
        if needed <= MAX_DECODED_BYTES and structure.num_scanned <= MAX_SCANNED_SAMPLES:
            return n
    kind = f"{'progressive ' if structure.bytes_held else ''}{header.format}"
    kind += "" if structure.is_whole else " that is truncated"
    advice = "save it smaller" if kind == "JPEG" else "save it smaller, or as baseline JPEG"
    cost = f"{needed / 1e6:.0f} MB to decode, over {MAX_DECODED_BYTES / 1e6:.0f}"
    if structure.num_scanned > MAX_SCANNED_SAMPLES:
        cost = f"a decoder over {structure.num_scanned / 1e6:.0f} million samples in {structure.num_scans} scans"
    raise BadPhotoError(table.TOO_LARGE, f"{header.width}x{header.height} as {kind} takes {cost}: {advice}")


def _read_header(data: bytes) -> Image.Image:
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


def _decode_with_opencv(data: bytes, reduction: int) -> np.ndarray | None:
    try:
        flags = _CV2_READ_FLAGS[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None


def _jpeg_without_end(data: bytes) -> np.ndarray:
    """Return the pixels of a JPEG without an end mark, if none of them depends on missing bytes.

    Raises:
        BadPhotoError: some pixels do.
    """
    broken = BadPhotoError(table.CORRUPT, "the JPEG file is truncated")
    if len(data) > SLOW_BYTES:
        raise broken
    data = data.rstrip(b"\0")  # an unfinished download may end with zeros
    with_noise = hashlib.sha256(_decode_with_pillow(data + bytes(range(1, 200, 7)) + b"\xff\xd9").data).digest()
    pixels = _decode_with_pillow(data + b"\xff\xd9")
    if hashlib.sha256(pixels.data).digest() != with_noise:
        raise broken
    return pixels


def _decode_with_pillow(data: bytes) -> np.ndarray:
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
            rows = max(1, _BAND_PIXELS // picture.width)
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
