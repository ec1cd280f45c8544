"""The records of a RecordIO file: where they begin and end, and their data. See `recordio.py` for the format.

Shapes: N records.
"""

import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lib import storage
from lib.faces.sources.source import Run
from lib.ranged_files import RangedFile

MAGIC = bytes.fromhex("0a23d7ce")
FRAME = struct.Struct("<4sI")
HEADER = struct.Struct("<IfQQ")
LABEL = struct.Struct("<f")
_HEAD_BYTES = FRAME.size + HEADER.size
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)

_SEARCH_BYTES = 2**20

_RUN_BYTES = 64 * 2**20
"""Most bytes of a file that are read for one run."""
_LABELS_BYTES = 64 * LABEL.size
"""Bytes read behind the last record of a run for its labels, which the size of its image does not count."""


class Record(NamedTuple):
    """The place of a record.

    Attributes:
        start: of its first frame.
        pieces: place and length of its data.
        stop: where the next record begins.
    """

    start: int
    pieces: tuple[tuple[int, int], ...]
    stop: int

    @property
    def num_bytes(self) -> int:
        """The length of its data, with the magic put back between the pieces."""
        return sum(length for _, length in self.pieces) + len(MAGIC) * (len(self.pieces) - 1)


class CutOffError(ValueError):
    """The file ends before the record does."""


def record_at(file: RangedFile, start: int) -> Record:
    """Return the record that begins at a place.

    Raises:
        CutOffError: the file ends within it.
        ValueError: none begins there, or its pieces do not follow each other.
    """
    pieces: list[tuple[int, int]] = []
    position = start
    while True:
        frame = file.at(position, FRAME.size)
        if len(frame) < FRAME.size:
            raise CutOffError
        magic, lrec = FRAME.unpack(frame)
        cflag, length = lrec >> 29, lrec & (1 << 29) - 1
        if magic != MAGIC or cflag not in ((_MIDDLE, _LAST) if pieces else (_WHOLE, _FIRST)):
            raise ValueError
        pieces.append((position + FRAME.size, length))
        position += FRAME.size + length
        if position > file.num_bytes:
            raise CutOffError
        position += -length % 4
        if cflag in (_WHOLE, _LAST):
            return Record(start, tuple(pieces), position)


def content(file: RangedFile, record: Record, start: int, length: int) -> bytes:
    """Return `length` bytes of a record's data from `start` on, with the magic between its pieces; fewer at its end."""
    if len(record.pieces) == 1:
        ((place, num_bytes),) = record.pieces
        return file.at(place + start, min(length, num_bytes - start)) if start < num_bytes else b""
    data = bytearray()
    for number, (place, num_bytes) in enumerate(record.pieces):
        data += (MAGIC if number else b"") + file.at(place, min(num_bytes, start + length))
        if len(data) >= start + length:
            break
    return bytes(data[start : start + length])


def next_start(file: RangedFile, position: int, stop: int) -> int:
    """Return the start of the next complete record at or after a place, `stop` if there is none before it."""
    position += -position % 4
    while position < stop:
        data = file.at(position, _SEARCH_BYTES)
        found = data.find(MAGIC)
        while found >= 0:
            if found % 4 == 0 and position + found < stop and _is_start(file, position + found):
                return position + found
            found = data.find(MAGIC, found + 1)
        # The magic is at multiples of four bytes, so no two blocks share one.
        position += _SEARCH_BYTES
    return stop


def _is_start(file: RangedFile, position: int) -> bool:
    """Return whether a whole record begins at a place, and another, or the end of the file, follows it.

    Writers that do not cut records leave the magic within images.
    """
    try:
        return is_followed(file, record_at(file, position))
    except ValueError:
        return False


def is_followed(file: RangedFile, record: Record) -> bool:
    return record.stop >= file.num_bytes or file.at(record.stop, len(MAGIC)) == MAGIC


def read_run(url: str, start_N: NDArray[np.int64], size_N: NDArray[np.int64]) -> Run | None:
    """Return the images of records in one read; None if they lie too far apart, or are too large together.

    Args:
        url: of the file.
        start_N: where the records begin, ascending.
        size_N: bytes of their images, which decide how much is read.
    """
    first, last = int(start_N[0]), int(start_N[-1])
    stop = last + _HEAD_BYTES + int(size_N[-1]) + _LABELS_BYTES
    if stop - first > min(_RUN_BYTES, 2 * (int(size_N.sum()) + len(size_N) * _HEAD_BYTES) + _LABELS_BYTES):
        return None
    data_B = np.frombuffer(storage.read_range(url, first, stop), np.uint8)
    words = data_B[: len(data_B) // 4 * 4].view("<u4")
    at_N = start_N - first
    is_read_N = (at_N % 4 == 0) & (at_N + _HEAD_BYTES <= len(data_B))
    word_N = np.where(is_read_N, at_N // 4, 0)
    if not is_read_N.any():
        return None
    magic_N, lrec_N, num_labels_N = (words[word_N + place].astype(np.int64) for place in range(3))
    begin_N = at_N + _HEAD_BYTES + LABEL.size * num_labels_N
    end_N = at_N + FRAME.size + (lrec_N & (1 << 29) - 1)
    is_whole_N = is_read_N & (magic_N == int.from_bytes(MAGIC, "little")) & (lrec_N >> 29 == _WHOLE)
    is_whole_N &= (begin_N < end_N) & (end_N <= len(data_B))
    start_N, stop_N = np.where(is_whole_N, begin_N, -1), np.where(is_whole_N, end_N, -1)
    if np.any(np.diff(at_N) <= 0) or np.any(stop_N[:-1] > at_N[1:]):
        return None
    return Run(data_B, start_N, stop_N)
