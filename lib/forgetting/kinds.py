"""The kinds of files that can contain a face or a name, and how to take it out. Add a new output to `KINDS`.

Tables of faces and of embeddings, which have versions, are in `tables.py`, copies on a node in `caches.py`.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import markupsafe
import pyarrow as pa
import pyarrow.parquet as pq

from lib.errors import UserError
from lib.faces.identities import identity_or_nobody
from lib.faces.identity_dialects import dialect_of
from lib.faces.photo_names import stored_name
from lib.forgetting.targets import IDENTITY, PHOTO, Targets, role_of

MANY = 1000
"""Up to so many photos, each is looked for in a page."""

_SAMPLED = 500
"""Number of lines that decide the dialect of a list."""

Without = Callable[[bytes, Targets], tuple[bytes, int]]
"""Returns the content of a file without the targets, and how often they were in it; 0 leaves the file as it is."""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        what: its name in the receipt.
        names: patterns of the names of such files.
        without: takes the targets out, and counts them.
        is_removed: the file is removed, because nothing can be taken out of a page or picture.
        again: the job that makes it again.
    """

    what: str
    names: tuple[str, ...]
    without: Without
    is_removed: bool = False
    again: str = ""

    def has(self, path: str) -> bool:
        """Return whether a file is of this kind."""
        return any(fnmatch(path.rpartition("/")[2], pattern) for pattern in self.names)


def parquet_without(data: bytes, targets: Targets) -> tuple[bytes, int]:
    """Return a Parquet file without the rows that name one of the targets."""
    try:
        with pq.ParquetFile(io.BytesIO(data)) as file:
            table = file.read()
            compression = file.metadata.row_group(0).column(0).compression if file.metadata.num_row_groups else "none"
    except pa.ArrowException as error:
        raise UserError(f"it is no whole Parquet file ({error})") from error
    named = targets.rows(table)
    num = named.true_count
    if not num:
        return data, 0
    sink = io.BytesIO()
    pq.write_table(
        table.filter(pa.compute.invert(named)), sink, compression=compression.replace("UNCOMPRESSED", "none")
    )
    return sink.getvalue(), num


def csv_without(data: bytes, targets: Targets) -> tuple[bytes, int]:
    """Return a CSV file with a header without the rows that name one of the targets."""
    rows = list(csv.reader(io.StringIO(data.decode("utf-8", "surrogateescape"), newline="")))
    if not rows:
        return data, 0
    roles = [role_of(name) for name in rows[0]]

    def names_one(row: list[str]) -> bool:
        # An apostrophe may keep a name from being a formula.
        forms = (
            (role, form) for role, cell in zip(roles, row, strict=False) for form in (cell, cell.removeprefix("'"))
        )
        return any(targets.holds(role, form) for role, form in forms)

    kept = [rows[0], *(row for row in rows[1:] if not names_one(row))]
    if len(kept) == len(rows):
        return data, 0
    sink = io.StringIO(newline="")
    csv.writer(sink).writerows(kept)
    return sink.getvalue().encode("utf-8", "surrogateescape"), len(rows) - len(kept)


def listed(data: bytes, targets: Targets) -> Iterator[tuple[int, str, str | None]]:
    """Yield line number from 1 on, photo and identity of each line of a list of identities, in any of its dialects."""
    pieces = re.split(r"\r\n|\r|\n", data.decode("utf-8-sig", "surrogateescape"))
    lines = [(number, line) for number, line in enumerate(pieces, 1) if line.strip()]
    if not lines:
        return
    sample = [line for _, line in lines[:: max(1, len(lines) // _SAMPLED)]]
    dialect = dialect_of(lines[0][1], sample, lambda names: {name for name in names if targets.listed(name)})
    for number, line in lines[1 if dialect.has_header else 0 :]:
        if (fields := dialect.fields(line)) is not None:
            photo = targets.listed(fields[0]) or stored_name(fields[0])
            yield number, photo, identity_or_nobody(stored_name(fields[1]))


def list_without(data: bytes, targets: Targets) -> tuple[bytes, int]:
    """Return a list of identities without the lines that name one of the targets; the others stay byte for byte."""
    gone = {
        number
        for number, photo, identity in listed(data, targets)
        if targets.holds(PHOTO, photo) or targets.holds(IDENTITY, identity)
    }
    # Lines and their ends in turns.
    pieces = re.split(r"(\r\n|\r|\n)", data.decode("utf-8", "surrogateescape"))
    kept = [piece for place, piece in enumerate(pieces) if place // 2 + 1 not in gone]
    return ("".join(kept).encode("utf-8", "surrogateescape"), len(gone)) if gone else (data, 0)


_GONE = object()


def json_without(data: bytes, targets: Targets) -> tuple[bytes, int]:
    """Return a JSON file without entries that are such a name, and with "(forgotten)" for a name within a text."""
    num = 0

    def kept(value: Any, role: str | None) -> Any:
        nonlocal num
        if isinstance(value, str):
            if targets.holds(PHOTO, value) or targets.holds(role, value):
                num += 1
                return _GONE
            text = targets.without_names(value)
            num += text != value
            return text
        if isinstance(value, list):
            items = [kept(item, role) for item in value]
            return [item for item in items if (item is not _GONE and item is not None) or item is None]
        if isinstance(value, dict):
            entries = {name: kept(item, role_of(name)) for name, item in value.items()}
            return {name: item for name, item in entries.items() if item is not _GONE}
        return value

    content = kept(json.loads(data), None)
    return ((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(), num) if num else (data, 0)


def names_on_page(data: bytes, targets: Targets) -> tuple[bytes, int]:
    """Return how many of the photos a page names, as they are or as in HTML and JSON.

    For more than `MANY` photos that would take hours, so every page counts as one that names them.
    """
    if len(targets.photos) > MANY:
        return data, 1
    num = 0
    for name in targets.photos:
        forms = {name, str(markupsafe.escape(name)), json.dumps(name)[1:-1]}
        num += any(form.encode("utf-8", "surrogateescape") in data for form in forms)
    return data, num


KINDS = (
    Kind("rows", ("usage.parquet", "suspects.parquet", "identities.parquet"), parquet_without),
    Kind("proposals", ("curation.parquet",), parquet_without),
    Kind("matches", ("matches.parquet", "matches-*.parquet"), parquet_without),
    Kind("spreadsheet", ("suspects.csv", "matches.csv", "matches-*.csv"), csv_without),
    Kind("list of identities", ("identities*.txt", "identities*.csv"), list_without),
    Kind("figures", ("metrics.json",), json_without),
    Kind("page", ("report.html",), names_on_page, is_removed=True, again="jobs/evaluate.py"),
    Kind("page", ("curation.html",), names_on_page, is_removed=True, again="jobs/curate.py"),
    Kind("picture", ("matches.jpg",), names_on_page, is_removed=True, again="jobs/identify.py"),
    Kind("picture", ("contact_sheet.jpg", "quality.jpg"), names_on_page, is_removed=True, again="jobs/preprocess.py"),
)
"""The first kind that matches a file counts. A page or picture is also removed if a file beside or below it names a
target, because it may show them without their name."""


def kind_of(path: str) -> Kind | None:
    """Return the kind of a file; None if it is no output that can contain a face or a name."""
    return next((kind for kind in KINDS if kind.has(path)), None)
