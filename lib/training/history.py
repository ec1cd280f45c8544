"""The history of a run: a row for each epoch in Parquet, CSV, Excel and TensorBoard, and what follows from the rows."""

import io
import math
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa

from lib import storage
from lib.csv_text import csv_bytes

Scalar = int | float | str | bool | None
Row = dict[str, Scalar]

MODEL_FOLDER = "model"
TENSORBOARD_FOLDER = "tensorboard"

ORIGINAL_COLUMNS = {
    "Train Loss": "train_loss",
    "no train rows": "num_train_triplets",
    "Test Loss": "val_loss",
    "No test rows": "num_val_triplets",
    "Time taken (M)": "time_min",
    "Notes": "notes",
}
"""Columns of the original project, and our keys with the same values; Date and Time follow."""

MAX_COLUMN_WIDTH = 60


class History:
    """The history of a run; after each epoch every file of it is complete.

    Attributes:
        rows: one dictionary an epoch, in order.
    """

    def __init__(self, run_url: str, *, next_epoch: int) -> None:
        """Load the rows before `next_epoch`. Later rows are dropped, because their epochs are done again."""
        from torch.utils.tensorboard import SummaryWriter

        self._run_url = run_url
        self.rows = [row for row in read_rows(run_url) if int(row["epoch"] or 0) < next_epoch]
        self._upload_from: tempfile.TemporaryDirectory[str] | None = None
        if "://" in run_url:
            self._upload_from = tempfile.TemporaryDirectory(prefix="tensorboard-")
        folder = self._upload_from.name if self._upload_from else storage.join(run_url, TENSORBOARD_FOLDER)
        self._writer = SummaryWriter(folder, purge_step=next_epoch)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        if self._upload_from:
            self._upload_from.cleanup()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add the row of an epoch and write all files.

        `row` has `epoch`, the known keys of `ORIGINAL_COLUMNS`, and any other scalars. Keys may differ between epochs.
        """
        plain: Row = {name: value.item() if isinstance(value, np.generic) else value for name, value in row.items()}
        assert not self.rows or int(plain["epoch"] or 0) > int(self.rows[-1]["epoch"] or 0), "an epoch comes once"
        now = datetime.now().astimezone()
        original: Row = {name: plain.get(key) for name, key in ORIGINAL_COLUMNS.items()}
        self.rows.append({**plain, **original, "Date": now.strftime("%Y-%m-%d"), "Time": now.strftime("%H:%M:%S")})
        write_history(self._run_url, self.rows)
        self._write_events(plain)

    def values(self, key: str) -> list[float]:
        """Return the numbers of a key, without the epochs that lack it."""
        return [float(value) for row in self.rows if isinstance(value := row.get(key), int | float)]

    def _write_events(self, row: Row) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "epoch":
                self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()
        if self._upload_from:
            folder = storage.join(self._run_url, TENSORBOARD_FOLDER)
            for path in Path(self._upload_from.name).iterdir():
                storage.write_bytes(storage.join(folder, path.name), path.read_bytes())


def write_history(url: str, rows: Sequence[Row]) -> None:
    """Write rows as Parquet, CSV and Excel into a folder; a column `run`, if there is one, comes first."""
    # Parquet first: a resumed run reads it.
    storage.write_parquet(storage.join(url, "history.parquet"), _table(rows))
    storage.write_bytes(storage.join(url, "history.csv"), _csv(rows))
    storage.write_bytes(storage.join(url, "history.xlsx"), _excel(rows))


def read_rows(run_url: str) -> list[Row]:
    """Return the rows of a run's history; none if it has not begun."""
    url = storage.join(run_url, "history.parquet")
    if not storage.exists(url):
        return []
    with storage.open_parquet(url, [pa.field("epoch", pa.int64())]) as file:
        return file.read().to_pylist()


