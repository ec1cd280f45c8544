"""Photos named by a list that exists already, so that no folder is listed: text, CSV, Parquet, or an S3 Inventory."""

import csv
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote_plus

from lib import storage
from lib.errors import UserError
from lib.faces.photo_names import safe_name
from lib.faces.sources.folder import FolderSource
from lib.faces.sources.source import PhotoColumns, Shard
from lib.listing import FileInfo
from lib.local_files import refuse_special
from lib.ranged_files import RangedFile

_ROWS_AT_ONCE = 65_536
_COLUMN_BUFFER_BYTES = 4 * 2**20

_INVENTORY = {"sourceBucket": str, "destinationBucket": str, "fileFormat": str, "fileSchema": str, "files": list}
"""Entries of the manifest.json of an Inventory (Amazon S3 User Guide, "Inventory manifest")."""

_MEASURES = (("size", "numbytes"), ("etag", "mark"))
_OLD_VERSION = {"islatest": "false", "isdeletemarker": "true"}
"""Columns of an Inventory of a bucket with versions, and their values where an object is not there any more."""


class PhotoList(FolderSource):
    """Photos in a folder of which a list has the names. A photo that is not there becomes `missing` when it is read.

    A name is that below the folder, or a whole path or URL. The list is read piece by piece.
    """

    what = "photos of a list"

    def __init__(self, url: str, columns: PhotoColumns, *, list_url: str) -> None:
        """Make the source of the photos below `url` that the file `list_url` names.

        Raises:
            UserError: one of them is not there.
        """
        for flag, each in (("--photos", url), ("--photo-list", list_url)):
            if not storage.exists(each):
                raise UserError(f"{flag} {storage.redacted(each)} is not there: correct the path")
        super().__init__(url, columns, foreign={})
        self.list_url = list_url
        self._folder = url.removeprefix("file://").rstrip("/") + "/"

    def shards(self) -> list[Shard]:
        """Return the list, or each file of an Inventory.

        Raises:
            UserError: the Inventory is of another bucket, or its files are ORC.
        """
        if not self._is_inventory:
            return [Shard(self.list_url or "")]
        about, shown = self._inventory(), storage.redacted(self.list_url or "")
        bucket = self._folder.partition("://")[2].partition("/")[0]
        if not storage.is_s3(self.url) or bucket != about["sourceBucket"]:
            raise UserError(
                f"{shown} is the Inventory of the bucket {about['sourceBucket']}, and --photos is "
                f"{storage.redacted(self.url)}: give the Inventory of that bucket, or correct --photos"
            )
        if about["fileFormat"] not in ("CSV", "Parquet"):
            raise UserError(f"{shown} is an Inventory in {about['fileFormat']}: let S3 write it as Parquet or CSV")
        return [Shard(self._data_url(about["destinationBucket"], file["key"])) for file in about["files"]]

    def listed(self, folder: str) -> Iterator[FileInfo]:
        """Yield the photos in a shard, by their names below the folder of photos."""
        if self._is_inventory:
            yield from self._inventory_photos(folder)
            return
        with _readable(folder):
            for name, size, mark in _entries(folder, self.columns.photo):
                path = name.removeprefix("file://").removeprefix(self._folder).removeprefix("./")
                if not safe_name(path) or "://" in path:
                    raise UserError(
                        f"{storage.redacted(folder)} names {storage.redacted(name)}, which is not below "
                        f"{storage.redacted(self.url)}: correct the list or --photos"
                    )
                yield FileInfo(path, size, mark)

    @property
    def _is_inventory(self) -> bool:
        return (self.list_url or "").lower().endswith(".json")

    def _inventory(self) -> dict[str, Any]:
        about = storage.read_json(self.list_url or "")
        if not all(isinstance(about.get(name), kind) for name, kind in _INVENTORY.items()):
            raise UserError(
                f"{storage.redacted(self.list_url or '')} is no Inventory: name the manifest.json that S3 wrote, or a "
                "text, CSV or Parquet file"
            )
        return about

    def _data_url(self, bucket: str, key: str) -> str:
        """Return the URL of a file of the Inventory: where S3 wrote it, or beside a copy of the manifest."""
        if storage.is_s3(self.list_url or ""):
            return f"s3://{bucket.rpartition(':')[2]}/{key}"
        above = (self.list_url or "").rsplit("/", 2)[0]
        return storage.join(above, "data", key.rpartition("/")[2])

    def _inventory_photos(self, url: str) -> Iterator[FileInfo]:
        """Yield the newest versions below the folder of photos, of one file of the Inventory."""
        about = self._inventory()
        is_csv = about["fileFormat"] == "CSV"
        header = [name.strip() for name in about["fileSchema"].split(",")] if is_csv else None
        prefix = self._folder.partition("://")[2].partition("/")[2]
        with _readable(url):
            for key, size, mark in _entries(url, "key", header):
                # S3 encodes the keys in CSV, and those alone.
                path = unquote_plus(key, errors="surrogateescape") if is_csv else key
                if path.startswith(prefix) and len(path) > len(prefix):
                    yield FileInfo(path.removeprefix(prefix), size, mark)


