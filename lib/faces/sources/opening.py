"""Which format the photos at a URL are in."""

import logging
from collections import Counter

from lib import storage
from lib.errors import UserError
from lib.faces.images import PHOTO_SUFFIXES
from lib.faces.photo_names import junk
from lib.faces.sources.folder import FolderSource
from lib.faces.sources.parquet import ParquetSource
from lib.faces.sources.source import PhotoColumns, Source, suffix_of

logger = logging.getLogger(__name__)

FORMATS: dict[str, type[Source]] = {each.format: each for each in (FolderSource, ParquetSource)}
"""Every format, by the name that `--photos-format` takes."""

AUTO = "auto"

_SAMPLE = 1000
"""Files of a folder that are looked at first."""

_NOT_READ = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar", ".rec")


def open_source(
    url: str,
    *,
    photos_format: str = AUTO,
    columns: PhotoColumns | None = None,
    identities_required: bool = False,
) -> Source:
    """Return the photos at a URL: a folder of any format, or one file of a format with many photos in a file.

    With the format `auto` the first files of the folder decide, and a later file of another format ends the scan.

    Raises:
        UserError: nothing is there, or nothing that can be read.
    """
    check_format(photos_format)
    shown = storage.redacted(url)
    if not storage.exists(url):
        raise UserError(
            f"--photos {shown} is not there: put the photos there, name their folder by --photos, or set DATA_URL to "
            "the folder above photos/ (jobs/sample.py draws some to try)"
        )
    name = photos_format if photos_format != AUTO else _format_of_file(url) or _format_of_folder(url)
    foreign = {
        suffix: each.what
        for other, each in FORMATS.items()
        if other != name and photos_format == AUTO
        for suffix in each.suffixes
    }
    columns = columns or PhotoColumns()
    return FORMATS[name](url, columns, foreign=foreign, identities_required=identities_required)


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
    return None


def _format_of_folder(url: str) -> str:
    """Return the format of the first file in a folder that has one, `folder` where none has."""
    formats = {suffix: each.format for each in FORMATS.values() for suffix in each.suffixes}
    for limit in (_SAMPLE, None):
        found = Counter(
            formats[suffix]
            for info in storage.list_files(url, skip_prefixes=(), limit=limit)
            if (suffix := suffix_of(info.path)) in formats and not junk(info.path)
        )
        if found:
            # Whatever else is there ends the scan with both named.
            return FolderSource.format if FolderSource.format in found else found.most_common(1)[0][0]
    return FolderSource.format
