"""Photos of a manifest, part by part, as rows of the faces table: what preprocess writes and what embed embeds."""

import itertools
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib.faces import table
from lib.faces.extraction import FaceExtractor
from lib.faces.manifest import Manifest
from lib.faces.sources.folder import ahead
from lib.faces.sources.source import Photo, Row, Source

if TYPE_CHECKING:
    from lib.faces.batch_extraction import BatchExtractor

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

# Small enough that an interruption costs little, large enough that ten million photos are ten thousand files.
MIN_PART, MAX_PART, PARTS_WANTED = 32, 1000, 64

PIECES_OF_A_GROUP = 4
"""A Parquet row group of at most `MAX_PART` photos is cut into no more parts, for each reads it from its beginning."""

READ_AHEAD = 16
"""Photos a worker asks for before it needs them, to hide the latency of a disk or a bucket."""

BATCH_SIZE = 128
"""Photos that a worker on a GPU extracts at once."""
BATCHES_AT_ONCE = 2

Extracted = tuple[Row, int, list[dict[str, Any]]]
"""An entry, the length of its file, and its rows of the faces table."""


@dataclass(frozen=True)
class Part:
    """Photos `start` to `stop` of the manifest, and the files they become."""

    index: int
    start: int
    stop: int
    splits: tuple[str, ...]

    def file_names(self) -> list[str]:
        """Return the files of this part below the faces folder."""
        return [part_name(split, self.index) for split in self.splits]


def part_name(split: str, index: int) -> str:
    """Return the path of the file that a part becomes in a split."""
    return f"split={split}/part-{index:06d}.parquet"


def plan_parts(manifest: Manifest) -> list[Part]:
    """Cut the manifest into parts; a part of files holds one split, a part of Parquet rows those that come."""
    size = min(MAX_PART, max(MIN_PART, len(manifest) // PARTS_WANTED))
    splits = manifest.photos["split"].combine_chunks()
    if manifest.photos["row"].null_count < len(manifest):
        stops = _parquet_stops(manifest, size)
    else:
        runs = [0, *pc.run_end_encode(splits).run_ends.to_pylist()]
        stops = [min(first + size, end) for start, end in pairwise(runs) for first in range(start, end, size)]
    parts: list[Part] = []
    for first, stop in pairwise([0, *stops]):
        present = pc.unique(splits.slice(first, stop - first)).to_pylist()
        parts.append(Part(len(parts), first, stop, tuple(sorted(present))))
    return parts


def _parquet_stops(manifest: Manifest, size: int) -> list[int]:
    """Return where parts of about so many rows end: between row groups where they can, for each reads its own anew."""
    sources = manifest.photos["source"].combine_chunks().dictionary_encode().indices.to_numpy()
    groups = manifest.photos["group"].to_numpy()
    ends = [*(np.flatnonzero(np.diff(sources) | np.diff(groups)) + 1).tolist(), len(manifest)]
    stops = [0]
    for start, end in pairwise([0, *ends]):
        if end - stops[-1] > size and start > stops[-1]:
            stops.append(start)
        num_pieces = min(-(-(end - start) // size), max(PIECES_OF_A_GROUP, -(-(end - start) // MAX_PART)))
        stops += [start + (end - start) * piece // num_pieces for piece in range(1, num_pieces)]
    return [*stops[1:], len(manifest)]


def part_item(manifest: Manifest, part: Part) -> dict[str, Any]:
    """Return what travels to a worker: the part's number, and its rows of the manifest as an Arrow stream."""
    photos = manifest.photos.slice(part.start, part.stop - part.start)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, photos.schema) as writer:
        writer.write_table(photos)
    return {"index": part.index, "photos": sink.getvalue().to_pybytes()}


@dataclass
class SplitRows:
    """The rows of one part in one split, and the number and size of the photos that they were made from."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    num_photos: int = 0
    num_bytes: int = 0


class PhotoReader:
    """Reads the photos of a part ahead, and turns each into its rows of the faces table."""

    def __init__(self, source: Source, extractor: "FaceExtractor | BatchExtractor") -> None:
        self._source = source
        self._extractor = extractor

    def rows(self, item: dict[str, Any]) -> dict[str, SplitRows]:
        """Return the rows of a part made by `part_item`, by split."""
        entries = pa.ipc.open_stream(item["photos"]).read_all().to_pylist()
        splits = {entry["split"]: SplitRows() for entry in entries}
        with ThreadPoolExecutor(BATCHES_AT_ONCE) as extractors:
            for entry, length, faces in self._extracted(self._read(entries), extractors):
                made = splits[entry["split"]]
                made.num_photos += 1
                made.num_bytes += length
                made.rows.extend(faces)
        return splits

    @property
    def _num_read_ahead(self) -> int:
        return READ_AHEAD if isinstance(self._extractor, FaceExtractor) else BATCH_SIZE

    def _extracted(self, read: Iterator[Photo], pool: ThreadPoolExecutor) -> Iterator[Extracted]:
        """Yield each photo's entry, the length of its file, and its rows."""
        if isinstance(self._extractor, FaceExtractor):
            for entry, data in read:
                faces = [{"status": data}] if isinstance(data, str) else self._extractor.rows(data)
                yield self._named(entry, data, faces)
            return
        # While one batch is encoded the next is on the device.
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
        return entry, 0 if isinstance(data, str) else len(data), faces

    def _read(self, entries: list[Row]) -> Iterator[Photo]:
        """Yield each entry with the photo's bytes, or with the status that says why there are none."""
        wanted = [entry for entry in entries if entry["status"] is None]
        read = self._source.read(wanted, num_ahead=self._num_read_ahead)
        for entry in entries:
            yield (entry, entry["status"]) if entry["status"] is not None else next(read)


def _batched(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while batch := list(itertools.islice(items, size)):
        yield batch