def _entries(url: str, column: str, header: Sequence[str] | None = None) -> Iterator[tuple[str, int, str]]:
    """Yield name, size and mark of each photo in a file: 0 and "" where it does not tell."""
    kind = url.lower().removesuffix(".gz")
    if kind.endswith(".parquet"):
        names = storage.parquet_schema(url).names
        wanted = {_key_of(column), *_OLD_VERSION, *_MEASURES[0], *_MEASURES[1]}
        used = [name for name in names if _key_of(name) in wanted]
        yield from _of_columns(used if _key_of(column) in map(_key_of, used) else names, _rows(url, used), url, column)
    elif header is not None or kind.endswith((".csv", ".tsv")):
        with _text(url) as text:
            rows = csv.reader(text, delimiter="\t" if kind.endswith(".tsv") else ",")
            names = header or next(rows, [])
            yield from _of_columns(names, (row for row in rows if row), url, column)
    else:
        with _text(url) as text:
            # Not `splitlines`: names may contain the rarer line ends that it knows.
            yield from ((line.rstrip("\n"), 0, "") for line in text if not line.isspace())


def _of_columns(
    names: Sequence[str], rows: Iterable[Sequence[str | None]], url: str, column: str
) -> Iterator[tuple[str, int, str]]:
    places = {_key_of(name): place for place, name in enumerate(names)}
    photo = places.get(_key_of(column))
    if photo is None:
        raise UserError(
            f"{storage.redacted(url)} has no column {column!r}, it has {', '.join(names)}: name it by --photo-column"
        )
    size, mark = (next((places[each] for each in known if each in places), None) for known in _MEASURES)
    old = [(places[each], value) for each, value in _OLD_VERSION.items() if each in places]
    for number, row in enumerate(rows, 1):
        try:
            if any(str(row[place]).lower() == value for place, value in old) or not row[photo]:
                continue
            yield (
                str(row[photo]),
                0 if size is None else int(row[size] or 0),
                "" if mark is None else str(row[mark] or "").strip('"'),
            )
        except (IndexError, ValueError) as error:
            raise UserError(
                f"{storage.redacted(url)}: row {number} has not the {len(names)} columns of the others, or a size that "
                "is no number: mend it"
            ) from error


def _key_of(name: str) -> str:
    """Return the spelling by which columns are found: an Inventory has `ETag` in CSV and `e_tag` in Parquet."""
    return name.lower().replace("_", "")


def _rows(url: str, names: Sequence[str]) -> Iterator[Sequence[str | None]]:
    """Yield the values of these columns of a Parquet file."""
    with storage.open_parquet(url, buffer_size=_COLUMN_BUFFER_BYTES) as file:
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=list(names), use_threads=False):
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


@contextmanager
def _text(url: str) -> Iterator[io.TextIOWrapper]:
    """Open a text file. Bytes that are not UTF-8 become surrogates, as in names on a disk."""
    if storage.is_local(url):
        refuse_special(url)
    with io.BufferedReader(RangedFile(url)) as file:
        unpacked = gzip.GzipFile(fileobj=file) if url.lower().endswith(".gz") else file
        yield io.TextIOWrapper(unpacked, "utf-8-sig", errors="surrogateescape", newline=None)


@contextmanager
def _readable(url: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, csv.Error) as error:
        raise UserError(f"{storage.redacted(url)} is damaged ({error}): copy it again") from error
