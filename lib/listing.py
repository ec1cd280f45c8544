"""Sorted listings: of a local folder, following its links; of an S3 bucket, page by page; of any other storage."""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def local_files(
    root: str, folders: Sequence[str] = ("",), left: list[str] | None = None, *, deep: bool = True
) -> Iterator[FileInfo]:
    """Yield the files below a folder, or below these folders in it, sorted by path.

    The names of one folder are in memory at a time. Links to folders outside `root` are followed, because data sets are
    often made of links. A link to a folder inside `root`, which is listed anyway, or to a parent of `root`, is left
    out.

    Args:
        folders: paths below `root` that end with "/"; "" for `root` itself.
        left: if given, links to folders are not followed, but added to this list. So are all folders in `folders` if
            `deep` is False.
    """

    def _leaves(name: str, is_link: bool) -> bool:
        return left is not None and name.endswith("/") and (is_link or not deep)

    seen: set[tuple[int, int]] = set()
    # Relative paths. Those of folders end with "/", so that they sort like the paths of the files in them.
    waiting = sorted(folders, reverse=True)
    while waiting:
        relative = waiting.pop()
        path = os.path.join(root, relative)  # noqa: PTH118 - Path costs too much for millions of names
        with explained(path, "list"):
            try:
                status = os.stat(path)  # noqa: PTH116
                if relative == "" or relative.endswith("/"):
                    if (status.st_dev, status.st_ino) not in seen:
                        seen.add((status.st_dev, status.st_ino))
                        found = sorted(_names(path, root), reverse=True)
                        waiting.extend(relative + name for name, is_link in found if not _leaves(name, is_link))
                        if left is not None:
                            left.extend(relative + name for name, is_link in found if _leaves(name, is_link))
                    continue
            except FileNotFoundError:
                continue  # removed since its folder was read, or a broken link
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                continue  # a link to itself
        if stat.S_ISREG(status.st_mode):
            yield FileInfo(relative, status.st_size, str(status.st_mtime_ns))


def _names(path: str, root: str) -> Iterator[tuple[str, bool]]:
    """Yield the names in a folder, and which are links to folders; names of folders end with "/"."""
    with os.scandir(path) as entries:
        for entry in entries:
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link to itself
                continue
            if not is_folder:
                yield entry.name, False
            elif not ((is_link := entry.is_symlink()) and _is_near(Path(entry.path).resolve(), Path(root).resolve())):
                yield entry.name + "/", is_link


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
    pages = (page for page, _, _ in s3_pages(act, root, limit))
    if in_order:
        # Amazon sorts so too, but not every server that speaks S3.
        pages = iter(pa.concat_tables(pages).sort_by("path").to_batches(max_chunksize=10_000))
    for page in pages:
        yield from map(FileInfo, *(column.to_pylist() for column in page.columns))


def s3_pages(
    act: Act, root: str, limit: int | None = None, *, prefix: str = "", after: str = "", deep: bool = True
) -> Iterator[tuple[pa.Table, list[str], str]]:
    """Yield the pages of a listing below the path `root` (bucket/key), in the order of the server.

    A page is its files, its folders, and its last name, from which a later listing goes on. All names are those below
    `root`; folders end with "/".

    Args:
        limit: names in the only page.
        prefix: with which the names begin, of whole folders or not.
        after: the last name of an earlier page.
        deep: False gives the files and folders in one folder, instead of all files below it.
    """
    bucket, _, key = root.partition("/")
    above = key and key + "/"
    request: dict[str, Any] = {"Bucket": bucket, "Prefix": above + prefix}
    request |= {} if limit is None else {"MaxKeys": limit}
    request |= {} if deep else {"Delimiter": "/"}
    request |= {"StartAfter": above + after} if after else {}
    is_last = False
    while not is_last:
        page = act(lambda files, _: files.call_s3("list_objects_v2", **request))
        found = [entry for entry in page.get("Contents", ()) if not entry["Key"].endswith("/")]
        paths = pa.array([entry["Key"].removeprefix(above) for entry in found], pa.large_string())
        sizes = pa.array([entry["Size"] for entry in found], pa.int64())
        marks = pa.array([mark_of(entry) for entry in found], pa.large_string())
        folders = [entry["Prefix"].removeprefix(above) for entry in page.get("CommonPrefixes", ())]
        last = max((entry["Key"].removeprefix(above) for entry in page.get("Contents", ())[-1:]), default="")
        yield pa.table({"path": paths, "num_bytes": sizes, "mark": marks}), folders, max([last, *folders[-1:]])
        is_last = limit is not None or not page.get("IsTruncated")
        request["ContinuationToken"] = page.get("NextContinuationToken", "")
