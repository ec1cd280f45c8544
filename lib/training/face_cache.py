"""Random access to any crop: one memory-mapped Arrow file a node, made once from the faces table.

The file holds the crops in the order (split, file name, row), so a row is the same photo on every node. Its name
carries a digest of `_SUCCESS`: other faces get another file. Faces are personal data: the file is its user's alone, and
what stands in its place and is not, such as a link in a folder that others write to, is refused.

Shape suffixes: N photos (rows), H and W pixels.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lib import storage
from lib.errors import JobError, UserError
from lib.faces import table
from lib.faces.face_filter import EVERY_FACE, FaceFilter

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Part of the file's name: raise it when the content changes."""

ROWS_PER_BATCH = 1024
"""All batches but the last have so many rows, so a row number says where its crop is. At 2 MB a crop a batch still fits
the 32-bit offsets of `binary`."""

CACHE_SCHEMA = pa.schema(
    [
        pa.field("photo", pa.string(), nullable=False),
        pa.field("identity", pa.string(), nullable=False),
        pa.field("crop", pa.binary(), nullable=False),
    ]
)

READ_AHEAD = 16
"""Files read side by side where only a little of each is wanted: hides the latency of a bucket."""

KEPT_DAYS = 7
"""In the default folder, caches that no training has used for so long are removed when another is made."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_READ_FLAGS = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
"""OpenCV names no reduced RGB; its bits for the scale alone stand in the grey names."""


def default_folder() -> str:
    """Return this user's own folder of caches on this node, made where it is not there yet.

    Raises:
        UserError: something of its name is there that is a link, no folder, or another user's.
    """
    folder = Path(tempfile.gettempdir()) / f"conv-facenet-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error}): name a folder of your own by --cache-dir") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise UserError(f"{folder} is a link or another user's: name a folder of your own by --cache-dir")
    folder.chmod(0o700)
    return str(folder)


@dataclass(frozen=True, kw_only=True, eq=False)
class Only:
    """Which faces of the splits a cache holds: those of these photos, or of these people."""

    column: Literal["photo", "identity"]
    names: pa.Array

    def kept(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Return those of the rows that are of these photos or people."""
        return rows.filter(pc.is_in(rows[self.column], value_set=self.names))

    def digest(self) -> str:
        """Return a digest of the column and the names."""
        content = json.dumps([self.column, *sorted(self.names.to_pylist())])
        return hashlib.sha256(content.encode("utf-8", "surrogateescape")).hexdigest()


class NoFacesError(UserError):
    """No photo of the splits is aligned."""


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
    """Return the path of the cache file of these splits, after making it where it is not there yet.

    With `photos_limit` it holds whole people, as `limited_identities` chooses them, of so many photos at most. `run_id`
    is that of the version of the table, which is the present one if that version is not kept. Faces that `taken` leaves
    out are not in it.

    Of the processes of a node that ask at the same time one makes it and the others wait. A process that dies leaves no
    file under the final name. Caches of other faces are left alone, but for old ones in `default_folder`.

    Raises:
        NoFacesError: no photo of these splits is aligned.
        UserError: the faces folder is absent or not finished, a part of it is damaged, the limit leaves nobody, or
            `cache_dir` cannot be written to or holds a file of that name that is not ours.
        JobError: the disk is full.
    """
    folder = Path(cache_dir)
    success = table.read_success(faces_url, run_id=run_id)
    path = folder / _cache_name(success, splits, photos_limit, only, taken)
    urls = _part_urls(faces_url, success, splits)
    return made_once(path, cache_dir, lambda: _build(urls, splits, path, photos_limit, only, taken))


