"""The listing of a large folder by many workers. What is listed is kept, so that a job that was cut off goes on.

The folders at the top are listed one level after the other until there are enough of them to share. Then each worker
lists some of them with all below. It writes what it finds as pieces: Parquet files with the rows of a scan, and with
folders that are still to be listed. In a bucket a unit goes on after its last piece.
"""

import json
import logging
import os
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from lib import cluster, storage
from lib.faces.photo_names import name_on_disk, stored_name
from lib.faces.sources.folder import FolderSource
from lib.faces.sources.source import SCAN_SCHEMA, Source
from lib.listing import FileInfo, local_files
from lib.local_files import local_path
from lib.part_workers import run_parts, summary
from lib.parts import digest_of
from lib.threads import ahead

logger = logging.getLogger(__name__)

ENOUGH_FOLDERS, MOST_LEVELS = 16, 3
UNITS = 256
"""About so many units of work: small enough that a killed one costs little, few enough for the answers of a bucket."""
PIECE_FILES = 100_000
KEPT_FOR_S = 24 * 3600.0
"""A listing that was begun longer ago is begun again: too much may have changed."""

_BEGUN = "begun.json"
_SCHEMA = SCAN_SCHEMA.append(pa.field("is_folder", pa.bool_()))
_READERS = 8

Piece = tuple[list[FileInfo], list[str], str | None]
"""Files, folders that are still to be listed, and the name after which the listing goes on; None at its end."""


class Unit(NamedTuple):
    """The work of one task: the files directly in folders, or all below them if it is `deep`.

    On a disk `folders` are spelled as in a table. In a bucket, whose names are text, `prefix` is what the names of
    these folders begin with, and of no other folders of that depth.
    """

    prefix: str
    folders: tuple[str, ...]
    depth: int
    num: int
    deep: bool

    @property
    def key(self) -> str:
        """Name of its pieces."""
        return digest_of([json.dumps(self)])[:16]


def can_share(source: Source) -> bool:
    """Return whether a source is a plain folder, on a disk or in S3."""
    return type(source) is FolderSource and (storage.is_local(source.url) or storage.is_s3(source.url))


