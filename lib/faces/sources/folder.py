"""Photos that are files, in a folder of any depth."""

import logging
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pyarrow as pa

from lib import storage
from lib.errors import JobError, UserError
from lib.faces import table
from lib.faces.images import MAX_PHOTO_BYTES, PHOTO_SUFFIXES
from lib.faces.photo_names import name_on_disk, stored_name
from lib.faces.sources.source import BATCH_ROWS, SCAN_SCHEMA, Photo, Row, Shard, Source
from lib.listing import FileInfo
from lib.threads import ahead

logger = logging.getLogger(__name__)

NUM_READERS = 16
"""Threads that read photos, to hide the latency of a disk or a bucket."""


class FolderSource(Source):
    """A folder of photos. It gives no identities: the folders of all photos together decide them."""

    format = "folder"
    what = "pictures"
    suffixes = PHOTO_SUFFIXES

    @property
    def is_sorted(self) -> bool:
        """Whether the order of its files decides the order of its photos."""
        return False

    def shards(self) -> list[Shard]:
        """Return the whole folder. A folder of a bucket below it can be scanned alone too."""
        return [Shard("")]

    def scan(self, shard: Shard) -> Iterator[pa.RecordBatch]:
        """Yield the photos of a folder, in no order."""
        yield from self.batches(self.files(shard.name))

    @staticmethod
    def batches(files: Iterator[FileInfo]) -> Iterator[pa.RecordBatch]:
        """Yield photos as batches of `SCAN_SCHEMA`."""
        while batch := list(islice(files, BATCH_ROWS)):
            nothing = pa.nulls(len(batch))
            columns = [
                pa.array([stored_name(info.path) for info in batch], pa.string()),
                *(nothing.cast(kind) for kind in (pa.string(), pa.string(), pa.int64(), pa.int64())),
                pa.array([info.num_bytes for info in batch], pa.int64()),
                pa.array([info.mark for info in batch], pa.string()),
            ]
            yield pa.RecordBatch.from_arrays(columns, schema=SCAN_SCHEMA)

    def read(self, rows: Iterable[Row], *, num_ahead: int) -> Generator[Photo, None, None]:
        """Yield each row with its photo: `missing` if it is gone, `corrupt` if it may not be read.

        A photo is `changed` if its length is not that of the listing: it was replaced since, or is being written.
        Another photo of the same length is read. Its mark differs at the next listing, which plans it anew.

        Raises:
            JobError: the whole folder is gone, such as a share that is no longer mounted.
        """
        with ThreadPoolExecutor(NUM_READERS) as readers:
            yield from ahead(readers, self._read, rows, num_ahead=num_ahead)

    def _read(self, row: Row) -> Photo:
        try:
            data = storage.read_bytes(self.file_url(name_on_disk(row["photo"])), MAX_PHOTO_BYTES + 1)
        except FileNotFoundError:
            if not storage.holds_anything(self.url):
                raise JobError(
                    f"{storage.redacted(self.url)} is gone: mount or restore it; the same command goes on from here"
                ) from None
            return row, table.MISSING
        except UserError as error:
            logger.warning("%s: %s", row["photo"], error)
            return row, table.CORRUPT
        # 0 where the storage does not tell. Lists of the user can be older than the photos.
        listed = row.get("num_bytes") if self.list_url is None else 0
        return row, table.CHANGED if listed and len(data) != min(listed, MAX_PHOTO_BYTES + 1) else data
