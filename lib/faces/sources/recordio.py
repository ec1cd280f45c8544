"""Photos in RecordIO files of MXNet: `train.rec`, with or without `train.idx`.

A file holds records, each `magic, cflag and length` (two little-endian uint32), its data, and zeros up to a multiple of
four bytes. Data that holds the magic number at a multiple of four bytes is cut there into pieces, and the magic is left
out (dmlc-core, `include/dmlc/recordio.h`). The data of a photo is `flag, label, id, id` (`<IfQQ`), `flag` labels more,
then the image (MXNet, `python/mxnet/recordio.py`).

Two layouts are common. InsightFace writes two labels for each image, and records without an image: key 0 and one for
each person. im2rec and others write one label and images alone. A record without an image is no photo in both. The
person is always the image's own label. The ranges that InsightFace keeps for each person are float32, and are wrong
from 2^24 on.
"""

import logging
import math
import struct
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
from pyarrow import csv

from lib import storage
from lib.errors import UserError
from lib.faces import table
from lib.faces.images import MAX_PHOTO_BYTES
from lib.faces.sources.record_frames import (
    FRAME,
    HEADER,
    LABEL,
    MAGIC,
    CutOffError,
    Record,
    content,
    is_followed,
    next_start,
    read_run,
    record_at,
)
from lib.faces.sources.source import BATCH_ROWS, ContainerSource, Photo, Row, Run, Shard, scan_batch
from lib.ranged_files import RangedFile

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 * 2**20
"""Bytes of a file that one task scans."""

_CHECKED = 64
"""Number of offsets of an index that are checked in its file."""