def run_result(rows: Sequence[Row], best_epoch: int) -> dict[str, Any]:
    """Return the entries of the job's last line about a run."""
    best = next((row for row in rows if row["epoch"] == best_epoch), rows[-1] if rows else {})
    names = watched_names(best)
    seconds = sum(float(row.get("seconds") or 0) for row in rows)
    images = sum(int(row.get("num_images") or 0) for row in rows)
    return {
        "epochs": len(rows),
        "best_epoch": best.get("epoch"),
        **{name: best.get(name) for name in ("accuracy", "accuracy_std", "auc", "eer", "val_loss_random")},
        **({"pairs_of_files": {name: best[f"{name}_accuracy"] for name in names}} if names else {}),
        "images": images,
        "train_seconds": round(seconds, 1),
        "images_per_s": round(images / seconds, 1) if seconds else None,
    }


def watched_names(row: Mapping[str, Any]) -> list[str]:
    """Return the names of the files of pairs with an accuracy in a row."""
    suffix = "_accuracy"
    return [name.removesuffix(suffix) for name, value in row.items() if name.endswith(suffix) and value is not None]


def _columns(rows: Sequence[Row]) -> list[str]:
    """Return the keys of all rows in the order of their first use, after the original's columns."""
    ours = [name for row in rows for name in row]
    leading = ["run"] if "run" in ours else []
    return list(dict.fromkeys([*leading, "epoch", *ORIGINAL_COLUMNS, "Date", "Time", *ours]))


def _table(rows: Sequence[Row]) -> pa.Table:
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in _columns(rows)})


def _csv(rows: Sequence[Row]) -> bytes:
    columns = _columns(rows)
    return csv_bytes(columns, ([row.get(name) for name in columns] for row in rows))


def _excel(rows: Sequence[Row]) -> bytes:
    import openpyxl
    from openpyxl.styles import Font
    from openpyxl.utils import get_column_letter

    workbook = openpyxl.Workbook()
    sheet = workbook.active
    sheet.title = "history"
    sheet.freeze_panes = "B2"
    for column, name in enumerate(_columns(rows), start=1):
        values = [row.get(name) for row in rows]
        for place, value in enumerate([name, *values], start=1):
            _fill(sheet.cell(place, column), value)
        sheet.cell(1, column).font = Font(bold=True)
        longest = max(len(f"{value:.6g}" if isinstance(value, float) else str(value)) for value in [name, *values])
        sheet.column_dimensions[get_column_letter(column)].width = min(longest + 2, MAX_COLUMN_WIDTH)
    content = io.BytesIO()
    workbook.save(content)
    return content.getvalue()


def _fill(cell: Any, value: Scalar) -> None:
    """Write the value into the cell. Text is never a formula, and NaN leaves the cell empty."""
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    if isinstance(value, float) and math.isinf(value):
        value = str(value)
    if isinstance(value, str):
        cell.value = ILLEGAL_CHARACTERS_RE.sub("", value)
        cell.data_type = "s"  # openpyxl made a formula of "=…"
    elif value is not None and not math.isnan(value):
        cell.value = value


def has_plateaued(values: Sequence[float], *, patience: int, min_delta: float = 0.0) -> bool:
    """Return whether none of the last `patience` values is lower than all before by more than `min_delta`.

    NaN is no improvement. Negate a measure of which more is better.
    """
    if len(values) <= patience:
        return False
    lowest_before = min((value for value in values[:-patience] if not math.isnan(value)), default=math.inf)
    return not any(value < lowest_before - min_delta for value in values[-patience:])


def is_overfitting(train_losses: Sequence[float], val_losses: Sequence[float], *, patience: int) -> bool:
    """Return whether the training loss fell and the validation loss rose in each of the last `patience` epochs.

    Both must use one policy of negatives: give only the epochs since its last change.
    """
    if min(len(train_losses), len(val_losses)) <= patience:
        return False
    return bool(np.all(np.diff(train_losses[-patience - 1 :]) < 0) and np.all(np.diff(val_losses[-patience - 1 :]) > 0))


def has_collapsed(variances: Sequence[float], *, min_share: float = 0.1) -> bool:
    """Return whether the last variance of the embeddings is NaN or below `min_share` of the highest so far."""
    if not variances:
        return False
    highest = max((value for value in variances if not math.isnan(value)), default=math.inf)
    return not variances[-1] >= min_share * highest