class SharedListing:
    """The listing of a folder, whose pieces are kept below `kept_url`."""

    def __init__(self, source: FolderSource, kept_url: str) -> None:
        self._source, self._url = source, kept_url
        self._units: list[Unit] = []
        self._links: list[str] = []

    def is_begun(self) -> bool:
        """Return whether a listing of this folder is there to go on with; an old or another one is removed."""
        begun_url = storage.join(self._url, _BEGUN)
        about = storage.read_json(begun_url) if storage.exists(begun_url) else None
        if about is None:
            return False
        if about.get("of") == digest_of([self._source.url]) and time.time() - about.get("time", 0) < KEPT_FOR_S:
            return True
        storage.remove_tree(self._url)
        return False

    def make(self, told: Callable[[int], None]) -> None:
        """List what is not listed yet. `told` is called with numbers of files while one task does it all."""
        if self.is_begun():
            logger.info("going on with the listing in %s: remove that folder to list anew", storage.redacted(self._url))
        else:
            about = {"of": digest_of([self._source.url]), "time": time.time()}
            storage.write_json(storage.join(self._url, _BEGUN), about)
        folders, depth = pa.array([""]), 0
        while len(folders):
            deep = depth > 0 and (len(folders) >= ENOUGH_FOLDERS or depth >= MOST_LEVELS)
            units = list(_units(folders, depth, deep, by_prefix=not self._is_local))
            self._list(units, told)
            self._units += units
            found = self._found(units, deep)
            links = [name for name in found.to_pylist() if deep or self._is_link(name)] if self._is_local else []
            self._links += links
            folders = found.filter(pc.invert(pc.is_in(found, pa.array(links, pa.string())))) if links else found
            depth += 1

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the photos as batches of `SCAN_SCHEMA`, in no order."""
        ours = theirs = ""
        with ThreadPoolExecutor(_READERS) as pool:
            for unit in self._units:
                for rows in self._pieces(unit, pool):
                    about = json.loads(rows.schema.metadata[b"about"])
                    self._source.passed_over.update(about["passed_over"])
                    photos = rows.filter(pc.invert(rows["is_folder"])).select(SCAN_SCHEMA.names)
                    theirs = theirs or about["foreign_file"]
                    ours = ours or (photos["photo"][0].as_py() if len(photos) else "")
                    if ours and theirs:
                        self._source.refuse_both(ours, theirs)
                    yield from photos.cast(SCAN_SCHEMA).to_batches()
        if self._links:
            # One after the other: two links may lead to the same folder, which is listed once.
            root = str(local_path(self._source.url))
            linked = local_files(root, [name_on_disk(name) for name in self._links])
            yield from self._source.batches(self._source.chosen(linked))

    @property
    def _is_local(self) -> bool:
        return storage.is_local(self._source.url)

    def _found(self, units: Sequence[Unit], deep: bool) -> pa.Array:
        """Return the folders that units have left, sorted, as in a table: links only, if the units are deep."""
        if deep and not self._is_local:
            return pa.array([], pa.string())
        found = [rows.filter(rows["is_folder"])["photo"] for unit in units for rows in self._pieces(unit)]
        folders = pc.unique(pa.chunked_array([chunk for each in found for chunk in each.chunks], pa.string()))
        return folders.take(pc.array_sort_indices(folders))

    def _is_link(self, folder: str) -> bool:
        return os.path.islink(os.path.join(local_path(self._source.url), name_on_disk(folder)[:-1]))  # noqa: PTH114,PTH118

    def _list(self, units: Sequence[Unit], told: Callable[[int], None]) -> None:
        present = {info.path for info in storage.list_files(self._url, suffix=".parquet")}
        todo = [unit for unit in units if f"{unit.key}.parquet" not in present]
        items = []
        for unit in todo:
            num_pieces = next(n for n in range(len(present) + 1) if _piece_name(unit, n) not in present)
            items.append({"unit": json.dumps(unit), "pieces": num_pieces})
        if len(items) == 1:
            Lister(self._source, self._url, told).list_unit(items[0])
        elif items:
            num_all = sum(unit.num for unit in units)
            num_done = num_all - sum(unit.num for unit in todo)
            with cluster.connected():
                arguments = (self._source, self._url)
                run_parts(items, Lister, arguments, unit="folder", num_done=num_done, num_all=num_all)

    def _pieces(self, unit: Unit, pool: ThreadPoolExecutor | None = None) -> Iterator[pa.Table]:
        last = storage.read_parquet(storage.join(self._url, f"{unit.key}.parquet"), list(_SCHEMA))
        names = [_piece_name(unit, n) for n in range(json.loads(last.schema.metadata[b"about"])["pieces"])]
        urls = [storage.join(self._url, name) for name in names]
        yield from map(_read, urls) if pool is None else ahead(pool, _read, urls, num_ahead=_READERS)
        yield last


class Lister:
    """Lists units on a worker."""

    def __init__(self, source: FolderSource, kept_url: str, told: Callable[[int], None] = lambda _: None) -> None:
        self._source = copy(source)  # its counts are those of one piece
        self._url, self._told = kept_url, told

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """List a unit, and return its summary."""
        return summary(self.list_unit, item)

    def list_unit(self, item: dict[str, Any]) -> tuple[int, int]:
        """Write the missing pieces of a unit; return the number of its folders, and 0."""
        unit = Unit(*json.loads(item["unit"]))
        if storage.is_local(self._source.url):
            first, pieces = 0, self._on_disk(unit)
        else:
            first = item["pieces"]
            before = _read(storage.join(self._url, _piece_name(unit, first - 1))) if first else None
            after = json.loads(before.schema.metadata[b"about"])["after"] if before is not None else ""
            pieces = self._in_bucket(unit, after)
        for number, (files, folders, after) in enumerate(pieces, first):
            self._source.passed_over, self._source.foreign_file = Counter(), ""
            batches = list(self._source.batches(self._source.chosen(files)))
            rows = pa.Table.from_batches(batches, SCAN_SCHEMA)
            rows = rows.append_column("is_folder", pa.repeat(pa.scalar(False), len(rows)))
            about: dict[str, Any] = {
                "passed_over": dict(self._source.passed_over),
                "foreign_file": stored_name(self._source.foreign_file),
            }
            about |= {"after": after, "pieces": number}
            table = pa.concat_tables([rows, _folder_rows(folders)]).replace_schema_metadata(
                {"about": json.dumps(about)}
            )
            name = f"{unit.key}.parquet" if after is None else _piece_name(unit, number)
            storage.write_parquet(storage.join(self._url, name), table, compression="zstd")
            self._told(len(files))
        return unit.num, 0

    def _on_disk(self, unit: Unit) -> Iterator[Piece]:
        left: list[str] = []
        folders = [name_on_disk(name) for name in unit.folders]
        files = local_files(str(local_path(self._source.url)), folders, left, deep=unit.deep)
        while len(some := list(islice(files, PIECE_FILES))) == PIECE_FILES:
            yield some, [], ""
        yield some, [stored_name(name) for name in left], None

    def _in_bucket(self, unit: Unit, after: str) -> Iterator[Piece]:
        files: list[FileInfo] = []
        folders: list[str] = []
        for page, found, last in storage.bucket_pages(
            self._source.url, prefix=unit.prefix, after=after, deep=unit.deep
        ):
            if unit.deep:  # a prefix may also fit files that lie above its folders, which are listed already
                page = page.filter(pc.greater_equal(pc.count_substring(page["path"], "/"), unit.depth))
            files += map(FileInfo, *(column.to_pylist() for column in page.columns))
            folders += found
            if len(files) + len(folders) >= PIECE_FILES:
                yield files, folders, last
                files, folders = [], []
        yield files, folders, None


def _units(folders: pa.Array, depth: int, deep: bool, *, by_prefix: bool) -> Iterator[Unit]:
    """Yield the units of sorted folders, spelled as in a table."""
    most = -(-len(folders) // UNITS) if deep else 1
    if by_prefix:
        for prefix, num in _prefixes(folders, 0, len(folders), most):
            yield Unit(prefix, (), depth, num, deep)
    else:
        for start in range(0, len(folders), most):
            some = tuple(folders.slice(start, most).to_pylist())
            yield Unit("", some, depth, len(some), deep)


def _prefixes(names: pa.Array, start: int, stop: int, most: int) -> Iterator[tuple[str, int]]:
    """Yield prefixes, each with the number of names that have it: for every name one, and for at most `most` names.

    The names are sorted, and none is a prefix of another.
    """
    ends = names[start].as_py(), names[stop - 1].as_py()
    prefix = os.path.commonprefix(ends)  # noqa: RUF071 - letter by letter is meant
    if stop - start <= most:
        yield prefix, stop - start
        return
    while start < stop:
        letter = names[start].as_py()[len(prefix)]
        end = bisect_right(range(stop), letter, start, key=lambda place: names[place].as_py()[len(prefix)])
        yield from _prefixes(names, start, end, most)
        start = end


def _folder_rows(folders: Sequence[str]) -> pa.Table:
    columns = {each.name: pa.nulls(len(folders), each.type) for each in SCAN_SCHEMA}
    columns |= {"photo": pa.array(folders, pa.string()), "num_bytes": pa.array([0] * len(folders), pa.int64())}
    columns |= {"mark": pa.array([""] * len(folders), pa.string()), "is_folder": pa.repeat(True, len(folders))}
    return pa.table(columns, schema=_SCHEMA)


def _piece_name(unit: Unit, number: int) -> str:
    return f"{unit.key}.{number:05d}.parquet"


def _read(url: str) -> pa.Table:
    return storage.read_parquet(url, list(_SCHEMA))
