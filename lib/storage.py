"""Files on local disks and in object stores through fsspec: whole writes, bounded retries, errors in one clear line.

A URL is a local path or `scheme://…`. Credentials and endpoints come from the usual environment variables alone
(`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, …), never from a flag.

A file system is asked for anew for each action: fsspec has one for each process and finds it again, so everything here
works after a fork, in a Ray worker, and after the server was restarted.
"""

import errno
import io
import json
import logging
import os
import random
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lib.errors import JobError, UserError
from lib.storage_errors import explained, is_passing, reason_for, s3_code, shown
from lib.storage_errors import redacted as redacted  # Callers show URLs with it.

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

RETRY_SECONDS = 60.0
"""How long an action on a remote storage is tried again before the job gives up."""

CHECK_RETRY_SECONDS = 5.0
"""The same for `check_writable`: at the start of a job a silent endpoint is more likely a wrong one."""

# Never read. It keeps alive, in a forked process, the file systems of the one that was forked: at their end s3fs would
# close connections that both share, through an event loop whose thread the fork left behind. Both would then hang.
_KEPT_AFTER_FORK: dict[tuple[int, str], fsspec.AbstractFileSystem] = {}

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0

_TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{32}\.tmp")
"""Of files that `write_bytes` has not finished."""

COLUMN_BUFFER_BYTES = 4 * 2**20
"""Of a column that is read bit by bit: large enough that a bucket's latency does not count."""

S3_SCHEMES = ("s3", "s3a")

# A try of ours holds two of botocore's, of at most 20 s each. One stream a file, for the workers run side by side
# already: reading a photo then takes one request instead of two.
S3_OPTIONS = {
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 15,
        "retries": {"mode": "standard", "total_max_attempts": 2},
    },
    "max_concurrency": 1,
}


class FileInfo(NamedTuple):
    """A file of a listing: its path below the listed URL, and its size in bytes (0 where the storage does not tell)."""

    path: str
    num_bytes: int


def is_local(url: str) -> bool:
    """Return whether the URL is a path on this machine."""
    return _scheme(url) == "file"


