"""The side of a square JPEG by its header, of one or of many that lie in the same bytes. No pixel is decoded.

Shapes: N pictures, B bytes.
"""

import struct

import numpy as np
from numpy.typing import NDArray

LARGEST = 2**20
"""Largest picture that has a side, in bytes, so that the crops of a part fit into one Arrow array."""

_START, _END = b"\xff\xd8\xff", b"\xff\xd9"
_FRAMES = (0xC0, 0xC1, 0xC2)
_EXIF = 0xE1
_FIRST, _LAST = 0xC4, 0xFE
"""Markers of segments that have a length."""
_FRAME_BYTES = 9
"""Bytes that have to follow the beginning of a segment."""


def jpeg_side(data: bytes) -> int | None:
    """Return the side of a complete, upright, square colour JPEG; None for anything else."""
    if not data.startswith(_START) or not data.endswith(_END) or len(data) > LARGEST:
        return None
    position = 2
    while position + _FRAME_BYTES < len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker in _FRAMES:
            bits, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
            return int(width) if bits == 8 and height == width and components == 3 else None
        if marker == _EXIF or not _FIRST <= marker <= _LAST or length < 2:
            return None
        position += 2 + length
    return None


def jpeg_sides(data_B: NDArray[np.uint8], start_N: NDArray[np.int64], stop_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what `jpeg_side` says of each of the pictures that begin and end at these places; 0 for None.

    All headers are walked at once, segment by segment.
    """
    side_N = np.zeros(len(start_N), np.int64)
    length_N = stop_N - start_N
    left_M = np.flatnonzero((length_N >= len(_START) + len(_END)) & (length_N <= LARGEST))
    for place_N, mark in ((start_N, _START), (stop_N - len(_END), _END)):
        for offset, byte in enumerate(mark):
            left_M = left_M[data_B[place_N[left_M] + offset] == byte]
    position_M = start_N[left_M] + 2
    while len(left_M):
        is_there_M = position_M + _FRAME_BYTES < stop_N[left_M]
        left_M, position_M = left_M[is_there_M], position_M[is_there_M]
        head_MX = data_B[position_M[:, None] + np.arange(10)].astype(np.int64)
        marker_M, length_M = head_MX[:, 1], head_MX[:, 2] << 8 | head_MX[:, 3]
        is_segment_M = head_MX[:, 0] == 0xFF
        is_frame_M = is_segment_M & np.isin(marker_M, _FRAMES)
        height_M, width_M = head_MX[:, 5] << 8 | head_MX[:, 6], head_MX[:, 7] << 8 | head_MX[:, 8]
        is_square_M = is_frame_M & (head_MX[:, 4] == 8) & (height_M == width_M) & (head_MX[:, 9] == 3)
        side_N[left_M[is_square_M]] = width_M[is_square_M]
        goes_on_M = is_segment_M & ~is_frame_M & (marker_M != _EXIF) & (length_M >= 2)
        goes_on_M &= (marker_M >= _FIRST) & (marker_M <= _LAST)
        left_M, position_M = left_M[goes_on_M], (position_M + 2 + length_M)[goes_on_M]
    return side_N
