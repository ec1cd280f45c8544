"""Opens Parquet files and checks their columns; a damaged file gives one clear line."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.spec import AbstractBufferedFile

from lib.errors import UserError

_NEXT_STEP = "remove it and run the job that made it again"


class RangedFile(AbstractBufferedFile):
    """A file of `num_bytes` bytes without a cache. `read_range` takes the first byte and the one after the last."""

    def __init__(self, num_bytes: int, read_range: Callable[[int, int], bytes]) -> None:
        self._read_range = read_range
        super().__init__(None, "", size=num_bytes, cache_type="none")

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self._read_range(start, end)


def ranged(num_bytes: int | None, read_range: Callable[[int, int], bytes], name: str) -> pa.PythonFile:
    """Return a file for `opened`, of which only the parts that are used are read; messages call it `name`."""
    if num_bytes is None:
        raise UserError(f"{name}: the server does not say how long the file is: copy it to a disk, and name the copy")
    return pa.PythonFile(RangedFile(num_bytes, read_range), mode="r")


@contextmanager
def opened(source: Any, name: str, wanted: Sequence[pa.Field], buffer_size: int) -> Iterator[pq.ParquetFile]:
    """Open a path or file that must have the columns `wanted`; messages call it `name`.

    With `buffer_size` a column is read in pieces of that many bytes. Otherwise it is fetched as a whole.

    Raises:
        UserError: it is no Parquet file, a column is missing or of another type, or the data is damaged.
    """
    try:
        with pq.ParquetFile(source, pre_buffer=not buffer_size, buffer_size=buffer_size) as file:
            found = {each.name: each.type for each in file.schema_arrow}
            wrong = [f"{each.name} of type {each.type}" for each in wanted if found.get(each.name) != each.type]
            if wrong:
                there = ", ".join(f"{name} ({kind})" for name, kind in found.items())
                raise UserError(f"{name} has no column {', '.join(wrong)}, it has {there}: {_NEXT_STEP}")
            yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        # Arrow raises several errors for a damaged file. Errors of the system have a number.
        if isinstance(error, UserError) or getattr(error, "errno", None):
            raise
        raise UserError(f"{name} is no whole Parquet file: {_NEXT_STEP}, or copy it again if it is yours") from error
