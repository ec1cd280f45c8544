"""`jobs/train.py` with files of pairs: every epoch has their accuracy, and where nobody else does, they choose it."""

import csv
from pathlib import Path

import openpyxl
import pyarrow.parquet as pq
import pytest

from lib.training.checkpoints import newest_progress
from tests.job_runner import RayHead, run_here
from tests.test_train_job import flags, history
from tests.training.learnable_faces import write_faces
from tests.training.test_validation_sources import write_pairs, write_set

pytestmark = pytest.mark.timeout(300)

COLUMNS = ("accuracy", "accuracy_std", "auc", "eer", "tar_at_far_1e-3")
BRIEF = ("--epochs", "2", "--batch-size", "48", "--triplets-per-epoch", "480", "--workers", "2")


@pytest.mark.slow
def test_two_workers_measure_each_epoch_on_a_file_as_evaluate_does(connected_head: RayHead, tmp_path: Path) -> None:
    write_faces(tmp_path / "faces")
    file = write_pairs(tmp_path / "pairs of test.csv", range(32, 40), photos=8)
    images = write_set(tmp_path / "same pairs.bin", range(32, 40), photos=8)
    given = flags(tmp_path, "run", *BRIEF, "--val-pairs", "400", file, images)
    done = run_here("train.py", *given)
    assert done.status == 0, done.errors
    rows = history(tmp_path, "run")
    assert "same_pairs: aligned to ArcFace's template, which the faces of training are not" in done.errors
    assert [row["same_pairs_auc"] for row in rows] == [row["pairs_of_test_auc"] for row in rows]
    assert all(0 <= row[f"pairs_of_test_{name}"] <= 1 for row in rows for name in COLUMNS if "tar" not in name)
    best = rows[done.result["best_epoch"] - 1]
    assert done.result["pairs_of_files"]["pairs_of_test"] == best["pairs_of_test_accuracy"]
    assert f"pairs_of_test {100 * rows[-1]['pairs_of_test_accuracy']:.2f} %" in done.errors
    with (tmp_path / "runs" / "run" / "history.csv").open() as table:
        assert float(list(csv.DictReader(table))[-1]["pairs_of_test_auc"]) == pytest.approx(
            rows[-1]["pairs_of_test_auc"]
        )
    sheet = openpyxl.load_workbook(tmp_path / "runs" / "run" / "history.xlsx").active
    assert "pairs_of_test_eer" in {cell.value for cell in sheet[1]}
    evaluated = run_here("evaluate.py", "--data", str(tmp_path), "--model", done.result["model"], "--pairs", file)
    assert evaluated.status == 0, evaluated.errors
    assert evaluated.result["accuracy"] == pytest.approx(best["pairs_of_test_accuracy"], abs=1e-9)
    assert evaluated.result["auc"] == pytest.approx(best["pairs_of_test_auc"], abs=1e-4)


@pytest.mark.slow
def test_all_people_can_be_trained_on_where_a_file_judges(connected_head: RayHead, tmp_path: Path) -> None:
    write_faces(tmp_path / "faces", people={"train": 24}, photos=8)
    write_faces(tmp_path / "lfw", people={"test": 32}, photos=8)
    file = write_pairs(tmp_path / "lfw.csv", range(24, 32), photos=8)
    more = ("--val-faces", str(tmp_path / "lfw"), "--val-pairs", file)
    done = run_here("train.py", *flags(tmp_path, "run", *BRIEF), *more)
    assert done.status == 0, done.errors
    assert "24 of the 32 people of --val-faces are trained on" in done.errors
    rows = history(tmp_path, "run")
    assert all(row["accuracy"] is not None and row["lfw_accuracy"] is not None for row in rows)


def test_pairs_of_a_file_choose_the_epoch_where_there_are_no_validation_people(
    connected_head: RayHead, tmp_path: Path
) -> None:
    """A crop of them that cannot be decoded makes its pairs errors, and no worker waits for ever."""
    write_faces(tmp_path / "faces", people={"train": 24, "test": 8}, photos=8, broken=("person 25/“1”.jpg",))
    file = write_pairs(tmp_path / "pairs.csv", range(24, 32), photos=8)
    done = run_here("train.py", *flags(tmp_path, "run", *BRIEF, "--val-pairs", file))
    assert done.status == 0, done.errors
    assert "no photo of a validation person is aligned: the pairs of pairs decide which epoch is kept" in done.errors
    rows = history(tmp_path, "run")
    assert [row["accuracy"] for row in rows] == [row["pairs_accuracy"] for row in rows]
    assert all(0 < row["accuracy"] < 1 for row in rows)
    assert done.result["accuracy"] == rows[done.result["best_epoch"] - 1]["pairs_accuracy"]
    progress = newest_progress(str(tmp_path / "runs" / "run"))
    assert progress is not None
    assert progress.best == max(row["accuracy"] for row in rows)
    refused = run_here("train.py", *flags(tmp_path, "run", *BRIEF, "--val-pairs", "400"))
    assert refused.status == 2
    assert "val_pairs: [20000, " in refused.last_error


@pytest.mark.slow
def test_faces_that_a_worker_cannot_read_end_the_run_in_one_line(connected_head: RayHead, tmp_path: Path) -> None:
    write_faces(tmp_path / "faces")
    write_faces(tmp_path / "lfw", people={"test": 40})
    for part in (tmp_path / "lfw" / "split=test").glob("*.parquet"):
        damage_crops(part)
    file = write_pairs(tmp_path / "lfw.csv", range(24, 40))
    more = ("--val-faces", str(tmp_path / "lfw"), "--val-pairs", file)
    ended = run_here("train.py", *flags(tmp_path, "run", *BRIEF), *more)
    assert ended.status == 2, ended.errors
    assert str(tmp_path / "lfw") in ended.last_error
    assert "Traceback" not in ended.errors


def damage_crops(part: Path) -> None:
    """Overwrite the crops; the names beside them can be read, as the driver does."""
    metadata = pq.ParquetFile(part).metadata
    content = bytearray(part.read_bytes())
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        (crops,) = [c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "crop"]
        start = crops.data_page_offset
        content[start : start + crops.total_compressed_size] = b"\xff" * crops.total_compressed_size
    part.write_bytes(content)


def test_a_dry_run_reads_the_pairs_and_says_what_is_left_out(tmp_path: Path) -> None:
    write_faces(tmp_path / "faces")
    file = write_pairs(tmp_path / "pairs.csv", range(20, 40))
    done = run_here("train.py", *flags(tmp_path, "dry", "--val-pairs", file, "--dry-run"))
    assert done.status == 0, done.errors
    assert "pairs show people who are trained on, and are left out" in done.errors
    refused = run_here("train.py", *flags(tmp_path, "dry", "--val-pairs", "pairs.doc", "--dry-run"))
    assert refused.status == 2
    assert "pairs are read from .txt" in refused.last_error
