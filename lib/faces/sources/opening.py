"""Opens the photos at a URL, in the format that they have."""

import logging
from collections import Counter
from collections.abc import Sequence

from lib import storage
from lib.errors import UserError
from lib.faces.images import PHOTO_SUFFIXES
from lib.faces.photo_names import junk
from lib.faces.sources.archives import TarSource, ZipSource
from lib.faces.sources.arrow import ArrowSource
from lib.faces.sources.folder import FolderSource
from lib.faces.sources.image_list import ListSource
from lib.faces.sources.parquet import ParquetSource
from lib.faces.sources.patterns import matches, split_pattern
from lib.faces.sources.recordio import RecordioSource
from lib.faces.sources.source import PhotoColumns, Source
from lib.file_systems import is_local, is_s3
from lib.local_files import local_path

logger = logging.getLogger(__name__)

FORMATS: dict[str, type[Source]] = {
    each.format: each
    for each in (FolderSource, RecordioSource, TarSource, ArrowSource, ParquetSource, ZipSource, ListSource)
}
"""Every format, by the name that `--photos-format` takes."""

AUTO = "auto"

_SAMPLE = 1000
"""Number of files in a folder that decide the format."""

_NOT_READ = (".tar.zst", ".7z", ".rar")


def open_source(
    url: str,
    *,
    photos_format: str = AUTO,
    columns: PhotoColumns | None = None,
    identities_required: bool = False,
) -> Source:
    """Return the photos at a URL: a folder of any format, one file with many photos, or a pattern of such files.

    With the format `auto` the first files of the folder decide, and a later file of another format ends the scan.

    Raises:
        UserError: there is nothing, or nothing that can be read.
    """
    check_format(photos_format)
    folder, patterns = (url, ()) if storage.exists(url) else split_pattern(url)
    if not storage.exists(folder):
        raise UserError(
            f"--photos {storage.redacted(folder)} is not there: put the photos there, name their folder by --photos, "
            "or set DATA_URL to the folder above photos/ (jobs/sample.py draws some to try)"
        )
    name = photos_format if photos_format != AUTO else _format_of_file(url) or _format_of_folder(folder, patterns)
    chosen = FORMATS[name]
    others = [each for each in FORMATS.values() if each is not chosen and photos_format == AUTO]
    foreign = {
        suffix: each.what
        for each in others
        for suffix in each.suffixes
        if each is not ListSource and suffix not in chosen.companions
    }
    return chosen(
        folder,
        columns or PhotoColumns(),
        foreign=foreign,
        identities_required=identities_required,
        patterns=patterns,
    )


def _is_file(url: str) -> bool:
    """Return whether a URL that exists is a file on a disk, or one in S3 that is not empty."""
    return local_path(url).is_file() if is_local(url) else is_s3(url) and storage.file_info(url).num_bytes > 0


def check_format(photos_format: str) -> None:
    """Raise UserError for a value that `--photos-format` does not take."""
    if photos_format not in (AUTO, *FORMATS):
        raise UserError(f"--photos-format is {photos_format!r}: allowed are {', '.join((AUTO, *FORMATS))}")


def _format_of_file(url: str) -> str | None:
    """Return the format of a URL that names a file, None for a folder."""
    name = url.lower()
    for each in FORMATS.values():
        if name.endswith(each.suffixes) and each is not FolderSource:
            return each.format
    if name.endswith(_NOT_READ):
        raise UserError(
            f"--photos {storage.redacted(url)} is an archive, which is not read: unpack it, and name the folder"
        )
    if name.endswith(PHOTO_SUFFIXES):
        raise UserError(f"--photos {storage.redacted(url)} is one photo: name the folder that it lies in")
    if not split_pattern(url)[1] and _is_file(url):
        known = ", ".join(suffix for each in FORMATS.values() if each is not FolderSource for suffix in each.suffixes)
        raise UserError(
            f"--photos {storage.redacted(url)} is a file, and not one that holds photos by its name ({known}): name "
            "such a file, or a folder"
        )
    return None


def _format_of_folder(url: str, patterns: Sequence[str]) -> str:
    """Return the format of the first files in a folder that have one, `folder` if none has."""
    formats = [each for each in FORMATS.values() if each is not ListSource]
    named = frozenset(patterns)
    for limit in (None,) if patterns else (_SAMPLE, None):
        found = Counter(
            each
            for info in storage.list_files(url, skip_prefixes=(), limit=limit)
            if not junk(info.path) and (not named or matches(info.path, named))
            for each in formats
            if info.path.lower().endswith(each.suffixes)
        )
        for each, _ in found.most_common():
            # Whatever else is there ends the scan with both named.
            if all(other is each or set(other.suffixes) <= {*each.companions} for other in found):
                return each.format
        if found:
            return (FolderSource if FolderSource in found else found.most_common(1)[0][0]).format
    return FolderSource.format
