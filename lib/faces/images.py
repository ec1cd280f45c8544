"""Decodes photo files to upright BGR pixels, at full or reduced scale; an error says why a file cannot be read."""

import cv2
import numpy as np
import pyjpegli
from PIL import Image

from lib.faces import table
from lib.faces.orientation import TRANSPOSED, read_orientation, turned_upright
from lib.faces.photo_decoders import (
    BAND_PIXELS,
    BadPhotoError,
    decode_with_opencv,
    decode_with_pillow,
    decode_without_end,
    read_header,
)
from lib.faces.photo_structure import MAX_PIECES, OPENCV_BYTES, Structure, read_structure

PHOTO_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp"),
    *(".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"),
)
"""Suffixes of photos. The content decides how a file is read; HEIC is listed, so that its refusal names the format."""

MAX_PHOTO_BYTES = 256 * 2**20
"""A longer file is refused unread: no camera writes one."""

REDUCTIONS = (8, 4, 2, 1)
"""Scales (1/n) at which a JPEG can be decoded cheaply, the coarsest first."""

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

_OPENCV_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP")


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
        header = read_header(data)
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
            pixels = decode_with_opencv(self.data, reduction)
            if pixels is not None and self._fits(upright := turned_upright(pixels, self.orientation), reduction):
                return upright
        if reduction > self.finest:
            return _shrink(self.pixels(self.finest), reduction // self.finest)
        if _PILLOW_BYTES * self.width * self.height > MAX_DECODED_BYTES:
            raise BadPhotoError(table.CORRUPT, "the picture cannot be decoded")
        lacks_end = self._is_jpeg and not self._is_whole
        pixels = decode_without_end(self.data) if lacks_end else decode_with_pillow(self.data)
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
    rows = max(1, BAND_PIXELS // (width * reduction))
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