def join(url: str, *names: str) -> str:
    """Return the URL of something below `url`."""
    return "/".join([url.rstrip("/"), *names])


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the fsspec file system of a URL, which can be pickled, and the path in it.

    Raises:
        UserError: unknown scheme, or a scheme whose driver is not installed.
    """
    scheme = _scheme(url)
    try:
        driver = fsspec.get_filesystem_class(scheme)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"{shown(url)}: the storage scheme {scheme!r} cannot be used ({error}): "
            "give a local path, s3://bucket/folder, or a scheme whose fsspec driver is installed"
        ) from error
    if scheme == "file":
        return driver(), str(_local_path(url))
    # Kept listings would hide what other processes write.
    # Host and user of an ftp:// or sftp:// URL; of s3:// ones they would be taken from odd names of photos.
    options = S3_OPTIONS if scheme in S3_SCHEMES else driver._get_kwargs_from_urls(url)
    try:
        files = driver(use_listings_cache=False, **options)
    except TypeError as error:
        raise UserError(f"{shown(url)}: the URL does not say all that {scheme!r} needs ({error})") from error
    if scheme in S3_SCHEMES:
        # Otherwise s3fs repeats each timeout five times inside each of our tries.
        files.retries = 1
        _KEPT_AFTER_FORK[os.getpid(), scheme] = files
    return files, driver._strip_protocol(url)


def exists(url: str) -> bool:
    """Return whether a file or folder is there.

    Raises:
        UserError, JobError: the storage refuses to tell, or stays away.
    """
    if is_local(url):
        with explained(url, "look for"):
            return _local_path(url).exists()
    try:
        # Not `exists`: s3fs answers that a bucket is not there when its endpoint is down.
        _remote(url, "look for", lambda files, path: files.info(path))
    except FileNotFoundError:
        return False
    return True


def read_bytes(url: str, max_bytes: int | None = None) -> bytes:
    """Return the content of a file, or its first `max_bytes` bytes.

    Raises:
        MissingFileError: it is not there.
        UserError, JobError: it may not be read, or the storage stays away.
    """
    if is_local(url):
        with explained(url, "read"):
            _refuse_special(url)
            with _local_path(url).open("rb") as file:
                return file.read(max_bytes)
    if max_bytes is None:
        return _remote(url, "read", lambda files, path: files.cat_file(path))
    return _read_range(url, 0, max_bytes)


def write_bytes(url: str, data: bytes) -> None:
    """Write a file whole or not at all; local parent folders are made.

    Raises:
        UserError, JobError: it may not be written, the disk is full, or the storage stays away.
    """
    if not is_local(url):
        # A single put, or a multipart upload that is seen only once it is complete.
        _remote(url, "write", lambda files, path: files.pipe_file(path, data))
        return
    path = _local_path(url)
    # In the same folder, for only within one disk is a rename atomic; hidden, so that no listing takes it for a file.
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    with explained(url, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def remove_unfinished(url: str) -> None:
    """Remove the files below a local folder that a process of this user was killed while it wrote by `write_bytes`.

    Of object stores nothing is seen before it is whole. No other process may be writing there.
    """
    if not is_local(url):
        return
    for info in list_files(url, suffix=".tmp", skip_prefixes=()):
        path = _local_path(url) / info.path
        if _TEMPORARY_NAME.fullmatch(path.name) and path.lstat().st_uid == os.geteuid():
            logger.info("removing %s, which a killed process has left", path)
            remove(str(path))


def read_json(url: str, wanted: Mapping[str, type | tuple[type, ...]] | None = None) -> dict[str, Any]:
    """Return the object that a JSON file of ours holds, once each of the `wanted` entries is there and of its type.

    Raises:
        UserError: it is not JSON, or of another shape; and as `read_bytes`.
    """
    next_step = "remove it and run the job that made it again"
    try:
        content = json.loads(read_bytes(url))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown(url)} is not JSON ({error}): {next_step}") from error
    if not isinstance(content, dict):
        raise UserError(f"{shown(url)} holds {type(content).__name__} where an object is wanted: {next_step}")
    for name, kind in (wanted or {}).items():
        if not isinstance(content.get(name), kind):
            found = f"is {type(content[name]).__name__}" if name in content else "is not there"
            raise UserError(f"{shown(url)} is not what a job of ours writes: {name!r} {found}: {next_step}")
    return content


def write_json(url: str, content: Any) -> None:
    """Write a JSON file that people can read, as `write_bytes` does."""
    write_bytes(url, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def open_parquet(url: str, wanted: Sequence[pa.Field] = (), *, buffer_size: int = 0) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file with the columns `wanted`: of a remote one, only what is asked for is read, with retries.

    With `buffer_size` a column is read so many bytes at a time, where otherwise it is fetched ahead as a whole.

    Raises:
        UserError: it is no Parquet file, a column is not there or of another type, or what is read turns out damaged;
            and as `read_bytes`.
    """
    if is_local(url):
        _refuse_special(url)
    source = str(_local_path(url)) if is_local(url) else pa.PythonFile(_RemoteFile(url), mode="r")
    with (
        _parquet_explained(url),
        pq.ParquetFile(source, pre_buffer=not buffer_size, buffer_size=buffer_size) as file,
    ):
        found = {each.name: each.type for each in file.schema_arrow}
        wrong = [f"{each.name} of type {each.type}" for each in wanted if found.get(each.name) != each.type]
        if wrong:
            there = ", ".join(f"{name} ({kind})" for name, kind in found.items())
            raise UserError(
                f"{shown(url)} has no column {', '.join(wrong)}, it has {there}: "
                "remove it and run the job that made it again"
            )
        yield file


def row_group_batches(url: str, group: int, column: str, num_rows: int) -> Iterator[pa.Array]:
    """Yield a column of a row group, so many rows at a time: no more is in memory; raises as `open_parquet`."""
    with open_parquet(url, buffer_size=COLUMN_BUFFER_BYTES) as file:
        for batch in file.iter_batches(num_rows, row_groups=[group], columns=[column], use_threads=False):
            yield batch.column(0)


def read_parquet(url: str, wanted: Sequence[pa.Field] = ()) -> pa.Table:
    """Return the columns `wanted` of a Parquet file, or all, as a table; raises as `open_parquet`."""
    # Not pq.read_table: below a folder such as split=train it adds a column that the file does not hold.
    with open_parquet(url, wanted) as file:
        return file.read(columns=[each.name for each in wanted] or None)


def parquet_schema(url: str) -> pa.Schema:
    """Return the schema of a Parquet file, metadata included; raises as `open_parquet`."""
    with open_parquet(url) as file:
        return file.schema_arrow


