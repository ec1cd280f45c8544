"""CSV files for spreadsheets, which run a text as a formula if it begins like one."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


def harmless(value: Any) -> Any:
    """Return a value that is safe in a CSV file: an apostrophe goes before a text that a spreadsheet would run."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value


def csv_bytes(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Return rows as a CSV file in UTF-8; no name in it is a formula."""
    sink = io.StringIO(newline="")
    writer = csv.writer(sink)
    writer.writerow([harmless(name) for name in header])
    writer.writerows([harmless(value) for value in row] for row in rows)
    return sink.getvalue().encode("utf-8", "backslashreplace")
