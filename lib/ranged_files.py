"""Files read by ranges, from a disk or from a bucket, a block of them in memory at a time."""

import errno
import io
from typing import Any

from lib import storage

BLOCK_BYTES = 4 * 2**20
"""Large enough that a bucket's latency does not count, small enough that many workers can hold one."""


class RangedFile(io.RawIOBase):
    """A file of which one block is in memory. It can be read at a place, or as any binary file.

    Raises:
        UserError, JobError: from every read, as `storage.read_range` does.
    """

    def __init__(self, url: str, num_bytes: int | None = None, *, block_bytes: int = BLOCK_BYTES) -> None:
        """Open a file; `num_bytes` is its size, where that is known."""
        super().__init__()
        self.url = url
        self.num_bytes = storage.file_info(url).num_bytes if num_bytes is None else num_bytes
        self._block_bytes = block_bytes
        self._start, self._block = 0, b""
        self._position = 0

    def at(self, start: int, length: int) -> bytes:
        """Return `length` bytes from `start` on, fewer where the file ends; none before its beginning."""
        if start < 0:
            return b""
        first = start - self._start
        if first < 0 or first + length > len(self._block):
            stop = min(self.num_bytes, start + max(length, self._block_bytes))
            if stop <= start:
                return b""
            self._start, self._block = start, storage.read_range(self.url, start, stop)
            first = 0
        return self._block[first : first + length]

    def seekable(self) -> bool:
        """Return True."""
        return True

    def readable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a place, and return it."""
        position = offset + (0, self._position, self.num_bytes)[whence]
        if position < 0:
            raise OSError(errno.EINVAL, "a place before the beginning of the file")
        self._position = position
        return self._position

    def tell(self) -> int:
        """Return the place of the next read."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with the next bytes, and return how many there were."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes, all of them without a size."""
        left = max(0, self.num_bytes - self._position)
        data = self.at(self._position, left if size is None or size < 0 else min(size, left))
        self._position += len(data)
        return data
