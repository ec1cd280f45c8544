"""CSV files from and for spreadsheets, which run a text as a formula if it begins like one."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


def harmless(value: Any) -> Any:
    """Return a value that is safe in a CSV file: an apostrophe goes before a text that a spreadsheet would run."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value


def read_csv(content: bytes, *, text: Sequence[str]) -> pa.Table:
    """Return a CSV file whose fields are parted by commas, semicolons or tabs. The columns `text` hold no numbers.

    Raises:
        pa.ArrowException: it cannot be read. UnicodeDecodeError: it is not UTF-8.
    """
    header = content.decode("utf-8-sig").partition("\n")[0]  # Arrow would notice other bytes only at the first use
    return pa.csv.read_csv(
        io.BytesIO(content),
        parse_options=pa.csv.ParseOptions(delimiter=max(",;\t", key=header.count)),
        convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(text, pa.string())),
    )


def csv_bytes(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Return rows as a CSV file in UTF-8; no name in it is a formula."""
    sink = io.StringIO(newline="")
    writer = csv.writer(sink)
    writer.writerow([harmless(name) for name in header])
    writer.writerows([harmless(value) for value in row] for row in rows)
    return sink.getvalue().encode("utf-8", "backslashreplace")
