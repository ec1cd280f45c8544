"""History files as users and resumed runs read them, and the warnings that are read off them."""

import csv
import math
import re
from pathlib import Path

import numpy as np
import openpyxl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lib import storage
from lib.training.history import History, has_collapsed, has_plateaued, is_overfitting

ORIGINAL = ["Train Loss", "no train rows", "Test Loss", "No test rows", "Time taken (M)", "Notes", "Date", "Time"]


@pytest.fixture
def run_url(tmp_path: Path) -> str:
    return str(tmp_path / "a run's “name” é")


def epoch_row(epoch: int, **others: object) -> dict[str, object]:
    return {"epoch": epoch, "train_loss": 1 / epoch, "num_train_triplets": 5000, "time_min": 0.5, **others}


def test_every_file_holds_every_epoch_and_the_originals_columns(run_url):
    with History(run_url, next_epoch=1) as history:
        history.append(epoch_row(1, val_loss=0.75, num_val_triplets=2500, notes="größer; \"so\", 'so'"))
        history.append(epoch_row(2, phase="hard", variance=np.float32(0.5)))

    table = pq.read_table(f"{run_url}/history.parquet")
    assert set(ORIGINAL) <= set(table.column_names)
    assert table["Train Loss"].to_pylist() == table["train_loss"].to_pylist() == [1.0, 0.5]
    assert table["Test Loss"].to_pylist() == [0.75, None]
    assert table["No test rows"].to_pylist() == [2500, None]
    assert table["variance"].to_pylist() == [None, 0.5]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in table["Date"].to_pylist())
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d", clock) for clock in table["Time"].to_pylist())

    with Path(run_url, "history.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == table.column_names
    assert [row["Notes"] for row in rows] == ["größer; \"so\", 'so'", ""]
    assert [float(row["Time taken (M)"]) for row in rows] == [0.5, 0.5]


def test_excel_has_a_bold_frozen_header_and_numbers_as_numbers(run_url):
    with History(run_url, next_epoch=1) as history:
        history.append(epoch_row(1, nothing=math.nan, much=math.inf, done=True))
    sheet = openpyxl.load_workbook(f"{run_url}/history.xlsx").active
    cells = {header.value: cell for header, cell in zip(sheet[1], sheet[2], strict=True)}
    assert all(header.font.bold for header in sheet[1])
    assert sheet.freeze_panes == "B2"
    assert (cells["Train Loss"].value, cells["Train Loss"].data_type) == (1, "n")
    assert (cells["no train rows"].value, cells["no train rows"].data_type) == (5000, "n")
    assert cells["nothing"].value is None
    assert cells["much"].value == "inf"
    assert cells["done"].value is True
    assert all(8 * sheet.column_dimensions[header.column_letter].width > len(str(header.value)) for header in sheet[1])


@pytest.mark.parametrize("note", ["=1+1", '=HYPERLINK("http://x","y")', "@SUM(A1)", "+1", "-1", "#N/A", "bell \x07"])
def test_a_note_is_text_in_excel_whatever_it_starts_with(run_url, note):
    with History(run_url, next_epoch=1) as history:
        history.append(epoch_row(1, notes=note))
    sheet = openpyxl.load_workbook(f"{run_url}/history.xlsx").active
    cell = next(cell for header, cell in zip(sheet[1], sheet[2], strict=True) if header.value == "Notes")
    assert cell.data_type == "s"
    assert cell.value == note.replace("\x07", "")


def test_a_resumed_run_drops_the_epochs_that_are_done_again(run_url):
    with History(run_url, next_epoch=1) as history:
        for epoch in (1, 2, 3):
            history.append(epoch_row(epoch, phase="random"))
    with History(run_url, next_epoch=3) as history:
        assert [row["epoch"] for row in history.rows] == [1, 2]
        history.append(epoch_row(3, phase="hard", extra=9))
    table = pq.read_table(f"{run_url}/history.parquet")
    assert table["epoch"].to_pylist() == [1, 2, 3]
    assert table["phase"].to_pylist() == ["random", "random", "hard"]
    assert table["extra"].to_pylist() == [None, None, 9]


def test_values_leave_out_epochs_without_the_key(run_url):
    with History(run_url, next_epoch=1) as history:
        history.append(epoch_row(1))
        history.append(epoch_row(2, auc=0.5))
        history.append(epoch_row(3, auc=None))
        assert history.values("auc") == [0.5]
        assert history.values("epoch") == [1, 2, 3]


def test_tensorboard_shows_each_epoch_once_also_after_a_resume(run_url):
    with History(run_url, next_epoch=1) as history:
        history.append(epoch_row(1))
        history.append(epoch_row(2))
    with History(run_url, next_epoch=2) as history:
        history.append(epoch_row(2, train_loss=0.125))
    events = EventAccumulator(f"{run_url}/tensorboard")
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == [(1, 1.0), (2, 0.125)]


def test_history_in_object_storage_is_resumed_and_holds_the_events(s3_bucket):
    run_url = f"{s3_bucket}/runs/a run's name"
    with History(run_url, next_epoch=1) as history:
        history.append(epoch_row(1))
        history.append(epoch_row(2))
    with History(run_url, next_epoch=2) as history:
        assert [row["epoch"] for row in history.rows] == [1]
    names = {info.path for info in storage.list_files(run_url)}
    assert {"history.parquet", "history.csv", "history.xlsx"} <= names
    assert any(name.startswith("tensorboard/events.out.tfevents") for name in names)


@pytest.mark.parametrize(
    ("values", "plateaued"),
    [
        ([], False),
        ([3, 2, 1], False),
        ([3, 2, 2, 2], True),
        ([3, 2, 2.5, 1.9], False),
        ([3, 2, math.nan, math.nan], True),
        ([math.nan, 2, 1, 3], False),
        ([1, 1], False),
    ],
)
def test_a_plateau_is_patience_epochs_without_a_new_lowest(values, plateaued):
    assert has_plateaued(values, patience=2) is plateaued


def test_an_improvement_smaller_than_the_delta_is_none():
    assert has_plateaued([1.0, 0.99, 0.98], patience=2, min_delta=0.05)
    assert not has_plateaued([1.0, 0.99, 0.94], patience=2, min_delta=0.05)


@settings(deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.integers(1, 5))
def test_training_stops_only_when_the_best_is_patience_epochs_old(values, patience):
    best_epoch = values.index(min(values))
    assert has_plateaued(values, patience=patience) is (len(values) - 1 - best_epoch >= patience)


@pytest.mark.parametrize(
    ("train", "val", "warned"),
    [
        ([3, 2, 1], [1, 2, 3], True),
        ([3, 2, 1], [1, 2, 2], False),
        ([1, 2, 3], [1, 2, 3], False),
        ([2, 1], [1, 2], False),
        ([3, 2, 1], [1, 2, math.nan], False),
        ([5, 1, 3, 2, 1], [9, 9, 1, 2, 3], True),
    ],
)
def test_overfitting_is_validation_rising_while_training_falls(train, val, warned):
    assert is_overfitting(train, val, patience=2) is warned


@pytest.mark.parametrize(
    ("variances", "collapsed"),
    [
        ([], False),
        ([0.9], False),
        ([0.9, 0.95, 0.8], False),
        ([0.9, 0.05], True),
        ([0.9, math.nan], True),
        ([0.0], False),
    ],
)
def test_collapse_is_a_variance_that_has_nearly_vanished(variances, collapsed):
    assert has_collapsed(variances) is collapsed
