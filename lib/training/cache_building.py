"""Builds the cache of a node: one file of crops from the faces table.

The crops are in the order (split, file name, row), so a row is the same photo on every node. The file's name contains a
digest of `_SUCCESS`, so other faces get another file.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from lib import storage
from lib.errors import UserError
from lib.faces import table
from lib.faces.face_filter import EVERY_FACE, FaceFilter
from lib.threads import mapped
from lib.training.cache_files import CACHE_SCHEMA, ROWS_PER_BATCH, disk_full, made_once, write_batches
from lib.training.face_names import READ_AHEAD, limited_identities, part_urls, read_names, usable

logger = logging.getLogger(__name__)

COPY_THREADS = 8
"""Parts that are read at once. They are in memory meanwhile, with some 10 MB each."""

FORMAT_VERSION = 1
"""Part of the file's name. Increase it when the content changes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Only:
    """The faces in a cache: those of some photos, or of some people."""

    column: Literal["photo", "identity"]
    names: pa.Array

    def kept(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Return the rows of these photos or people."""
        return rows.filter(pc.is_in(rows[self.column], value_set=self.names))

    def digest(self) -> str:
        """Return a digest of the column and the names."""
        content = json.dumps([self.column, *sorted(self.names.to_pylist())])
        return hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()


class NoFacesError(UserError):
    """No photo of the splits is aligned."""

    def __init__(self, splits: Sequence[str], taken: FaceFilter) -> None:
        """Name the splits, and the faces that were to be taken."""
        within = f" and within {taken}" if taken else ""
        super().__init__(
            f"no photo in split {', '.join(splits)} of the faces table is aligned{within}: "
            "run jobs/preprocess.py on photos with faces first"
        )


def build_cache(
    faces_url: str,
    splits: Sequence[str],
    cache_dir: str,
    *,
    photos_limit: int = 0,
    only: Only | None = None,
    run_id: str | None = None,
    taken: FaceFilter = EVERY_FACE,
) -> str:
    """Return the path of the cache file of these splits, and make the file if it does not exist.

    With `photos_limit` it has whole people, chosen by `limited_identities`, with at most so many photos. `run_id` is
    the version of the table; without that version it is the present one. `taken` may leave faces out.

    If several processes of a node ask at the same time, one makes the file and the others wait. A process that dies
    leaves no file under the final name. Caches of other faces stay, except for old ones in `default_folder`.

    Raises:
        NoFacesError: no photo of these splits is aligned.
        UserError: the faces folder is absent or not finished, a part of it is damaged, the limit leaves nobody, or
            `cache_dir` cannot be written to or holds a file of that name that is not ours.
        CacheFullError: the disk is full.
    """
    folder = Path(cache_dir)
    success = table.read_success(faces_url, run_id=run_id)
    path = folder / _cache_name(success, splits, photos_limit, only, taken)
    urls = part_urls(faces_url, success, splits)
    return made_once(path, cache_dir, lambda: _build(urls, splits, path, photos_limit, only, taken))


def _cache_name(
    success: dict[str, Any], splits: Sequence[str], photos_limit: int, only: Only | None, taken: FaceFilter
) -> str:
    chosen: list[Any] = [*([photos_limit] if photos_limit else []), *([only.digest()] if only else [])]
    chosen += [str(taken)] if taken else []
    content = json.dumps([FORMAT_VERSION, success, *chosen], sort_keys=True)
    return f"faces-{'-'.join(splits)}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.arrow"


def _build(
    urls: Sequence[str], splits: Sequence[str], path: Path, photos_limit: int, kept: Only | None, taken: FaceFilter
) -> None:
    num_bytes_needed, _ = size_of_crops(urls)
    kept = within_limit(urls, photos_limit, kept, taken)
    if kept is not None:
        names = read_names(urls, kept.column)
        num_kept = pc.sum(pc.is_in(names, value_set=kept.names)).as_py() or 0
        num_bytes_needed = num_bytes_needed * num_kept // max(len(names), 1)
    others = [other.name for other in path.parent.glob(f"faces-{'-'.join(splits)}-*.arrow") if other != path]
    if others:
        logger.info("%s also holds caches of other faces: %s", path.parent, ", ".join(others))
    # Checked before the copy: a disk that is full at the end would cost the time of the whole copy.
    if shutil.disk_usage(path.parent).free < num_bytes_needed:
        raise disk_full(path.parent, num_bytes_needed)
    num_rows = write_batches(path, _equal_batches(urls, kept, taken), num_bytes_needed)
    if not num_rows:
        raise NoFacesError(splits, taken)
    logger.info("made %s: %d crops, %.1f MB", path, num_rows, path.stat().st_size / 1e6)


def within_limit(urls: Sequence[str], photos_limit: int, only: Only | None, taken: FaceFilter) -> Only | None:
    """Return the faces of `build_cache` in these parts: `only`, or the people within a limit."""
    if not photos_limit:
        return only
    return Only(column="identity", names=limited_identities(read_names(urls, "identity", taken), photos_limit))


def size_of_crops(urls: Sequence[str]) -> tuple[int, int]:
    """Return the size of the copied columns of some parts in bytes, and their rows, from the files' footers."""
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        sizes = list(pool.map(_size, urls))
    return sum(num_bytes for num_bytes, _ in sizes), sum(num_rows for _, num_rows in sizes)


def _size(url: str) -> tuple[int, int]:
    with storage.open_parquet(url) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
        num_bytes = sum(c.total_uncompressed_size for c in columns if c.path_in_schema in CACHE_SCHEMA.names)
        return num_bytes, file.metadata.num_rows


def _equal_batches(urls: Sequence[str], only: Only | None, taken: FaceFilter) -> Generator[pa.RecordBatch, None, None]:
    """Yield the aligned faces in batches of `ROWS_PER_BATCH`, the last one shorter. Several parts are read at once."""
    pending: list[pa.RecordBatch] = []
    num_pending = 0
    with mapped(partial(_kept_rows, only, taken), urls, num_threads=COPY_THREADS) as parts:
        for kept in chain.from_iterable(parts):
            pending.append(kept)
            num_pending += len(kept)
            while num_pending >= ROWS_PER_BATCH:
                joined = pa.concat_batches(pending)
                yield joined[:ROWS_PER_BATCH]
                pending = [joined[ROWS_PER_BATCH:]]
                num_pending -= ROWS_PER_BATCH
    if num_pending:
        yield pa.concat_batches(pending)


def _kept_rows(only: Only | None, taken: FaceFilter, url: str) -> list[pa.RecordBatch]:
    """Return the aligned faces of a part that are wanted. Crops are read only where there are any."""
    with storage.open_parquet(url, table.columns(*CACHE_SCHEMA.names, "status")) as file:
        taken.check(file.schema_arrow, storage.redacted(url))
        if only is not None:
            names = file.read(columns=[only.column])[only.column]
            if not pc.any(pc.is_in(names, value_set=only.names)).as_py():
                return []
        batches = []
        for batch in file.iter_batches(ROWS_PER_BATCH, columns=[*CACHE_SCHEMA.names, "status", *taken.columns]):
            kept = batch.filter(usable(batch, taken)).select(CACHE_SCHEMA.names)
            if only is not None:
                kept = only.kept(kept)
            # A missing crop is later counted and named like one that cannot be decoded.
            kept = kept.set_column(2, "crop", kept["crop"].fill_null(b""))
            batches.append(kept.cast(CACHE_SCHEMA))
        return batches
