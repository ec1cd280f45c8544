"""Counts the rows of a finished faces table, part by part."""

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa

from lib import storage
from lib.faces import quality, quality_figures, table
from lib.faces.photo_database import BATCH_ROWS, PhotoDatabase
from lib.parts import split_in

logger = logging.getLogger(__name__)

_MAX_REFUSED_NAMED = 200


class _People:
    """Counts the people of each split, in a database on disk because there may be millions."""

    def __init__(self) -> None:
        self._database = PhotoDatabase()
        self._database.run("create table people (split varchar, identity varchar)")
        self._waiting: list[pa.Table] = []

    def add(self, split: str, identities: list[str]) -> None:
        """Count the identities of aligned faces."""
        splits = pa.repeat(pa.scalar(split), len(identities))
        self._waiting.append(pa.table({"split": splits, "identity": pa.array(identities, pa.string())}))
        if sum(map(len, self._waiting)) >= BATCH_ROWS:
            self._write()

    def by_split(self) -> dict[str, int]:
        """Return the number of identities of each split."""
        self._write()
        counts = dict(self._database.rows("select split, count(distinct identity) from people group by split"))
        return {split: counts.get(split, 0) for split in table.SPLITS}

    def _write(self) -> None:
        if self._waiting:
            self._database.append("people", pa.concat_tables(self._waiting))
            self._waiting = []


@dataclass
class Totals:
    """The sums over all parts of a table."""

    statuses: dict[str, Counter[str]] = field(default_factory=lambda: {split: Counter() for split in table.SPLITS})
    people: _People = field(default_factory=_People)
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
    """What is read of a part: its rows without the crops, and the figures of its file."""

    names: list[str]
    identities: list[str | None]
    statuses: list[str]
    reasons: list[str | None]
    bytes_before: int
    """Size of the photos."""
    bytes_after: int
    """Size of the part."""
    made_on: str
    spread: quality_figures.Figures


def count_rows(faces_url: str, file_names: list[str]) -> Totals:
    """Return the sums over these parts, read in threads without their crops."""
    logger.info("counting %d parts", len(file_names))
    totals = Totals()
    with ThreadPoolExecutor(8) as pool:
        for name, part in zip(file_names, pool.map(lambda name: _read_part(faces_url, name), file_names), strict=True):
            _add(totals, split_in(name), part)
    return totals


def _read_part(faces_url: str, name: str) -> _Part:
    with storage.open_parquet(storage.join(faces_url, name), table.columns("photo", "identity", "status")) as file:
        columns = ["photo", "identity", "status", "reason", *quality.NAMES]
        rows = file.read(columns=[name for name in columns if name in file.schema_arrow.names])
        metadata = file.schema_arrow.metadata or {}
        footer = file.metadata
        num_bytes = sum(footer.row_group(i).total_byte_size for i in range(footer.num_row_groups))
    names, identities, statuses = (rows[column].to_pylist() for column in ("photo", "identity", "status"))
    return _Part(
        names=names,
        identities=identities,
        statuses=statuses,
        reasons=rows["reason"].to_pylist() if "reason" in rows.column_names else [None] * len(names),
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
    known = [
        identity
        for identity, status in zip(part.identities, part.statuses, strict=True)
        if status == table.ALIGNED and identity is not None
    ]
    totals.people.add(split, known)
    totals.num_known[split] += len(known)
    for name, status, reason in zip(part.names, part.statuses, part.reasons, strict=True):
        if status != table.ALIGNED and len(totals.refused) < _MAX_REFUSED_NAMED:
            totals.refused.append({"photo": name, "status": status, **({"reason": reason} if reason else {})})
