"""Files on local disks and in object stores: whole writes, bounded retries, and one clear line for each error."""

import io
import json
import logging
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from lib import parquet_files
from lib.errors import JobError, UserError
from lib.file_systems import S3_OPTIONS as S3_OPTIONS
from lib.file_systems import filesystem, is_local, is_s3
from lib.listing import FileInfo, found_files, local_files, mark_of, s3_files, s3_pages
from lib.local_files import has_entries, local_path, refuse_special, remove_temporary_files, write_whole
from lib.redaction import redacted as redacted  # Callers show URLs with it.
from lib.redaction import shown
from lib.storage_errors import MissingFileError, explained, is_passing, reason_for, s3_code

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Action = Callable[[fsspec.AbstractFileSystem, str], Result]

RETRY_SECONDS = 60.0
"""How long an action on a remote storage is retried before the job fails."""

CHECK_RETRY_SECONDS = 5.0
"""The same for `check_writable`: at the start of a job, a silent endpoint is more likely a wrong one."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0


def join(url: str, *names: str) -> str:
    """Return the URL of something below `url`."""
    return "/".join([url.rstrip("/"), *names])


def exists(url: str) -> bool:
    """Return whether a file or folder exists.

    Raises:
        UserError, JobError: the storage refuses the question, or does not answer.
    """
    if is_local(url):
        with explained(url, "look for"):
            return local_path(url).exists()
    try:
        # Not `exists`: s3fs says that a bucket does not exist when its endpoint is down.
        _act(url, "look for", lambda files, path: files.info(path))
    except FileNotFoundError:
        return False
    return True


def holds_anything(url: str) -> bool:
    """Return whether a folder exists and is not empty; raises as `exists`."""
    # A folder of a bucket exists as long as it holds a file.
    return has_entries(local_path(url)) if is_local(url) else exists(url)


def read_bytes(url: str, max_bytes: int | None = None) -> bytes:
    """Return the content of a file, or its first `max_bytes` bytes.

    Raises:
        MissingFileError: it does not exist.
        UserError, JobError: it may not be read, or the storage does not answer.
    """
    if is_local(url):
        refuse_special(url)
    if max_bytes is not None:
        return read_range(url, 0, max_bytes)
    return _act(url, "read", lambda files, path: files.cat_file(path))


def write_bytes(url: str, data: bytes, *, is_private: bool = False) -> None:
    """Write a file whole or not at all; local parent folders are made. A private local file is its user's alone.

    Raises:
        UserError, JobError: it may not be written, the disk is full, or the storage does not answer.
    """
    if not is_local(url):
        # A single put, or a multipart upload that becomes visible once it is complete.
        _act(url, "write", lambda files, path: files.pipe_file(path, data))
        return
    with explained(url, "write"):
        write_whole(local_path(url), data, 0o600 if is_private else 0o666)


def remove_unfinished(url: str) -> None:
    """Remove what killed processes have left below a folder in `write_bytes`. No other process may be writing there."""
    if is_local(url):  # object stores show only whole files
        remove_temporary_files(local_path(url))


def read_json(url: str, wanted: Mapping[str, type | tuple[type, ...]] | None = None) -> dict[str, Any]:
    """Return the object in a JSON file of ours, after checking that it has the entries `wanted`, of these types.

    Raises:
        UserError: it is not JSON, or of another shape. Also raises as `read_bytes`.
    """
    next_step = "remove it and run the job that made it again"
    try:
        content = json.loads(read_bytes(url))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown(url)} is not JSON ({error}): {next_step}") from error
    if not isinstance(content, dict):
        raise UserError(f"{shown(url)} holds {type(content).__name__}, not an object: {next_step}")
    for name, kind in (wanted or {}).items():
        if not isinstance(content.get(name), kind):
            found = f"is {type(content[name]).__name__}" if name in content else "is missing"
            raise UserError(f"{shown(url)} is not what a job writes: {name!r} {found}: {next_step}")
    return content


def write_json(url: str, content: Any) -> None:
    """Write a JSON file that people can read, as `write_bytes` does."""
    write_bytes(url, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def open_parquet(url: str, wanted: Sequence[pa.Field] = (), *, buffer_size: int = 0) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file as `parquet_files.opened` does; of a remote file, only the parts that are used are read."""
    with explained(url, "read"):
        if is_local(url):
            refuse_special(url)
            source = str(local_path(url))
        else:
            num_bytes = _act(url, "read", lambda files, path: files.info(path))["size"]
            source = parquet_files.ranged(num_bytes, partial(read_range, url), shown(url))
        with parquet_files.opened(source, shown(url), wanted, buffer_size) as file:
            yield file


def read_parquet(url: str, wanted: Sequence[pa.Field] = ()) -> pa.Table:
    """Return the columns `wanted` of a Parquet file, or all, as a table; raises as `open_parquet`."""
    # Not pq.read_table: in a folder such as split=train it adds a column that the file does not have.
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


