"""Cache files on a node's scratch disk: made once, readable by their user only, removed when nobody uses them.

Faces are personal data. A file that is not ours, such as a link in a folder that others can write to, is refused.
"""

import errno
import fcntl
import logging
import os
import stat
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pyarrow as pa

from lib.errors import JobError, UserError
from lib.scratch import node_scratch

logger = logging.getLogger(__name__)

KEPT_DAYS = 7
"""Caches in the default folder that no training has used for so long are removed when another is made."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

ROWS_PER_BATCH = 1024
"""Rows of every batch but the last, so that a row's number gives its place. Even with crops of 2 MB a batch fits the
32-bit offsets of `binary`."""

CACHE_SCHEMA = pa.schema(
    [
        pa.field("photo", pa.string(), nullable=False),
        pa.field("identity", pa.string(), nullable=False),
        pa.field("crop", pa.binary(), nullable=False),
    ]
)

ROW_FIELD = pa.field("row", pa.int64(), nullable=False)
"""A fourth column, of files that hold some rows of a table: their numbers in it, ascending."""


class CacheFullError(JobError):
    """The disk of `--cache-dir` has too little room."""

    def __init__(self, folder: Path, needed: str) -> None:
        """Say what is `needed` there."""
        self.folder = folder
        super().__init__(f"--cache-dir {str(folder)!r} is full: {needed}; make room or choose another folder")


def default_folder() -> str:
    """Return this user's own folder of caches on this node, and make it if it does not exist. It outlives a job.

    Raises:
        UserError: a link, a file, or another user's folder has its name.
    """
    folder = node_scratch() / f"conv-facenet-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error}): name a folder of your own by --cache-dir") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise UserError(f"{folder} is a link or another user's: name a folder of your own by --cache-dir")
    folder.chmod(0o700)
    return str(folder)


def made_once(path: Path, cache_dir: str, build: Callable[[], None]) -> str:
    """Return the path of a cache file; one of the processes of a node that ask for it calls `build`.

    Raises:
        UserError: `cache_dir` cannot be written to, or a file of that name there is not ours.
    """
    folder = path.parent
    if _is_there(path):
        return str(path)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(path.with_suffix(".lock"), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise CacheFullError(folder, "it has no room for another file") from error
        raise UserError(f"--cache-dir {cache_dir!r} cannot be written to ({error}): choose another folder") from error
    with os.fdopen(lock, "wb"), _locked(lock, path):
        if not _is_there(path):
            if cache_dir == default_folder():
                _remove_old(folder)
            build()
    return str(path)


def _is_there(path: Path) -> bool:
    """Return whether a cache exists, and record that it is used.

    Raises:
        UserError: the file is not ours.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"--cache-dir {str(path.parent)!r} cannot be read ({error}): choose another folder") from error
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        raise UserError(f"{path} is a link or another user's: choose another --cache-dir")
    os.utime(path, ns=(time.time_ns(), found.st_mtime_ns))
    return True


def _remove_old(folder: Path) -> None:
    for path in (*folder.glob("faces-*.arrow"), *folder.glob("faces-*.unfinished")):
        with suppress(FileNotFoundError):
            unused_s = time.time() - max(path.stat().st_atime, path.stat().st_mtime)
            if unused_s > KEPT_DAYS * 24 * 3600:
                logger.info("removing %s, which no training has used for %d days", path, unused_s // (24 * 3600))
                path.unlink()


@contextmanager
def _locked(descriptor: int, path: Path) -> Iterator[None]:
    """Hold the lock, which the system frees if the process dies."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("waiting for another process of this node to make %s", path)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield


def disk_full(folder: Path, num_bytes_needed: int) -> CacheFullError:
    return CacheFullError(folder, f"the crops need {num_bytes_needed:,} bytes there")


def write_batches(
    path: Path, batches: Generator[pa.RecordBatch, None, None], num_bytes: int, schema: pa.Schema = CACHE_SCHEMA
) -> int:
    """Write a cache file from batches that need about so many bytes; return its number of rows.

    It is written under a temporary name. Without rows there is no file.

    Raises:
        CacheFullError: the disk is full.
    """
    temporary = path.with_suffix(".unfinished")
    try:
        with closing(batches):
            num_rows = _written(temporary, batches, schema)
        if num_rows:
            temporary.replace(path)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise disk_full(path.parent, num_bytes) from error
    finally:
        temporary.unlink(missing_ok=True)
    return num_rows


def _written(path: Path, batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> int:
    """Write a file of this user alone, down to the disk; return its number of rows."""
    num_rows = 0
    path.unlink(missing_ok=True)  # of a process that was killed, or a link of somebody else
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as sink:
        with pa.ipc.new_file(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
                num_rows += len(batch)
        sink.flush()
        os.fsync(sink.fileno())  # after a power cut the name must not exist without the content
    return num_rows