def made_once(path: Path, cache_dir: str, build: Callable[[], None]) -> str:
    """Return the path of a cache file; of the processes of a node that ask for it, one calls `build`.

    Raises:
        UserError: `cache_dir` cannot be written to, or holds a file of that name that is not ours.
    """
    folder = path.parent
    if _is_there(path):
        return str(path)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(path.with_suffix(".lock"), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise UserError(f"--cache-dir {cache_dir!r} cannot be written to ({error}): choose another folder") from error
    with os.fdopen(lock, "wb"), _locked(lock, path):
        if not _is_there(path):
            if cache_dir == default_folder():
                _remove_old(folder)
            build()
    return str(path)


def _is_there(path: Path) -> bool:
    """Return whether a cache is there, and note that it is used.

    Raises:
        UserError: what is there is not ours.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"--cache-dir {str(path.parent)!r} cannot be read ({error}): choose another folder") from error
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        raise UserError(f"{path} is a link or another user's: choose another --cache-dir")
    os.utime(path, ns=(time.time_ns(), found.st_mtime_ns))
    return True


def _remove_old(folder: Path) -> None:
    for path in folder.glob("faces-*.arrow"):
        unused_s = time.time() - max(path.stat().st_atime, path.stat().st_mtime)
        if unused_s > KEPT_DAYS * 24 * 3600:
            logger.info("removing %s, which no training has used for %d days", path, unused_s // (24 * 3600))
            path.unlink(missing_ok=True)


def _cache_name(
    success: dict[str, Any], splits: Sequence[str], photos_limit: int, only: Only | None, taken: FaceFilter
) -> str:
    chosen: list[Any] = [*([photos_limit] if photos_limit else []), *([only.digest()] if only else [])]
    chosen += [str(taken)] if taken else []
    content = json.dumps([FORMAT_VERSION, success, *chosen], sort_keys=True)
    return f"faces-{'-'.join(splits)}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.arrow"


@contextmanager
def _locked(descriptor: int, path: Path) -> Iterator[None]:
    """Hold the lock, which the system takes back from a process that dies."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("waiting for another process of this node to make %s", path)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield


def _build(
    urls: Sequence[str], splits: Sequence[str], path: Path, photos_limit: int, kept: Only | None, taken: FaceFilter
) -> None:
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        num_bytes_needed = sum(pool.map(_num_bytes, urls))
    if photos_limit:
        kept = Only(column="identity", names=limited_identities(read_names(urls, "identity", taken), photos_limit))
    if kept is not None:
        names = read_names(urls, kept.column)
        num_kept = pc.sum(pc.is_in(names, value_set=kept.names)).as_py() or 0
        num_bytes_needed = num_bytes_needed * num_kept // max(len(names), 1)
    others = [other.name for other in path.parent.glob(f"faces-{'-'.join(splits)}-*.arrow") if other != path]
    if others:
        logger.info("%s also holds caches of other faces: %s", path.parent, ", ".join(others))
    # Asked before the copy, because a disk found full at its end costs the user the time of all of it.
    if shutil.disk_usage(path.parent).free < num_bytes_needed:
        raise _disk_full(path.parent, num_bytes_needed)
    temporary = path.with_suffix(".unfinished")
    try:
        num_rows = _copy(urls, temporary, kept, taken)
        if num_rows:
            temporary.replace(path)
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise _disk_full(path.parent, num_bytes_needed) from error
    finally:
        temporary.unlink(missing_ok=True)
    if not num_rows:
        within = f" and within {taken}" if taken else ""
        raise NoFacesError(
            f"no photo in split {', '.join(splits)} of the faces table is aligned{within}: "
            "run jobs/preprocess.py on photos with faces first"
        )
    logger.info("made %s: %d crops, %.1f MB", path, num_rows, path.stat().st_size / 1e6)


def _disk_full(folder: Path, num_bytes_needed: int) -> JobError:
    return JobError(
        f"--cache-dir {str(folder)!r} is full: the crops need {num_bytes_needed:,} bytes there; "
        "make room or choose another folder"
    )


def _part_urls(faces_url: str, success: dict[str, Any], splits: Sequence[str]) -> list[str]:
    return [storage.join(faces_url, name) for split in splits for name in table.part_names(success, [split])]


def _num_bytes(url: str) -> int:
    """Return the bytes of the columns that are copied, as the file's footer has them."""
    with storage.open_parquet(url) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        columns = [group.column(i) for group in groups for i in range(group.num_columns)]
        return sum(c.total_uncompressed_size for c in columns if c.path_in_schema in CACHE_SCHEMA.names)


def _copy(urls: Sequence[str], path: Path, kept: Only | None, taken: FaceFilter) -> int:
    """Write the aligned faces that are `kept` (None: all), file after file; return how many there are."""
    return _written(path, _equal_batches(urls, kept, taken))


def write_batches(path: Path, batches: Iterator[pa.RecordBatch], num_bytes: int) -> None:
    """Write a cache file of batches of `CACHE_SCHEMA` that need about so many bytes.

    Raises:
        JobError: the disk is full.
    """
    try:
        _written(path, batches)
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise _disk_full(path.parent, num_bytes) from error


def _written(path: Path, batches: Iterator[pa.RecordBatch]) -> int:
    num_rows = 0
    path.unlink(missing_ok=True)  # of a process that was killed, or a link of somebody else
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as sink:
        with pa.ipc.new_file(sink, CACHE_SCHEMA) as writer:
            for batch in batches:
                writer.write_batch(batch)
                num_rows += len(batch)
        sink.flush()
        os.fsync(sink.fileno())  # a rename must not survive a power cut that the content does not
    return num_rows


def _equal_batches(urls: Sequence[str], only: Only | None, taken: FaceFilter) -> Iterator[pa.RecordBatch]:
    """Yield the aligned faces in batches of `ROWS_PER_BATCH`, the last one shorter."""
    pending: list[pa.RecordBatch] = []
    num_pending = 0
    for url in urls:
        with storage.open_parquet(url, table.columns(*CACHE_SCHEMA.names, "status")) as file:
            taken.check(file.schema_arrow, storage.redacted(url))
            for batch in file.iter_batches(ROWS_PER_BATCH, columns=[*CACHE_SCHEMA.names, "status", *taken.columns]):
                kept = batch.filter(_usable(batch, taken)).select(CACHE_SCHEMA.names)
                if only is not None:
                    kept = only.kept(kept)
                # A crop that is not there is met, counted and named like one that cannot be decoded.
                kept = kept.set_column(2, "crop", kept["crop"].fill_null(b""))
                pending.append(kept.cast(CACHE_SCHEMA))
                num_pending += len(kept)
                if num_pending >= ROWS_PER_BATCH:
                    joined = pa.concat_batches(pending)
                    yield joined[:ROWS_PER_BATCH]
                    pending = [joined[ROWS_PER_BATCH:]]
                    num_pending -= ROWS_PER_BATCH
    if num_pending:
        yield pa.concat_batches(pending)


def read_identities(
    faces_url: str,
    splits: Sequence[str],
    *,
    photos_limit: int = 0,
    run_id: str | None = None,
    taken: FaceFilter = EVERY_FACE,
) -> pa.ChunkedArray:
    """Return the identity of each row that such a cache holds, in its order, without reading the crops.

    Raises:
        UserError: the faces folder is absent or not finished, or the limit leaves nobody.
    """
    urls = _part_urls(faces_url, table.read_success(faces_url, run_id=run_id), splits)
    identities = read_names(urls, "identity", taken)
    if not photos_limit:
        return identities
    return identities.filter(pc.is_in(identities, value_set=limited_identities(identities, photos_limit)))


def num_left_out(faces_url: str, splits: Sequence[str], taken: FaceFilter, *, run_id: str | None = None) -> int:
    """Return how many aligned faces of people `taken` leaves out, and say it in the log."""
    urls = _part_urls(faces_url, table.read_success(faces_url, run_id=run_id), splits)
    num_all = len(read_names(urls, "identity"))
    num = num_all - len(read_names(urls, "identity", taken))
    logger.info("%d of %d faces are left out: not within %s", num, num_all, taken)
    return num


def read_names(
    urls: Sequence[str], column: Literal["photo", "identity"], taken: FaceFilter = EVERY_FACE
) -> pa.ChunkedArray:
    """Return the photo or the identity of each row of a cache of these parts, in its order."""
    columns = list(dict.fromkeys((column, "identity", "status")))

    def read(url: str) -> pa.ChunkedArray:
        with storage.open_parquet(url, table.columns(*columns)) as file:
            taken.check(file.schema_arrow, storage.redacted(url))
            part = file.read(columns=[*columns, *taken.columns])
        return part.filter(_usable(part, taken))[column]

    with ThreadPoolExecutor(READ_AHEAD) as pool:
        names = list(pool.map(read, urls))
    return pa.chunked_array([chunk for column in names for chunk in column.chunks], pa.string())


def limited_identities(identities: pa.ChunkedArray, photos_limit: int) -> pa.Array:
    """Return the people of a subset of at most so many photos, where `identities` has a name a photo.

    They come in the order of a hash of their names until the next one would be too many, so that a subset does not
    depend on the order of the photos, and a larger limit holds all people of a smaller one.

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


def _hash(identity: str) -> bytes:
    # Another hash than that which chose the split: who is in it has low values of that one.
    return hashlib.blake2b(f"limit\0{identity}".encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _usable(rows: pa.Table | pa.RecordBatch, taken: FaceFilter) -> pa.Array | pa.ChunkedArray:
    usable = pc.and_(pc.equal(rows["status"], table.ALIGNED), pc.is_valid(rows["identity"]))
    return pc.and_(usable, taken.keeps(rows)) if taken else usable


def decode_jpeg(jpeg: npt.NDArray[np.uint8], reduction: int = 1) -> npt.NDArray[np.uint8] | None:
    """Return the RGB pixels at 1/`reduction` (1, 2, 4 or 8) of the size, None where they cannot be decoded."""
    return cv2.imdecode(jpeg, _READ_FLAGS[reduction]) if len(jpeg) else None


def plain(jpeg: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8] | None:
    """Return the crop as RGB of `size` x `size` pixels, None where it cannot be decoded.

    Another size than the crop's own is made as for recognition, each pixel the mean of the area it covers.
    """
    pixels = decode_jpeg(jpeg)
    if pixels is None or pixels.shape[:2] == (size, size):
        return pixels
    return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)


class EncodedCrops:
    """The crops of a cache file as they are encoded; several threads may read at once."""

    def __init__(self, path: str) -> None:
        """Map the file; nothing is read."""
        self.path = path
        self._file = pa.ipc.open_file(pa.memory_map(path))
        self._batches = [self._file.get_batch(i) for i in range(self._file.num_record_batches)]

    def crop_bytes(self, row: int) -> npt.NDArray[np.uint8]:
        """Return the encoded crop, a view into the mapped file."""
        batch, place = divmod(row, ROWS_PER_BATCH)
        return np.frombuffer(self._batches[batch].column(2)[place].as_buffer(), np.uint8)


class FaceCache(EncodedCrops):
    """The crops of a cache file, by row, and whom they show.

    Attributes:
        photos: names of the photos, in Arrow's memory.
        identities: names of the people, sorted.
        labels_N: int32, the place of each row's identity in `identities`.
        crop_size: side of a crop in pixels.
        failed_rows: rows that could not be decoded so far.
    """

    def __init__(self, path: str) -> None:
        """Map the file; only the names are read."""
        super().__init__(path)
        self.photos: pa.ChunkedArray = pa.chunked_array([batch["photo"] for batch in self._batches])
        names = pa.chunked_array([batch["identity"] for batch in self._batches])
        sorted_names = names.unique().sort()
        self.identities: list[str] = sorted_names.to_pylist()
        self.labels_N: npt.NDArray[np.int32] = pc.index_in(names, sorted_names).to_numpy()
        self.failed_rows: set[int] = set()
        self.crop_size = self._find_crop_size()

    def __len__(self) -> int:
        return len(self.labels_N)

    def decode(
        self, rows: npt.NDArray[np.integer], size: int | None = None
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """Return the crops as RGB [N, H, W, 3], without augmentation, and which of them could not be decoded [N].

        A crop that could not be decoded is black, counted in `failed_rows` and named in the log.
        """
        side = size or self.crop_size
        images_NHWC = np.zeros((len(rows), side, side, 3), np.uint8)
        failed_N = np.zeros(len(rows), bool)
        for place, row in enumerate(rows.tolist()):
            pixels = plain(self.crop_bytes(row), side)
            if pixels is None:
                failed_N[place] = True
                self.note_failed(row)
            else:
                images_NHWC[place] = pixels
        return images_NHWC, failed_N

    def note_failed(self, row: int) -> None:
        """Count a crop that could not be decoded, and name it in the log once."""
        if row not in self.failed_rows:
            self.failed_rows.add(row)
            logger.warning("the crop of photo %r is corrupt and is skipped", self.photos[row].as_py())

    def _find_crop_size(self) -> int:
        for row in range(len(self)):
            pixels = decode_jpeg(self.crop_bytes(row))
            if pixels is not None:
                return pixels.shape[0]
        raise UserError("not one crop of the faces can be decoded: run jobs/preprocess.py --overwrite first")