def file_info(url: str) -> FileInfo:
    """Return size and mark of a file, with the path "".

    Raises:
        UserError, JobError: it is not there, may not be read, or the storage stays away.
    """
    if is_local(url):
        refuse_special(url)
        with explained(url, "read"):
            status = local_path(url).stat()
        return FileInfo("", status.st_size, str(status.st_mtime_ns))
    info = _act(url, "read", lambda files, path: files.info(path))
    return FileInfo("", info.get("size") or 0, mark_of(info))


def list_files(
    url: str,
    *,
    suffix: str | tuple[str, ...] = "",
    skip_prefixes: tuple[str, ...] = (".", "_"),
    limit: int | None = None,
    in_order: bool = True,
) -> Iterator[FileInfo]:
    """Yield the files below a folder, at any depth, sorted by path; a missing folder has none.

    Memory: the names of one folder at a time of a local listing; 90 bytes a file, for all files, of one of S3.

    Args:
        in_order: False leaves S3's files in the order of its answers, with a thousand at a time in memory.
        limit: look at about so many files at most. Their order may not be that of the whole listing.
        suffix: endings to take, in lower case; upper-case names match too.
        skip_prefixes: a file is left out if its name, or that of a folder in its path, begins with one of these.

    Raises:
        UserError, JobError: the folder may not be read, its bucket does not exist, or the storage does not answer.
    """
    if is_local(url):
        listing = local_files(str(local_path(url)))
    else:
        act, root = partial(_act, url, "list"), filesystem(url)[1].rstrip("/")
        listing = s3_files(act, root, limit, in_order=in_order) if is_s3(url) else found_files(act, root)
    for info in islice(listing, limit):
        is_skipped = any(name.startswith(skip_prefixes) for name in info.path.split("/"))
        if not is_skipped and info.path.lower().endswith(suffix):
            yield info


def bucket_pages(url: str, **options: Any) -> Iterator[tuple[pa.Table, list[str], str]]:
    """Yield the pages of the listing of a folder in S3; takes what `s3_pages` takes, raises as `list_files`."""
    return s3_pages(partial(_act, url, "list"), filesystem(url)[1].rstrip("/"), **options)


def children(url: str) -> tuple[list[str], list[str]]:
    """Return the names of the files and of the folders in a folder, sorted; none if it is missing; as `list_files`."""
    try:
        found = _act(url, "list", lambda files, path: files.ls(path, detail=True))
    except MissingFileError:
        return [], []
    names: tuple[list[str], list[str]] = [], []
    for each in found:
        names[each["type"] == "directory"].append(str(each["name"]).rstrip("/").rpartition("/")[2])
    return sorted(names[0]), sorted(names[1])


def remove(url: str) -> None:
    """Remove a file; a missing one is no error."""
    with suppress(FileNotFoundError):
        # Not `rm`: it treats a name such as photo[1].jpg as a pattern.
        _act(url, "remove", lambda files, path: files.rm_file(path))


def remove_tree(url: str) -> None:
    """Remove a folder and all below it; a missing one is no error, and a bucket itself stays."""
    if not is_local(url):
        for info in list_files(url, skip_prefixes=()):
            remove(join(url, info.path))
    elif exists(url):
        with explained(url, "remove"):
            shutil.rmtree(local_path(url))


def check_writable(url: str) -> None:
    """Write and remove a small file in a folder, or in its nearest existing parent.

    Raises:
        UserError: why this fails, and the next step.
    """
    name = f".writable-{uuid.uuid4().hex}"

    def write_and_remove(files: fsspec.AbstractFileSystem, path: str) -> None:
        if is_local(url):
            folder = local_path(url)
            path = str(next(parent for parent in (folder, *folder.parents) if parent.exists()))
        files.pipe_file(join(path, name), b"?")
        files.rm_file(join(path, name))

    try:
        _act(url, "write to", write_and_remove, retry_s=CHECK_RETRY_SECONDS)
    except JobError as error:
        raise UserError(str(error)) from error


def read_range(url: str, start: int, end: int) -> bytes:
    """Return the bytes of a file from `start` up to `end`, fewer if it ends before; raises as `read_bytes`."""
    if is_local(url):
        with explained(url, "read"), local_path(url).open("rb", buffering=0) as file:
            file.seek(start)
            return file.read(end - start)
    try:
        return _act(url, "read", lambda files, path: files.cat_file(path, start=start, end=end))
    except JobError as error:
        # An empty file has no valid range.
        if s3_code(error.__cause__) == "InvalidRange":
            return b""
        raise


def _act(url: str, doing: str, action: Action[Result], *, retry_s: float | None = None) -> Result:
    """Run an action on the file system of a URL and the path in it.

    On a remote one, passing faults are retried for `retry_s`, or for `RETRY_SECONDS`.
    """
    last_try = time.monotonic() + (RETRY_SECONDS if retry_s is None else retry_s)
    pause_s = FIRST_PAUSE_S
    with explained(url, doing):
        while True:
            try:
                return action(*filesystem(url))
            except Exception as error:
                this_pause_s = pause_s * random.uniform(0.5, 1)
                if is_local(url) or not is_passing(error) or time.monotonic() + this_pause_s > last_try:
                    raise
                reason = reason_for(error)
            logger.warning("cannot %s %s: %s; trying again in %.1f s", doing, shown(url), reason, this_pause_s)
            time.sleep(this_pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