def write_parquet(url: str, table: pa.Table, **options: Any) -> None:
    """Write a table as one Parquet file, as `write_bytes` does; `options` go to `pq.write_table`."""
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    write_bytes(url, sink.getvalue())


def list_files(
    url: str, *, suffix: str | tuple[str, ...] = "", skip_prefixes: tuple[str, ...] = (".", "_")
) -> Iterator[FileInfo]:
    """Yield the files below a folder, any depth, sorted by path; a folder that is not there has none.

    Locally one folder's names are held at a time; of S3, paths and sizes, about 50 bytes a file.

    Args:
        suffix: endings to take, in lower case; upper-case names match too.
        skip_prefixes: a file is left out when its name, or that of a folder on the way to it, begins so.

    Raises:
        UserError, JobError: the folder may not be read, its bucket is not there, or the storage stays away.
    """
    if is_local(url):
        listing = _list_local(url)
    elif _scheme(url) in S3_SCHEMES:
        listing = _list_s3(url)
    else:
        listing = _list_remote(url)
    for info in listing:
        is_skipped = bool(skip_prefixes) and any(name.startswith(skip_prefixes) for name in info.path.split("/"))
        if not is_skipped and info.path.lower().endswith(suffix):
            yield info


def remove(url: str) -> None:
    """Remove a file; one that is not there is no error."""
    try:
        if is_local(url):
            with explained(url, "remove"):
                _local_path(url).unlink()
        else:
            # Not `rm`: it takes a name such as photo[1].jpg for a pattern.
            _remote(url, "remove", lambda files, path: files.rm_file(path))
    except FileNotFoundError:
        pass


def remove_tree(url: str) -> None:
    """Remove a folder and all below it; one that is not there is no error, and a bucket itself stays."""
    if is_local(url):
        path = _local_path(url)
        with explained(url, "remove"):
            if path.exists():
                shutil.rmtree(path)
        return
    for info in list_files(url, skip_prefixes=()):
        remove(join(url, info.path))


def check_writable(url: str) -> None:
    """Write and remove a small file in a folder, or in its nearest parent where it is not there yet.

    Raises:
        UserError: that cannot be done: why, and the next step.
    """
    name = f".writable-{uuid.uuid4().hex}"

    def write_and_remove(files: fsspec.AbstractFileSystem, path: str) -> None:
        files.pipe_file(join(path, name), b"?")
        files.rm_file(join(path, name))

    try:
        if not is_local(url):
            _remote(url, "write to", write_and_remove, retry_s=CHECK_RETRY_SECONDS)
            return
        with explained(url, "write to"):
            path = _local_path(url)
            folder = next(parent for parent in (path, *path.parents) if parent.exists())
            (folder / name).write_bytes(b"?")
            (folder / name).unlink()
    except JobError as error:
        raise UserError(str(error)) from error


@contextmanager
def _parquet_explained(url: str) -> Iterator[None]:
    with explained(url, "read"):
        try:
            yield
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            # Arrow calls a damaged file now the one and now the other; the system's own errors have a number.
            if isinstance(error, UserError) or getattr(error, "errno", None):
                raise
            raise UserError(
                f"{shown(url)} is no whole Parquet file: remove it and run the job that made it again"
            ) from error


