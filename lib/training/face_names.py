"""The names of photos and people in a faces table, within the limits that the user gives."""

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lib import storage
from lib.errors import UserError
from lib.faces import table
from lib.faces.face_filter import EVERY_FACE, FaceFilter

logger = logging.getLogger(__name__)

READ_AHEAD = 16
"""Files read at once if only a little of each is needed. This hides the latency of a bucket."""


def read_identities(
    faces_url: str,
    splits: Sequence[str],
    *,
    photos_limit: int = 0,
    run_id: str | None = None,
    taken: FaceFilter = EVERY_FACE,
) -> pa.ChunkedArray:
    """Return the identity of each row of such a cache, in its order, without reading the crops.

    Raises:
        UserError: the faces folder is absent or not finished, or the limit leaves nobody.
    """
    urls = part_urls(faces_url, table.read_success(faces_url, run_id=run_id), splits)
    identities = read_names(urls, "identity", taken)
    if not photos_limit:
        return identities
    return identities.filter(pc.is_in(identities, value_set=limited_identities(identities, photos_limit)))


def num_left_out(faces_url: str, splits: Sequence[str], taken: FaceFilter, *, run_id: str | None = None) -> int:
    """Return how many aligned faces of people `taken` leaves out, and log it."""
    urls = part_urls(faces_url, table.read_success(faces_url, run_id=run_id), splits)
    num_all = len(read_names(urls, "identity"))
    num = num_all - len(read_names(urls, "identity", taken))
    logger.info("%d of %d faces are left out: not within %s", num, num_all, taken)
    return num


def part_urls(faces_url: str, success: dict[str, Any], splits: Sequence[str]) -> list[str]:
    """Return the files of these splits, by the content of `_SUCCESS`."""
    return [storage.join(faces_url, name) for split in splits for name in table.part_names(success, [split])]


def read_names(
    urls: Sequence[str], column: Literal["photo", "identity"], taken: FaceFilter = EVERY_FACE
) -> pa.ChunkedArray:
    """Return the photo or the identity of each row of a cache of these parts, in its order."""
    columns = list(dict.fromkeys((column, "identity", "status")))

    def read(url: str) -> pa.ChunkedArray:
        with storage.open_parquet(url, table.columns(*columns)) as file:
            taken.check(file.schema_arrow, storage.redacted(url))
            part = file.read(columns=[*columns, *taken.columns])
        return part.filter(usable(part, taken))[column]

    with ThreadPoolExecutor(READ_AHEAD) as pool:
        names = list(pool.map(read, urls))
    return pa.chunked_array([chunk for column in names for chunk in column.chunks], pa.string())


def limited_identities(identities: pa.ChunkedArray, photos_limit: int) -> pa.Array:
    """Return the people of a subset of at most so many photos; `identities` has the name of each photo's person.

    People are added in the order of a hash of their names, until the next one would be too many. So the subset does not
    depend on the order of the photos, and a larger limit includes all people of a smaller one.

    Raises:
        UserError: fewer than two people would be left.
    """
    people = sorted(pc.value_counts(identities).to_pylist(), key=lambda each: _hash(each["values"]))
    num_photos = np.cumsum([each["counts"] for each in people])
    num_kept = int(np.searchsorted(num_photos, photos_limit, side="right"))
    if num_kept < min(2, len(people)):
        raise UserError(
            f"--photos-limit {photos_limit} leaves {num_kept} of {len(people)} people: two or more have to stay, "
            "so raise it"
        )
    return pa.array([each["values"] for each in people[:num_kept]], pa.string())


def chosen_people(labels_N: npt.NDArray[np.integer], max_photos: int, seed: int) -> npt.NDArray[np.integer]:
    """Return the labels of whole people, in an order by the seed, up to so many photos; two people at least.

    Of the people who were chosen, all are chosen again.
    """
    people = np.random.default_rng(seed).permutation(np.unique(labels_N))
    counts = np.bincount(labels_N)[people]
    num_people = max(2, int(np.searchsorted(np.cumsum(counts), max_photos, side="right")))
    return np.sort(people[:num_people])


def _hash(identity: str) -> bytes:
    # Not the hash that chose the split: people of one split have similar values of that one.
    return hashlib.blake2b(f"limit\0{identity}".encode("utf-8", "surrogateescape"), digest_size=8).digest()


def usable(rows: pa.Table | pa.RecordBatch, taken: FaceFilter) -> pa.Array | pa.ChunkedArray:
    usable = pc.and_(pc.equal(rows["status"], table.ALIGNED), pc.is_valid(rows["identity"]))
    return pc.and_(usable, taken.keeps(rows)) if taken else usable
