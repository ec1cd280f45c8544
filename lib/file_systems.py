"""The fsspec file system of a URL, with our settings for S3.

A URL is a local path or `scheme://…`. Credentials and endpoints come only from the usual environment variables
(`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, …), never from a flag.
"""

import os
import re

import fsspec

from lib.errors import UserError
from lib.local_files import local_path
from lib.redaction import shown

S3_SCHEMES = ("s3", "s3a")

# One of our tries makes two requests of at most 20 s each. Workers read in parallel anyway, so one stream reads a file:
# a photo then takes one request instead of two.
S3_OPTIONS = {
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 15,
        "retries": {"mode": "standard", "total_max_attempts": 2},
    },
    "max_concurrency": 1,
}

# Never read. In a forked process it keeps the file systems of the parent alive. Otherwise s3fs would close connections
# that both processes share, through an event loop whose thread does not exist after the fork.
_KEPT_AFTER_FORK: dict[tuple[int, str], fsspec.AbstractFileSystem] = {}


def scheme_of(url: str) -> str:
    """Return the scheme of a URL, `file` for a local path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", url)
    return match[1].lower() if match else "file"


def is_local(url: str) -> bool:
    """Return whether the URL is a path on this machine."""
    return scheme_of(url) == "file"


def is_s3(url: str) -> bool:
    """Return whether the URL is in an S3 bucket."""
    return scheme_of(url) in S3_SCHEMES


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the fsspec file system of a URL, which can be pickled, and the path in it.

    fsspec keeps one file system for each process. So asking again is cheap, and it works after a fork and in a Ray
    worker.

    Raises:
        UserError: unknown scheme, or a scheme whose driver is not installed.
    """
    scheme = scheme_of(url)
    if scheme == "file":
        return fsspec.filesystem("file"), str(local_path(url))
    # Only user and host are parsed: fsspec would find options and chained URLs in the names of photos.
    authority, slash, path = url.partition("://")[2].partition("/")
    try:
        # Cached listings would hide what other processes write.
        options = S3_OPTIONS if scheme in S3_SCHEMES else {}
        files, root = fsspec.url_to_fs(f"{scheme}://{authority}", use_listings_cache=False, **options)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"{shown(url)}: the storage scheme {scheme!r} cannot be used ({error}): "
            "give a local path, s3://bucket/folder, or a scheme whose fsspec driver is installed"
        ) from error
    except TypeError as error:
        raise UserError(f"{shown(url)}: {scheme!r} needs more than the URL says ({error})") from error
    if scheme in S3_SCHEMES:
        # Otherwise s3fs repeats each timeout five times in each of our tries.
        files.retries = 1
        _KEPT_AFTER_FORK[os.getpid(), scheme] = files
    return files, root.rstrip("/") + slash + path