class _RemoteFile(io.RawIOBase):
    """A remote file read by ranges, each of them with the usual retries (fsspec's own files give up sooner)."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._num_bytes = _remote(url, "read", lambda files, path: files.info(path))["size"]
        if self._num_bytes is None:
            raise UserError(f"{shown(url)}: the server does not say how long the file is: copy it here, and name that")
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        end = self._num_bytes if size < 0 else min(self._position + size, self._num_bytes)
        data = _read_range(self._url, self._position, end)
        self._position += len(data)
        return data


def _read_range(url: str, start: int, end: int) -> bytes:
    if start >= end:
        return b""
    try:
        return _remote(url, "read", lambda files, path: files.cat_file(path, start=start, end=end))
    except JobError as error:
        # No range of an empty file can be had.
        if s3_code(error.__cause__) == "InvalidRange":
            return b""
        raise


def _list_local(url: str) -> Iterator[FileInfo]:
    root = str(_local_path(url))
    seen: set[tuple[int, int]] = set()
    # Relative paths, those of folders with "/" at the end: so they sort as the paths of the files in them do.
    waiting = [""]
    while waiting:
        relative = waiting.pop()
        path = os.path.join(root, relative)  # noqa: PTH118 - Path costs too much for millions of names
        with explained(path, "list"):
            try:
                if relative == "" or relative.endswith("/"):
                    folder = os.stat(path)  # noqa: PTH116
                    if (folder.st_dev, folder.st_ino) not in seen:
                        seen.add((folder.st_dev, folder.st_ino))
                        waiting.extend(relative + name for name in sorted(_names_in_folder(path, root), reverse=True))
                    continue
                status = os.stat(path)  # noqa: PTH116
            except FileNotFoundError:
                continue  # Removed since its folder was read, or a link to nowhere.
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                continue  # A link to itself.
        if stat.S_ISREG(status.st_mode):
            yield FileInfo(relative, status.st_size)


def _names_in_folder(path: str, root: str) -> Iterator[str]:
    """Yield the names in a folder, those of folders with "/" at the end.

    A link to a folder outside `root` is followed: data sets are often made of links. One that leads to a folder in
    `root`, which is listed by its own name, or to a folder around it, is left out.
    """
    with os.scandir(path) as entries:
        for entry in entries:
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link to itself
                continue
            if not is_folder:
                yield entry.name
            elif not (entry.is_symlink() and _is_near(Path(entry.path).resolve(), Path(root).resolve())):
                yield entry.name + "/"


def _is_near(folder: Path, root: Path) -> bool:
    return folder.is_relative_to(root) or root.is_relative_to(folder)


def _list_s3(url: str) -> Iterator[FileInfo]:
    """Yield the objects below a prefix, page by page, where `find` would hold a kilobyte for each of them."""
    bucket, _, key = filesystem(url)[1].partition("/")
    prefix = key and key + "/"
    pages = []
    request = {"Bucket": bucket, "Prefix": prefix}
    while True:
        answer = _remote(url, "list", lambda files, _: files.call_s3("list_objects_v2", **request))
        found = [entry for entry in answer.get("Contents", ()) if not entry["Key"].endswith("/")]
        paths = pa.array([entry["Key"].removeprefix(prefix) for entry in found], pa.large_string())
        pages.append(
            pa.record_batch({"path": paths, "num_bytes": pa.array([entry["Size"] for entry in found], pa.int64())})
        )
        if not answer.get("IsTruncated"):
            break
        request["ContinuationToken"] = answer["NextContinuationToken"]
    files = pa.Table.from_batches(pages)
    # Amazon's own order is this one already, but not that of every server that speaks S3.
    for batch in files.take(pc.sort_indices(files["path"])).to_batches(max_chunksize=10_000):
        for path, num_bytes in zip(batch["path"].to_pylist(), batch["num_bytes"].to_pylist(), strict=True):
            yield FileInfo(path, num_bytes)


def _list_remote(url: str) -> Iterator[FileInfo]:
    found = _remote(url, "list", lambda files, path: files.find(path, detail=True))
    root = filesystem(url)[1].rstrip("/") + "/"
    for path in sorted(found):
        yield FileInfo(path.removeprefix(root), found[path]["size"] or 0)


def _remote(
    url: str, doing: str, action: Callable[[fsspec.AbstractFileSystem, str], Result], *, retry_s: float | None = None
) -> Result:
    """Run an action on a remote storage, again for `retry_s` (`RETRY_SECONDS`) while its fault is a passing one."""
    last_try = time.monotonic() + (RETRY_SECONDS if retry_s is None else retry_s)
    pause_s = FIRST_PAUSE_S
    with explained(url, doing):
        while True:
            try:
                return action(*filesystem(url))
            except Exception as error:
                this_pause_s = pause_s * random.uniform(0.5, 1)
                if not is_passing(error) or time.monotonic() + this_pause_s > last_try:
                    raise
                reason = reason_for(error)
            logger.warning("cannot %s %s: %s; trying again in %.1f s", doing, shown(url), reason, this_pause_s)
            time.sleep(this_pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _scheme(url: str) -> str:
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", url)
    return match[1].lower() if match else "file"


def _refuse_special(url: str) -> None:
    """Raise UserError for a pipe or a device: who opens one may wait for ever."""
    with explained(url, "read"):
        path = _local_path(url)
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{shown(url)} is a pipe or a device: write its content into a file, and name that")


def _local_path(url: str) -> Path:
    return Path(url.removeprefix("file://")).absolute()
