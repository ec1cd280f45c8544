"""Reads the markers and chunks of a photo's file: whether it is complete, and what decoding it costs."""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

PNG_START = b"\x89PNG\r\n\x1a\n"

OPENCV_BYTES, WEBP_BYTES, ANIMATION_BYTES = 6, 8, 12
"""Bytes per pixel while decoding. OpenCV holds the pixels twice; lossless WebP, alpha and animations take more."""

MAX_PIECES = 100_000
"""Most segments of a JPEG or chunks of a PNG. Photos have some hundreds, and a reader takes time for each."""

_JUNK, _START, _END, _SCAN = 0x00, 0xD8, 0xD9, 0xDA
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE_FRAMES = (0xC2, 0xC6, 0xCA, 0xCE)

# These begin no segment: ff 00, which is part of the coded pixels, restart marks, and ff as padding.
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")


@dataclass(frozen=True, kw_only=True)
class Structure:
    """The structure of a file.

    Attributes:
        is_whole: the file has its end. Data behind the end, such as the video of a motion photo, does not count.
        declares_more: a chunk of a PNG is longer than the file.
        too_many_pieces: it has more than `MAX_PIECES`; the rest was not read.
        bytes_a_pixel: memory of OpenCV while it decodes, as measured (docs/measurements.md).
        num_scans: scans of a JPEG; 1 unless it is progressive or stores its colours separately.
        num_scanned: samples that a JPEG decoder passes in all scans together.
        num_coded: bytes that it reads for them.
        bytes_held: memory of a JPEG decoder until the last scan, at any scale; 0 if there is one scan.
    """

    is_whole: bool
    declares_more: bool = False
    too_many_pieces: bool = False
    bytes_a_pixel: int = OPENCV_BYTES
    num_scans: int = 1
    num_scanned: int = 0
    num_coded: int = 0
    bytes_held: int = 0


def read_structure(data: bytes) -> Structure:
    """Return the structure of a file. Formats that only Pillow reads count as whole."""
    if data.startswith(PNG_START):
        return _png_structure(data)
    if data.startswith(b"\xff\xd8"):
        return _jpeg_structure(data)
    if data.startswith(b"RIFF"):
        is_animated = data[12:16] == b"VP8X" and len(data) > 20 and bool(data[20] & 2)
        still = OPENCV_BYTES if data[12:16] == b"VP8 " else WEBP_BYTES
        is_whole = len(data) >= 8 + int.from_bytes(data[4:8], "little")
        return Structure(is_whole=is_whole, bytes_a_pixel=ANIMATION_BYTES if is_animated else still)
    return Structure(is_whole=len(data) >= int.from_bytes(data[2:6], "little") if data.startswith(b"BM") else True)


def _png_structure(data: bytes) -> Structure:
    place, num_chunks, bytes_a_pixel = len(PNG_START), 0, OPENCV_BYTES
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"IEND":
            return Structure(is_whole=True, bytes_a_pixel=bytes_a_pixel)
        place += 12 + length
        num_chunks += 1
        if kind == b"acTL":
            bytes_a_pixel = ANIMATION_BYTES
        if num_chunks > MAX_PIECES:
            return Structure(is_whole=False, too_many_pieces=True)
    return Structure(is_whole=False, declares_more=place > len(data), bytes_a_pixel=bytes_a_pixel)


def _jpeg_structure(data: bytes) -> Structure:
    """Walk the markers of the first picture, without its thumbnail and without what follows its end."""
    samples: dict[int, int] = {}
    is_whole = is_buffered = False
    num_scans = num_scanned = num_coded = 0
    for num_segments, (marker, body, length_behind) in enumerate(_jpeg_segments(data)):
        if num_segments > MAX_PIECES or marker == _JUNK:
            return Structure(is_whole=False, too_many_pieces=True)
        if marker in _FRAMES:
            samples = _samples_by_component(body)
            is_buffered |= marker in _PROGRESSIVE_FRAMES
        elif marker == _SCAN:
            components = body[1 : 1 + 2 * body[0] : 2] if body else b""
            num_scans += 1
            num_coded += length_behind
            num_scanned += sum(samples.get(component, 0) for component in components)
            is_buffered |= len(components) < len(samples)
        is_whole = marker == _END
    return Structure(
        is_whole=is_whole,
        num_scans=num_scans,
        num_scanned=num_scanned,
        num_coded=num_coded,
        bytes_held=2 * sum(samples.values()) if is_buffered else 0,
    )


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Yield marker and body of each segment, and the number of coded bytes behind it.

    They end at the end mark, or where the file or its picture breaks off. The marker is `_JUNK` if too many bytes
    belong to no segment, because decoders pass those one by one.
    """
    place, num_junk = 2, 0
    while True:
        found = _MARKER.search(data, place)
        num_junk += (found.end() if found else len(data)) - place - 2
        if num_junk > MAX_PIECES:
            yield _JUNK, b"", 0
            return
        if found is None or (marker := data[found.end() - 1]) == _START:
            return
        start = place = found.end()
        if marker == _END:
            yield marker, b"", 0
            return
        end = place + int.from_bytes(data[place : place + 2], "big")
        if end > len(data):
            return
        if end < start + 2:
            continue
        place = end
        if marker == _SCAN:
            found = _MARKER.search(data, end)
            place = found.start() if found else len(data)
        yield marker, data[start + 2 : end], place - end
        if place == len(data):
            return


def _samples_by_component(frame: bytes) -> dict[int, int]:
    """Return the number of samples of each colour component of a frame header, in whole blocks as in decoders."""
    if len(frame) < 6 or len(frame) < 6 + 3 * frame[5]:
        return {}
    height, width, number = struct.unpack_from(">HHB", frame, 1)
    factors = {frame[at]: divmod(frame[at + 1], 16) for at in range(6, 6 + 3 * number, 3)}
    across = max((h for h, _ in factors.values()), default=0) or 1
    down = max((v for _, v in factors.values()), default=0) or 1
    blocks = -(-width // (8 * across)) * -(-height // (8 * down))
    return {component: 64 * blocks * h * v for component, (h, v) in factors.items()}
