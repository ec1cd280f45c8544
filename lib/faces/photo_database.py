"""A database of photos on a scratch disk. It joins, sorts and counts more photos than fit into memory."""

import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from lib.errors import UserError
from lib.scratch import scratch_folder

FOLDER_PREFIX = "cf-photos-"
MEMORY = "400MB"
"""Memory of the database before it uses the disk. It does not grow with the number of photos."""
BATCH_ROWS = 65_536

_CONFIG: dict[str, Any] = {
    "memory_limit": MEMORY,
    "threads": 2,  # each takes a share of the memory, and a head may have 64 cores
    "preserve_insertion_order": False,  # queries that need an order ask for it
    "autoinstall_known_extensions": False,  # nothing is downloaded
    "autoload_known_extensions": False,
}


class PhotoDatabase:
    """DuckDB in a folder of its own, which is removed with the object.

    Attributes:
        folder: for further files that belong to the data.
        close: frees memory and disk before the object goes.
    """

    def __init__(self) -> None:
        """Make an empty database.

        Raises:
            UserError: there is no room for temporary files.
        """
        stack = ExitStack()
        try:
            self.folder = stack.enter_context(scratch_folder(Path(tempfile.gettempdir()), FOLDER_PREFIX))
        except OSError as error:
            raise UserError(f"temporary files cannot lie in {tempfile.gettempdir()} ({error}): set TMPDIR") from error
        config = {**_CONFIG, "temp_directory": str(self.folder / "spilled")}
        self._connection = stack.enter_context(duckdb.connect(str(self.folder / "photos.duckdb"), config=config))
        self._connection.execute("set enable_progress_bar = false")  # ours is shown
        self.close = weakref.finalize(self, stack.close)

    def run(self, sql: str, *values: Any) -> None:
        """Run a statement."""
        with _explained():
            self._connection.execute(sql, list(values))

    def append(self, name: str, rows: pa.Table | pa.RecordBatch) -> None:
        """Add rows to a table, whose columns are in this order."""
        batch = pa.Table.from_batches([rows]) if isinstance(rows, pa.RecordBatch) else rows
        with _explained():
            self._connection.register("appended", batch)
            self._connection.execute(f"insert into {name} select * from appended")
            self._connection.unregister("appended")

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Return the rows of a query whose result is small."""
        with _explained():
            return self._connection.execute(sql, list(values)).fetchall()

    def value(self, sql: str, *values: Any) -> Any:
        """Return the only value of a query."""
        return self.rows(sql, *values)[0][0]

    def batches(self, sql: str, schema: pa.Schema | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the result of a query, of any size. Meanwhile other queries may run."""
        with _explained():
            cursor = self._connection.cursor()
            for batch in cursor.sql(sql).to_arrow_reader(BATCH_ROWS):
                yield batch if schema is None else _cast(batch, schema)
            cursor.close()

    def table(self, sql: str, schema: pa.Schema) -> pa.Table:
        """Return the result of a query as a table in memory."""
        return pa.Table.from_batches(list(self.batches(sql, schema)), schema)


def columns_of(schema: pa.Schema, names: Sequence[str] = ()) -> str:
    """Return the columns of a schema, or these of them, as SQL names and types."""
    kinds = {pa.string(): "varchar", pa.int64(): "bigint", pa.bool_(): "boolean"}
    return ", ".join(f'"{each.name}" {kinds[each.type]}' for each in schema if not names or each.name in names)


def quoted(names: Sequence[str]) -> str:
    """Return the names of columns for SQL."""
    return ", ".join(f'"{name}"' for name in names)


def _cast(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [column.cast(each.type) for column, each in zip(batch.columns, schema, strict=True)], schema=schema
    )


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (duckdb.IOException, duckdb.OutOfMemoryException) as error:
        raise UserError(
            f"the list of photos does not fit into {tempfile.gettempdir()} ({str(error).splitlines()[0]}): free space "
            "there, or set TMPDIR to a folder on a larger disk"
        ) from error