class RecordioSource(ContainerSource):
    """RecordIO files. A photo is named by the place of its record: `train.rec#4096`; that is its `row` too."""

    format = "rec"
    what = "RecordIO files"
    suffixes = (".rec",)
    companions = (".idx", ".lst")

    def shards(self) -> list[Shard]:
        """Return ranges of the files, after checking that their indexes belong to them."""
        shards = []
        for info in self.files():
            self._check_index(info.path, info.num_bytes)
            starts = range(0, max(info.num_bytes, 1), SHARD_BYTES)
            shards += [Shard(info.path, start, min(start + SHARD_BYTES, info.num_bytes), info.mark) for start in starts]
        return shards

    def scan(self, shard: Shard) -> Iterator[pa.RecordBatch]:
        """Yield the photos whose records begin in the range of a shard.

        Records that are damaged, cut off or without an image are counted, and the scan continues with the next one.
        """
        file = RangedFile(self.file_url(shard.name))
        rows: list[tuple[str | None, int, int]] = []
        damaged, unlabelled = (self.passed_over[kind] for kind in ("damaged records", "labels that are no numbers"))
        for record in self._records(file, shard):
            labelled = self._label_and_size(file, record)
            if labelled is not None:
                rows.append((labelled[0], record.start, labelled[1]))
            if len(rows) == BATCH_ROWS:
                yield self._batch(shard, rows)
                rows = []
        if rows:
            yield self._batch(shard, rows)
        shown = storage.redacted(file.url)
        if num := self.passed_over["damaged records"] - damaged:
            logger.warning("%s: %d damaged stretches are passed over", shown, num)
        if num := self.passed_over["labels that are no numbers"] - unlabelled:
            logger.warning("%s: %d labels are no numbers: their photos are of nobody known", shown, num)

    def read_file(self, name: str, rows: Iterable[Row]) -> Iterator[Photo]:
        """Yield the photos of rows, with one block of the file in memory; `corrupt` if the record is gone."""
        file = RangedFile(self.file_url(name))
        for row in rows:
            try:
                record = record_at(file, row["row"])
                head = content(file, record, 0, HEADER.size)
                yield row, content(file, record, HEADER.size + 4 * HEADER.unpack(head)[0], MAX_PHOTO_BYTES + 1)
            except (ValueError, struct.error):
                yield row, table.CORRUPT

    def read_run(self, name: str, rows: pa.Table) -> Run | None:
        """Return the photos of rows, by one read of the file."""
        start_N, size_N = (rows[column].to_numpy() for column in ("row", "num_bytes"))
        return read_run(self.file_url(name), start_N, size_N)

    def _records(self, file: RangedFile, shard: Shard) -> Iterator[Record]:
        """Yield the whole records that begin in a range."""
        position = shard.start
        if position == 0 and file.at(0, 4) != MAGIC:
            raise UserError(
                f"{storage.redacted(file.url)} is no RecordIO file (it does not begin with its magic number): name "
                "another by --photos, or its format by --photos-format"
            )
        if position:
            position = next_start(file, position, shard.stop)
        while position < shard.stop:
            try:
                record = record_at(file, position)
            except CutOffError:
                following = next_start(file, position + 4, file.num_bytes)
                if following >= file.num_bytes:
                    self.passed_over["records cut off"] += 1
                    logger.warning(
                        "%s is cut off: its last %d bytes hold no whole record",
                        *(storage.redacted(file.url), file.num_bytes - position),
                    )
                    return
                self.passed_over["damaged records"] += 1
                position = following
                continue
            except ValueError:
                self.passed_over["damaged records"] += 1
                position = next_start(file, position + 4, file.num_bytes)
                continue
            if not is_followed(file, record):
                within = next_start(file, position + 4, record.stop)
                if within < record.stop:  # its length is wrong, because another record begins within it
                    self.passed_over["damaged records"] += 1
                    position = within
                    continue
            yield record
            position = record.stop

    def _label_and_size(self, file: RangedFile, record: Record) -> tuple[str | None, int] | None:
        """Return a photo's label as text, and its size; None for a record without an image."""
        head = content(file, record, 0, HEADER.size + LABEL.size)
        if len(head) < HEADER.size:
            self.passed_over["damaged records"] += 1
            return None
        num_labels, label, _, _ = HEADER.unpack_from(head)
        size = record.num_bytes - HEADER.size - LABEL.size * num_labels
        if size <= 0:
            self.passed_over["records without an image" if size == 0 else "damaged records"] += 1
            return None
        if num_labels:
            (label,) = LABEL.unpack_from(head, HEADER.size)
        if not math.isfinite(label):
            self.passed_over["labels that are no numbers"] += 1
            return None if size <= 0 else ("", size)
        return (str(int(label)) if label == int(label) else f"{label:.9g}"), size

    def _batch(self, shard: Shard, rows: list[tuple[str | None, int, int]]) -> pa.RecordBatch:
        labels, starts, sizes = zip(*rows, strict=True)
        names = [f"{self.stem(shard.name)}#{start}" for start in starts]
        return scan_batch(shard, names, [label or None for label in labels], starts, sizes)

    def _check_index(self, name: str, num_bytes: int) -> None:
        """Count the records that an index names beyond the end of its file.

        Raises:
            UserError: it is no index, or the index of another file.
        """
        url = self.file_url(name)[: -len(".rec")] + ".idx"
        if not storage.exists(url):
            return
        shown = storage.redacted(url)
        next_step = "remove or replace it (without an index the .rec file is read just as well)"
        try:
            options = csv.ReadOptions(column_names=["key", "offset"])
            types = csv.ConvertOptions(column_types={"key": pa.int64(), "offset": pa.int64()})
            data = pa.BufferReader(storage.read_bytes(url))
            offsets = csv.read_csv(data, options, csv.ParseOptions(delimiter="\t"), types)["offset"].to_numpy()
        except pa.ArrowInvalid as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{shown} is no index of a RecordIO file ({reason}): {next_step}") from error
        within = np.sort(offsets[offsets < num_bytes])
        file = RangedFile(self.file_url(name), num_bytes, block_bytes=FRAME.size)
        sample = within[:: max(1, len(within) // _CHECKED)]
        wrong = [int(offset) for offset in sample if file.at(int(offset), 4) != MAGIC]
        if 2 * len(wrong) > len(sample) or (len(offsets) and not len(within)):
            example = wrong[0] if wrong else int(offsets[0])
            raise UserError(
                f"{shown} is the index of another file: no record of {storage.redacted(file.url)} begins at {example}, "
                f"as it says: {next_step}"
            )
        if num_beyond := len(offsets) - len(within):
            self.passed_over["records cut off"] += num_beyond
            logger.warning(
                "%s names %d records beyond the end of its file, which is cut off: they are lost", shown, num_beyond
            )
