"""The crops of a faces table without a copy of them, for a node whose disk has no room for one.

A part is a Parquet file without compression, so each crop lies in it as it is. The parts are read once to find where.
After that a crop is a read of its bytes, a batch at a time in threads. The rows are those of the cache that would have
been, so the run draws the same batches.
"""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lib import storage
from lib.evaluation.verification_sets import read_verification_set
from lib.faces import table
from lib.faces.face_filter import EVERY_FACE, FaceFilter
from lib.parquet_files import opened
from lib.threads import mapped
from lib.training.cache_building import COPY_THREADS, Only, build_cache, within_limit
from lib.training.cache_files import CACHE_SCHEMA, CacheFullError
from lib.training.face_cache import FaceCache
from lib.training.face_names import part_urls, usable
from lib.training.set_cache import SetFaces, build_set_cache

logger = logging.getLogger(__name__)

READ_THREADS = 16
"""Crops of a batch that are read at once. This hides the latency of a bucket."""
LENGTH_BYTES = 4
"""In front of each value in Parquet's plain encoding."""


def cached_faces(
    faces_url: str,
    splits: Sequence[str],
    cache_dir: str,
    *,
    photos_limit: int = 0,
    only: Only | None = None,
    run_id: str | None = None,
    taken: FaceFilter = EVERY_FACE,
) -> FaceCache:
    """Return the faces of `build_cache` from its cache file, or from the table if the disk is full, with one line.

    Raises:
        CacheFullError: the disk is full, and the parts are compressed.
        UserError: as `build_cache`.
    """
    try:
        path = build_cache(
            faces_url, splits, cache_dir, photos_limit=photos_limit, only=only, run_id=run_id, taken=taken
        )
        return FaceCache(path)
    except CacheFullError as full:
        urls = part_urls(faces_url, table.read_success(faces_url, run_id=run_id), splits)
        crops = TableCrops(urls, within_limit(urls, photos_limit, only, taken), taken, full)
        tell_full(full)
        return FaceCache(crops)


def cached_set(faces: SetFaces, cache_dir: str) -> FaceCache:
    """Return the images of a set from its cache file, or from memory if the disk is full."""
    try:
        return FaceCache(build_set_cache(faces, cache_dir))
    except CacheFullError as full:
        images = read_verification_set(faces.url).images
        names = pa.chunked_array([[str(number) for number in range(len(images))]], pa.string())
        tell_full(full)
        return FaceCache(CropsInMemory(names, names, dict(enumerate(images))))


def tell_full(full: CacheFullError) -> None:
    """Say once, on one worker of the node, that the disk is full and what follows."""
    is_known = full.folder in _told or int(os.environ.get("LOCAL_RANK", 0))
    _told.add(full.folder)
    if not is_known:
        logger.warning("%s: this node reads the crops from the table instead, which is slower", full)


_told: set[Path] = set()
"""Folders whose disks were said to be full: a run has several caches in one."""


class CropsInMemory:
    """Some crops of a table, by row."""

    path = ""

    def __init__(self, photos: pa.ChunkedArray, identities: pa.ChunkedArray, crops: dict[int, bytes]) -> None:
        """Take the names of all rows, and the crops of some."""
        self._names, self._crops = (photos, identities), crops

    def names(self) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
        """Return the photo and the identity of each row."""
        return self._names

    def crop_bytes(self, row: int) -> npt.NDArray[np.uint8]:
        """Return the encoded crop of a row that is here."""
        return np.frombuffer(self._crops[row], np.uint8)

    def at_hand(self, _: npt.NDArray[np.integer], /) -> "CropsInMemory":
        """Return the same."""
        return self


class _Places(NamedTuple):
    """The kept rows of a part, and where their crops lie in its file."""

    photos: pa.ChunkedArray
    identities: pa.ChunkedArray
    starts_N: npt.NDArray[np.int64]
    lengths_N: npt.NDArray[np.int32]


class TableCrops:
    """The crops of a faces table, each read from its part when it is asked for."""

    path = ""

    def __init__(self, urls: Sequence[str], only: Only | None, taken: FaceFilter, full: CacheFullError) -> None:
        """Find the crops of these parts, in the order of files and rows.

        Raises:
            CacheFullError: `full`, if the parts are compressed.
            UserError: a part is damaged.
        """
        self._urls = urls
        with mapped(partial(_find, only, taken, full), urls, num_threads=COPY_THREADS) as found:
            places = list(found)
        self._names = tuple(
            pa.chunked_array([chunk for names in columns for chunk in names.chunks], pa.string())
            for columns in ([each.photos for each in places], [each.identities for each in places])
        )
        self._ends = np.cumsum([len(each.starts_N) for each in places])
        self._starts_N = np.concatenate([each.starts_N for each in places])
        self._lengths_N = np.concatenate([each.lengths_N for each in places])

    def names(self) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
        """Return the photo and the identity of each row."""
        return self._names[0], self._names[1]

    def crop_bytes(self, row: int) -> npt.NDArray[np.uint8]:
        """Return the encoded crop."""
        return np.frombuffer(self._read(row), np.uint8)

    def at_hand(self, rows: npt.NDArray[np.integer], /) -> CropsInMemory:
        """Read the crops of some rows, several at once."""
        distinct = np.unique(rows).tolist()
        with ThreadPoolExecutor(READ_THREADS) as pool:
            return CropsInMemory(*self.names(), dict(zip(distinct, pool.map(self._read, distinct), strict=True)))

    def _read(self, row: int) -> bytes:
        start, length = int(self._starts_N[row]), int(self._lengths_N[row])
        url = self._urls[int(np.searchsorted(self._ends, row, side="right"))]
        return storage.read_range(url, start, start + length) if length else b""


def _find(only: Only | None, taken: FaceFilter, full: CacheFullError, url: str) -> _Places:
    data = storage.read_bytes(url)
    name = storage.redacted(url)
    columns = [*CACHE_SCHEMA.names, "status"]
    with opened(pa.BufferReader(data), name, table.columns(*columns), 0) as file:
        taken.check(file.schema_arrow, name)
        rows = file.read(columns=[*columns, *taken.columns])
    rows = rows.filter(usable(rows, taken))
    if only is not None:
        rows = only.kept(rows)
    starts, lengths = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int32)
    at = 0
    for place, crop in enumerate(rows["crop"].to_pylist()):
        if not crop:
            continue  # counted and named later, like one that cannot be decoded
        value = len(crop).to_bytes(LENGTH_BYTES, "little") + crop
        found = data.find(value, at)
        if found < 0:
            found = data.find(value)  # a crop that the part holds twice lies in it once
        if found < 0:
            raise full
        starts[place], lengths[place] = found + LENGTH_BYTES, len(crop)
        at = max(at, found + len(value))
    return _Places(rows["photo"], rows["identity"], starts, lengths)
