"""Counts the rows of a finished faces table, part by part."""

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from lib import storage
from lib.faces import quality, quality_figures, table
from lib.faces.people import People
from lib.parts import split_in
from lib.threads import mapped

logger = logging.getLogger(__name__)

_MAX_REFUSED_NAMED = 200
_READERS = 8


@dataclass
class Totals:
    """The sums over all parts of a table."""

    statuses: dict[str, Counter[str]] = field(default_factory=lambda: {split: Counter() for split in table.SPLITS})
    people: People = field(default_factory=People)
    num_known: Counter[str] = field(default_factory=Counter)
    refused: list[dict[str, str]] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    made_on: set[str] = field(default_factory=set)
    quality: quality_figures.Figures = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return sum(counts.total() for counts in self.statuses.values())


class _Part(NamedTuple):
    """The counts of a part, and what is kept of its rows."""

    statuses: Counter[str]
    known: pa.ChunkedArray
    """The identity of each aligned face that has one."""
    refused: list[dict[str, str]]
    bytes_before: int
    """Size of the photos."""
    bytes_after: int
    """Size of the part."""
    made_on: str
    spread: quality_figures.Figures


def count_rows(faces_url: str, file_names: list[str]) -> Totals:
    """Return the sums over these parts, read in threads without their crops, a few at a time."""
    logger.info("counting %d parts", len(file_names))
    totals = Totals()
    with mapped(lambda name: _read_part(faces_url, name), file_names, num_threads=_READERS) as parts:
        for name, part in zip(file_names, parts, strict=True):
            _add(totals, split_in(name), part)
    return totals


def _read_part(faces_url: str, name: str) -> _Part:
    with storage.open_parquet(storage.join(faces_url, name), table.columns("photo", "identity", "status")) as file:
        columns = ["photo", "identity", "status", "reason", *quality.NAMES]
        rows = file.read(columns=[name for name in columns if name in file.schema_arrow.names])
        metadata = file.schema_arrow.metadata or {}
        footer = file.metadata
        num_bytes = sum(footer.row_group(i).total_byte_size for i in range(footer.num_row_groups))
    is_aligned = pc.equal(rows["status"], table.ALIGNED)
    named = [column for column in ("photo", "status", "reason") if column in rows.column_names]
    refused = rows.filter(pc.invert(is_aligned)).slice(0, _MAX_REFUSED_NAMED).select(named).to_pylist()
    return _Part(
        statuses=Counter(rows["status"].to_pylist()),
        known=rows["identity"].filter(is_aligned).drop_null(),
        refused=[{column: value for column, value in row.items() if value is not None} for row in refused],
        bytes_before=int(metadata.get(table.BYTES_KEY, b"0")),
        bytes_after=num_bytes,
        made_on=metadata.get(table.MADE_ON_KEY, b"").decode(),
        spread=quality_figures.of_part(name, rows),
    )


def _add(totals: Totals, split: str, part: _Part) -> None:
    quality_figures.merged(totals.quality, part.spread)
    totals.made_on |= set(part.made_on.split(", ")) - {""}
    totals.statuses[split].update(part.statuses)
    totals.bytes_before += part.bytes_before
    totals.bytes_after += part.bytes_after
    totals.people.add(split, part.known)
    totals.num_known[split] += len(part.known)
    totals.refused += part.refused[: _MAX_REFUSED_NAMED - len(totals.refused)]
