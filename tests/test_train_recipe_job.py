"""`jobs/train.py --recipe`: two stages in one command, and a kill between them changes nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from lib.recognition.model import load_model
from lib.training import checkpoints
from tests.job_runner import RayHead, run_here
from tests.test_train_job import TIMES, flags, history
from tests.training.learnable_faces import write_faces

pytestmark = pytest.mark.timeout(300)


def same(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def remove_what_came_after_the_seam(run: Path) -> None:
    """Leave the checkpoints as a kill right after the first stage does."""
    newest = max((run / "checkpoints").glob("epoch-*.safetensors"))
    newest.unlink()
    progress = checkpoints.newest_progress(str(run))
    assert progress is not None
    assert (progress.epoch, progress.stage, progress.finished) == (3, 0, False)


@pytest.mark.slow
def test_a_run_that_is_killed_between_the_stages_goes_on_as_if_nothing_had_happened(
    connected_head: RayHead, tmp_path: Path
) -> None:
    write_faces(tmp_path / "faces")
    given = flags(tmp_path, "run", "--recipe", "centers", "--epochs", "3", "--triplets-per-epoch", "192")
    more = ("--batch-size", "24", "--deterministic", "--negatives", "random")
    done = run_here("train.py", *given, *more)
    assert done.status == 0, done.errors
    assert "recipe centers: asked for; from epoch 1 loss arcface, batch photos" in done.errors
    assert "stage 2 of the recipe: --loss softmax" in done.errors
    rows = same(history(tmp_path, "run"))
    assert [row["num_train_triplets"] > 0 for row in rows] == [True, True, True]
    assert rows[1]["train_loss"] > 5 > rows[2]["train_loss"], "the loss of arcface at a scale of 64, then a softmax"
    run = tmp_path / "runs" / "run"
    assert "are many" not in json.loads((run / "config.json").read_text())["recipe_reason"]
    assert "from epoch 3 loss softmax" in str(load_model(done.result["model"]).spec.training["recipe"])
    assert "from epoch 3 loss softmax" in (run / "model" / "README.md").read_text()
    remove_what_came_after_the_seam(run)
    again = run_here("train.py", *given, *more)
    assert again.status == 0, again.errors
    assert same(history(tmp_path, "run")) == rows


@pytest.mark.slow
def test_the_next_stage_takes_another_number_of_workers(connected_head: RayHead, tmp_path: Path) -> None:
    write_faces(tmp_path / "faces", people={"train": 24, "val": 8, "test": 1})
    given = flags(tmp_path, "run", "--recipe", "centers", "--epochs", "3", "--triplets-per-epoch", "192")
    done = run_here("train.py", *given, "--batch-size", "24", "--workers", "2")
    assert done.status == 0, done.errors
    remove_what_came_after_the_seam(tmp_path / "runs" / "run")
    again = run_here("train.py", *given, "--batch-size", "24", "--workers", "1")
    assert again.status == 0, again.errors
    assert [row["num_workers"] for row in history(tmp_path, "run")] == [2, 2, 1]
