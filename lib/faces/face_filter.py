"""Selects faces of a table by its columns of quality: `--min-quality` and `--where`."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from lib.errors import UserError
from lib.faces import quality

logger = logging.getLogger(__name__)

_FORM = "--where is a list of column=lowest:highest such as yaw=-30:30,sharpness=50: with one end or both"


@dataclass(frozen=True)
class FaceFilter:
    """Ranges of columns of `lib.faces.quality`, ends included. A face is taken if it is in all of them."""

    ranges: Mapping[str, tuple[float, float]]

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def __str__(self) -> str:
        def end(value: float) -> str:
            return "" if math.isinf(value) else repr(float(value)).removesuffix(".0")

        return ",".join(f"{name}={end(low)}:{end(high)}" for name, (low, high) in sorted(self.ranges.items()))

    @property
    def columns(self) -> list[str]:
        """The columns of the ranges."""
        return sorted(self.ranges)

    def keeps(self, rows: pa.Table | pa.RecordBatch) -> pa.Array | pa.ChunkedArray:
        """Return which rows are taken, as booleans. A row without measures is not."""
        kept = pa.array([True] * len(rows), pa.bool_())
        for name, (low, high) in self.ranges.items():
            inside = pc.and_(pc.greater_equal(rows[name], low), pc.less_equal(rows[name], high))
            kept = pc.and_(kept, pc.fill_null(inside, False))
        return kept

    def check(self, schema: pa.Schema, shown_url: str) -> None:
        """Raise UserError if a table lacks the columns."""
        missing = [name for name in self.columns if name not in schema.names]
        if missing:
            raise UserError(
                f"{shown_url} has no column {', '.join(missing)}, which --min-quality and --where look at: it was made "
                "before they were; make it again with jobs/preprocess.py --faces ANOTHER FOLDER, or leave the flags out"
            )


EVERY_FACE = FaceFilter({})


def face_filter(min_quality: float, where: str) -> FaceFilter:
    """Return the filter of the flags.

    Args:
        min_quality: 0 to 1; 0 takes every face.
        where: ranges such as `yaw=-30:30,sharpness=50:`.

    Raises:
        UserError: a column is unknown, or a value is no range of numbers.
    """
    if not 0 <= min_quality <= 1:
        raise UserError(f"--min-quality is {min_quality}: allowed are 0 to 1")
    ranges: dict[str, tuple[float, float]] = {}
    for text in filter(None, (each.strip() for each in where.split(","))):
        name, equals, ends = text.partition("=")
        first, colon, last = ends.partition(":")
        if name not in quality.NAMES:
            raise UserError(f"--where {text!r}: no such column; there are {', '.join(quality.NAMES)}. {_FORM}")
        try:
            found = float(first or -math.inf), float(last or math.inf)
        except ValueError:
            found = math.nan, math.nan
        if not equals or not colon or not found[0] <= found[1]:
            raise UserError(f"--where {text!r} is no range: {_FORM}")
        if name in ranges:
            raise UserError(f"--where names {name} twice: {_FORM}")
        ranges[name] = found
    if min_quality > 0:
        low, high = ranges.get("quality", (-math.inf, math.inf))
        ranges["quality"] = max(low, min_quality), high
    return FaceFilter(ranges)
