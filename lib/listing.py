"""Sorted listings: of a local folder, following its links; of an S3 bucket, page by page; of any other storage."""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa

from lib.storage_errors import explained

Act = Callable[[Callable[[fsspec.AbstractFileSystem, str], Any]], Any]
"""Runs an action on a file system and a path in it, with retries."""


class FileInfo(NamedTuple):
    """A file of a listing."""

    path: str
    """Below the listed URL."""
    num_bytes: int
    """0 where the storage does not tell."""
    mark: str = ""
    """Changes when the file changes: the time of its last change, or its ETag. "" where the storage tells neither."""


def mark_of(info: Mapping[str, Any]) -> str:
    """Return the mark of a file from what its file system says of it."""
    found = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "last_modified") if info.get(key)), "")
    return str(found).strip('"')


def local_files(root: str) -> Iterator[FileInfo]:
    """Yield the files below a folder sorted by path, with the names of one folder in memory at a time.

    Links to folders outside `root` are followed, because data sets are often made of links. A link to a folder inside
    `root`, which is listed anyway, or to a parent of `root`, is left out.
    """
    seen: set[tuple[int, int]] = set()
    # Relative paths. Those of folders end with "/", so that they sort like the paths of the files in them.
    waiting = [""]
    while waiting:
        relative = waiting.pop()
        path = os.path.join(root, relative)  # noqa: PTH118 - Path costs too much for millions of names
        with explained(path, "list"):
            try:
                status = os.stat(path)  # noqa: PTH116
                if relative == "" or relative.endswith("/"):
                    if (status.st_dev, status.st_ino) not in seen:
                        seen.add((status.st_dev, status.st_ino))
                        waiting.extend(relative + name for name in sorted(_names(path, root), reverse=True))
                    continue
            except FileNotFoundError:
                continue  # removed since its folder was read, or a broken link
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                continue  # a link to itself
        if stat.S_ISREG(status.st_mode):
            yield FileInfo(relative, status.st_size, str(status.st_mtime_ns))


def _names(path: str, root: str) -> Iterator[str]:
    """Yield the names in a folder; names of folders end with "/"."""
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


def found_files(act: Act, root: str) -> Iterator[FileInfo]:
    """Yield the files below the path `root` of any fsspec file system, sorted."""
    found = act(lambda files, path: files.find(path, detail=True))
    for path in sorted(found):
        yield FileInfo(path.removeprefix(root + "/"), found[path]["size"] or 0, mark_of(found[path]))


def s3_files(act: Act, root: str, limit: int | None = None, *, in_order: bool = True) -> Iterator[FileInfo]:
    """Yield the objects below the path `root` (bucket/key), at most about `limit`.

    s3fs's own `find` holds a kilobyte for each object, and compares each folder with all others.
    """
    pages = _s3_pages(act, root, limit)
    if in_order:
        # Amazon sorts so too, but not every server that speaks S3.
        pages = iter(pa.concat_tables(pages).sort_by("path").to_batches(max_chunksize=10_000))
    for page in pages:
        yield from map(FileInfo, *(column.to_pylist() for column in page.columns))


def _s3_pages(act: Act, root: str, limit: int | None) -> Iterator[pa.Table | pa.RecordBatch]:
    bucket, _, key = root.partition("/")
    prefix = key and key + "/"
    request: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix}
    if limit is not None:
        request["MaxKeys"] = limit
    is_last = False
    while not is_last:
        page = act(lambda files, _: files.call_s3("list_objects_v2", **request))
        found = [entry for entry in page.get("Contents", ()) if not entry["Key"].endswith("/")]
        paths = pa.array([entry["Key"].removeprefix(prefix) for entry in found], pa.large_string())
        sizes = pa.array([entry["Size"] for entry in found], pa.int64())
        marks = pa.array([mark_of(entry) for entry in found], pa.large_string())
        yield pa.table({"path": paths, "num_bytes": sizes, "mark": marks})
        is_last = limit is not None or not page.get("IsTruncated")
        request["ContinuationToken"] = page.get("NextContinuationToken", "")
