"""Puts what a source lists into the database of photos."""

import logging
from collections.abc import Generator, Mapping
from contextlib import closing

import numpy as np
import pyarrow as pa

from lib import storage
from lib.errors import UserError
from lib.faces.images import PHOTO_SUFFIXES
from lib.faces.photo_database import PhotoDatabase, columns_of
from lib.faces.shared_listing import SharedListing, can_share
from lib.faces.sources.folder import FolderSource
from lib.faces.sources.source import BATCH_ROWS, SCAN_SCHEMA, Source
from lib.progress import ProgressLine

logger = logging.getLogger(__name__)


def scan(source: Source, database: PhotoDatabase, kept_url: str | None = None) -> tuple[int, int]:
    """Make the table `scanned` of the photos of a source; return their number and the sum of their sizes.

    The database keeps no order, so each photo gets its `place`. With `kept_url` a large folder is listed as a
    `SharedListing`.
    """
    database.run(f"create table scanned ({columns_of(SCAN_SCHEMA)}, place bigint)")
    num = 0
    shared = _shared(source, kept_url) if kept_url is not None else None
    with ProgressLine("listing", unit="photo") as progress:
        for batch in shared.batches() if shared else _batches(source):
            places = pa.array(np.arange(num, num + len(batch)))
            database.append("scanned", pa.Table.from_batches([batch]).append_column("place", places))
            num += len(batch)
            progress.update(num)
    if source.list_url is not None:
        num -= _drop_doubled(source.list_url, database, num)
    return num, int(database.value("select coalesce(sum(num_bytes), 0) from scanned"))


def _batches(source: Source) -> Generator[pa.RecordBatch, None, None]:
    for shard in source.shards():
        yield from source.scan(shard)


def _shared(source: Source, kept_url: str) -> SharedListing | None:
    """Return the finished listing of a folder by many workers; None if one process lists it as fast."""
    if not isinstance(source, FolderSource) or not can_share(source):
        return None
    shared = SharedListing(source, kept_url)
    if not shared.is_begun():
        with closing(_batches(source)) as first:
            is_small = len(next(first, ())) < BATCH_ROWS
        source.passed_over.clear()
        if is_small:
            return None
    with ProgressLine("listing", unit="file") as progress:
        shared.make(progress.add)
    return shared


def _drop_doubled(list_url: str, database: PhotoDatabase, num: int) -> int:
    """Keep one row of each photo that a list names more than once; return the number of the others."""
    num_doubled = num - int(database.value("select count(distinct photo) from scanned"))
    if num_doubled:
        logger.warning("%s names %d photos again: each is one row", storage.redacted(list_url), num_doubled)
        database.run("create table once as select distinct on (photo) * from scanned")
        database.run("drop table scanned")
        database.run("alter table once rename to scanned")
    return num_doubled


def check_scanned(source: Source, database: PhotoDatabase, num: int, *, has_list: bool) -> None:
    """Raise UserError if there are no photos, or if their names are not distinct."""
    shown = storage.redacted(source.list_url or source.url)
    if isinstance(source, FolderSource):
        if not num and (source.list_url is not None or not has_list):
            kinds = f" ({_counted(source.passed_over)} lie there)" if source.passed_over else ""
            raise UserError(
                f"{shown} holds no photos{kinds}: {', '.join(PHOTO_SUFFIXES)} are read, and .parquet, .rec, .tar, .zip "
                "and .arrow files of photos; a .lst file, by its own name"
            )
        return
    if not num:
        raise UserError(f"{shown} holds no rows")
    num_distinct = database.value("select count(distinct photo) from scanned")
    if num_distinct != num:
        raise UserError(
            f"column {source.columns.photo!r} of {shown} names {num} photos by {num_distinct} names: name a column of "
            "distinct keys by --photo-column"
        )


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {suffix}" for suffix, number in sorted(counts.items()))
