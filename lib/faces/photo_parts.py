"""Turns the photos of a part into rows of the faces table. preprocess writes them, and embed embeds them."""

import itertools
import json
import logging
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from lib import storage
from lib.errors import JobError, UserError
from lib.faces import table
from lib.faces.extraction import FaceExtractor
from lib.faces.plan_files import MADE_OF, Part, PartPlan, read_rows
from lib.faces.sources.source import Photo, Row, Source
from lib.threads import ahead

if TYPE_CHECKING:
    from lib.faces.batch_extraction import BatchExtractor

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

READ_AHEAD = 16
"""Photos that a worker reads ahead, to hide the latency of a disk or a bucket."""

BATCH_SIZE = 128
"""Photos that a worker on a GPU extracts at once."""
BATCHES_AT_ONCE = 2

Extracted = tuple[Row, int, list[dict[str, Any]]]
"""An entry, the length of its file, and its rows of the faces table."""


def part_item(plan: PartPlan, part: Part, earlier: Sequence[str] = ()) -> dict[str, Any]:
    """Return the item for a worker: the place of its planned photos, its files, and older files."""
    # As text, because Ray would give every item the keys of all.
    names, files = json.dumps(dict(part.names)), json.dumps(list(earlier))
    rows = {"manifest": plan.url, "shard": part.shard, "start": part.start, "stop": part.stop}
    return {**rows, "names": names, "earlier": files}


def photos_of(item: Mapping[str, Any]) -> pa.Table:
    """Return the planned photos of a part made by `part_item`."""
    return read_rows(item["manifest"], item["shard"], item["start"], item["stop"])


@dataclass
class SplitRows:
    """The rows of one part in one split, and the number and size of the photos that they were made from.

    Attributes:
        num_copied: photos whose rows come from an older file.
        made_on: devices that made the rows.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    num_photos: int = 0
    num_bytes: int = 0
    num_copied: int = 0
    made_on: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class EarlierRows:
    """Rows of older files, by the hash of their photo."""

    rows: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    made_on: dict[int, str] = field(default_factory=dict)


def read_earlier(faces_url: str, names: Sequence[str], wanted: pa.Array, not_of: Collection[str]) -> EarlierRows:
    """Return the rows of older files whose `made_of` is wanted, except those of a status in `not_of`.

    The files are read until all are found. If one is gone or damaged, its photos are extracted again.
    """
    found = EarlierRows()
    for name in names:
        if len(found.rows) == len(wanted):
            break
        try:
            url = storage.join(faces_url, name)
            with storage.open_parquet(url, table.columns(MADE_OF)) as file:
                is_wanted = pc.is_in(file.read(columns=[MADE_OF])[MADE_OF], wanted)
                if not pc.any(is_wanted).as_py():
                    continue
                made_on = (file.schema_arrow.metadata or {}).get(table.MADE_ON_KEY, b"").decode()
                rows = file.read().filter(is_wanted).to_pylist()
        except (UserError, JobError) as error:
            logger.warning("%s: its photos are extracted again", error)
            continue
        for row in rows:
            if row["status"] not in not_of:
                found.rows.setdefault(row[MADE_OF], []).append(row)
                found.made_on[row[MADE_OF]] = made_on
    return found


class PhotoReader:
    """Reads the photos of a part ahead, and turns each into its rows of the faces table."""

    def __init__(self, source: Source, extractor: "FaceExtractor | BatchExtractor") -> None:
        self._source = source
        self._extractor = extractor

    def rows(self, item: dict[str, Any], faces_url: str = "", retry: Collection[str] = ()) -> dict[str, SplitRows]:
        """Return the rows of a part made by `part_item`, by split.

        Rows of unchanged photos come from older files below `faces_url`, with the present identity. Those with a
        status in `retry` are made again.
        """
        photos = photos_of(item)
        entries = photos.to_pylist()
        earlier = read_earlier(faces_url, json.loads(item["earlier"]), photos[MADE_OF].combine_chunks(), retry)
        splits = {entry["split"]: SplitRows() for entry in entries}
        new = [entry for entry in entries if entry[MADE_OF] not in earlier.rows]
        # Closed here, not by the garbage collector: it may do so while a thread starts, and closing waits for threads.
        with (
            ThreadPoolExecutor(BATCHES_AT_ONCE) as extractors,
            closing(self._read(new)) as read,
            closing(self._extracted(read, extractors)) as made,
        ):
            for entry in entries:
                split = splits[entry["split"]]
                if (rows := earlier.rows.get(entry[MADE_OF])) is not None:
                    split.rows.extend({**row, "identity": entry["identity"]} for row in rows)
                    split.num_copied += 1
                    split.num_bytes += entry["num_bytes"] if entry["status"] is None else 0
                    split.made_on.add(earlier.made_on[entry[MADE_OF]])
                else:
                    _, length, faces = next(made)
                    split.rows.extend(faces)
                    split.num_bytes += length and (entry["num_bytes"] or length)
                    split.made_on.add(self._extractor.made_on)
                split.num_photos += 1
        return splits

    @property
    def _num_read_ahead(self) -> int:
        return READ_AHEAD if isinstance(self._extractor, FaceExtractor) else BATCH_SIZE

    def _extracted(self, read: Iterator[Photo], pool: ThreadPoolExecutor) -> Generator[Extracted, None, None]:
        """Yield each photo's entry, the length of its file, and its rows."""
        if isinstance(self._extractor, FaceExtractor):
            for entry, data in read:
                faces = [{"status": data}] if isinstance(data, str) else self._extractor.rows(data)
                yield self._named(entry, data, faces)
            return
        # One batch is encoded while the next is on the device.
        for batch in ahead(pool, self._batch, _batched(read, BATCH_SIZE), num_ahead=BATCHES_AT_ONCE):
            yield from batch

    def _batch(self, photos: list[Photo]) -> list[Extracted]:
        assert not isinstance(self._extractor, FaceExtractor)
        faces = iter(self._extractor.rows([data for _, data in photos if isinstance(data, bytes)]))
        return [
            self._named(entry, data, [{"status": data}] if isinstance(data, str) else next(faces))
            for entry, data in photos
        ]

    def _named(self, entry: Row, data: bytes | str, faces: list[dict[str, Any]]) -> Extracted:
        several = self._extractor.settings.policy == "all" and faces[0]["status"] != table.NO_FACE
        for number, face in enumerate(faces):
            face["photo"] = f"{entry['photo']}#{number}" if several and "box" in face else entry["photo"]
            face["identity"] = entry["identity"]
            face[MADE_OF] = entry[MADE_OF]
        return entry, 0 if isinstance(data, str) else len(data), faces

    def _read(self, entries: list[Row]) -> Generator[Photo, None, None]:
        """Yield each entry with the photo's bytes, or with the status why there are none."""
        wanted = [entry for entry in entries if entry["status"] is None]
        with closing(self._source.read(wanted, num_ahead=self._num_read_ahead)) as read:
            for entry in entries:
                yield (entry, entry["status"]) if entry["status"] is not None else next(read)


def _batched(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while batch := list(itertools.islice(items, size)):
        yield batch
