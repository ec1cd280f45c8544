"""`jobs/sweep.py` and `jobs/compare.py` as users run them: interrupted, with a trial that fails, and what it leaves."""

import csv
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow.parquet as pq
import pytest

from lib.errors import UserError
from lib.flags import parsed
from lib.training import checkpoints
from lib.training.settings import TrainConfig
from lib.training.train_job import train
from lib.tuning.compare_job import read_run
from lib.tuning.winner import winner_settings
from tests.job_runner import (
    JOB_LIMIT_S,
    Finished,
    RayHead,
    finish,
    kill_session,
    run_here,
    run_job,
    start_job,
    wait_until,
)
from tests.training.learnable_faces import write_faces

STOPPED = 75
EPOCHS = 4

GOOD, FAILING, BETTER, HOPELESS = (
    "001-lr0.001",
    "002-lr1e_30",
    "003-lr0.002",
    "004-lr1e-09",
)
TINY = ["--backbone", "test_convnext", "--init", "none", "--embedding-dim", "16", "--val-pairs", "400"]
SWEEP = [
    *("--name", "rates é", "--lrs", "1e-3,1e30", "2e-3,1e-9", "--no-normalize", "--warmup-share", "0", *TINY),
    *("--epochs", str(EPOCHS), "--triplets-per-epoch", "480", "--checkpoint-minutes", "0.003", "--at-once", "2"),
    *("--min-epochs", "2", "--keep-one-in", "2", "--best-by", "loss"),
]


@dataclass(frozen=True)
class Swept:
    """What the starts of the sweep left behind: stopped by SIGTERM, killed, and run to the end."""

    folder: Path
    stopped: Finished
    half_done: list[str]
    between: dict[str, Any]
    """What was compared then."""
    killed: Finished
    finished_before: dict[Path, int]
    """Files of the trials that were finished when the kill came, with the time of their last change."""
    done: Finished


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("it's data")
    write_faces(folder / "faces")
    return folder


def flags(data: Path, *more: str) -> list[str]:
    return ["--data", str(data), "--cache-dir", str(data / "the cache"), *SWEEP, *more]


@pytest.fixture(scope="module")
def swept(head: RayHead, data: Path) -> Swept:
    folder = data / "sweeps" / "rates é"
    runs = folder / "runs"

    def trained(*, to_the_end: bool) -> list[str]:
        """Return the trials that have an epoch, no outcome, and are finished or not."""
        names = [path.parent.name for path in runs.glob("*/history.parquet")]
        progress = {name: checkpoints.newest_progress(str(runs / name)) for name in names}
        return [
            name
            for name, of_it in sorted(progress.items())
            if of_it and of_it.finished == to_the_end and not (runs / name / "outcome.json").exists()
        ]

    def interrupted(number: signal.Signals, is_so: Callable[[], bool]) -> Finished:
        with start_job("sweep.py", *flags(data), extra=head.environment) as job:
            try:
                wait_until(is_so, job, JOB_LIMIT_S)
                os.kill(job.pid, number)
                return finish(job, 120)
            finally:
                kill_session(job.pid)

    stopped = interrupted(signal.SIGTERM, lambda: bool(trained(to_the_end=False)))
    half_done = trained(to_the_end=False)
    compared = run_here("compare.py", "--data", str(data), "--output", str(data / "between"), "rates é")
    assert compared.status == 0, compared.errors
    killed = interrupted(signal.SIGKILL, lambda: bool(trained(to_the_end=True)))
    finished_before = {
        path: path.stat().st_mtime_ns
        for name in trained(to_the_end=True)
        for path in (runs / name).rglob("*")
        if path.is_file()
    }
    done = run_job("sweep.py", *flags(data), extra=head.environment)
    assert done.status == 0, done.errors
    return Swept(folder, stopped, half_done, compared.result, killed, finished_before, done)


@pytest.mark.slow
def test_a_signal_saves_everything_and_says_how_to_go_on(swept: Swept) -> None:
    assert swept.stopped.status == STOPPED, swept.stopped.errors
    assert "the same command continues" in swept.stopped.last_error
    assert "2 at once" in swept.stopped.errors
    assert "Traceback" not in swept.stopped.errors


@pytest.mark.slow
def test_finished_trials_are_left_alone_and_half_done_ones_go_on(swept: Swept) -> None:
    assert swept.half_done
    assert swept.finished_before
    for name in swept.half_done:
        assert f"{name}: resuming from the checkpoint of epoch" in swept.killed.errors
    for path, changed_ns in swept.finished_before.items():
        assert path.stat().st_mtime_ns == changed_ns, path
    assert "trials are done" in swept.done.errors
    for path in (swept.folder / "runs").iterdir():
        epochs = [row["epoch"] for row in read_run(str(path)).rows]
        assert epochs == list(range(1, len(epochs) + 1))


@pytest.mark.slow
def test_each_trial_is_a_run_and_what_became_of_it_is_told(swept: Swept) -> None:
    result = swept.done.result
    assert len(swept.done.output.splitlines()) == 1
    assert (result["trials"], result["failed"], result["unfinished"]) == (4, 1, 0)
    assert result["finished"] + result["stopped"] == 3
    assert result["winner"] in (GOOD, BETTER)
    winner = read_run(result["winner_url"])
    assert winner.state == "finished"
    assert winner.value == -result["val_loss_random"] == max(-row["val_loss_random"] for row in winner.rows)
    assert (swept.folder / "runs" / result["winner"] / "model" / "model.safetensors").exists()
    failed = read_run(str(swept.folder / "runs" / FAILING))
    assert failed.state == "failed"
    assert "the loss is not finite at step" in failed.reason
    assert f"{FAILING} failed: the loss is not finite" in swept.done.errors


@pytest.mark.slow
def test_a_trial_is_the_run_that_the_training_job_makes_of_its_settings(swept: Swept, data: Path) -> None:
    settings = SWEEP[SWEEP.index("--no-normalize") : SWEEP.index("--checkpoint-minutes")]
    place = ["--data", str(swept.folder), "--faces", str(data / "faces"), "--name", swept.done.result["winner"]]
    rate = str(swept.done.result["winner_settings"]["lr"])
    config = parsed(TrainConfig, [*place, *settings, "--best-by", "loss", "--photos-limit", "25000", "--lr", rate])
    assert train(config)["accuracy"] == swept.done.result["accuracy"]  # finished: nothing was trained


@pytest.mark.slow
def test_the_hopeless_trial_is_stopped_early_and_could_go_on(swept: Swept) -> None:
    hopeless = read_run(str(swept.folder / "runs" / HOPELESS))
    assert hopeless.state == "stopped"
    assert "was not in the best 1/2" in hopeless.reason
    assert 2 <= len(hopeless.rows) < EPOCHS
    progress = checkpoints.newest_progress(hopeless.url)
    assert progress is not None
    assert progress.epoch == len(hopeless.rows) + 1


@pytest.mark.slow
def test_the_history_has_all_epochs_of_all_trials_in_every_format(swept: Swept) -> None:
    table = pq.read_table(swept.folder / "history.parquet")
    assert table.column_names[:8] == [
        *("run", "epoch", "Train Loss", "no train rows", "Test Loss", "No test rows", "Time taken (M)", "Notes")
    ]
    rows = table.to_pylist()
    expected = [
        (path.name, row["epoch"])
        for path in sorted((swept.folder / "runs").iterdir())
        for row in read_run(str(path)).rows or [{"epoch": None}]
    ]
    assert [(row["run"], row["epoch"]) for row in rows] == expected
    assert all("lr=" in row["Notes"] for row in rows)
    assert [row["run"] for row in rows if "FAILED: the loss is not finite" in row["Notes"]] == [FAILING]
    with (swept.folder / "history.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert openpyxl.load_workbook(swept.folder / "history.xlsx").active.max_row == len(rows) + 1


@pytest.mark.slow
def test_runs_that_still_go_on_are_compared_too(swept: Swept) -> None:
    assert swept.between["runs"] == 4
    assert swept.between["unfinished"] >= len(swept.half_done)
    assert "going on, or interrupted" in Path(swept.between["report"]).read_text()


@pytest.mark.slow
def test_the_page_shows_the_winner_and_why_others_ended(swept: Swept) -> None:
    page = (swept.folder / "report.html").read_text()
    assert f"{swept.done.result['winner']}: {100 * swept.done.result['accuracy']:.2f} %" in page
    assert "the loss is not finite" in page
    assert "was not in the best 1/2" in page


@pytest.mark.slow
def test_training_takes_the_winners_settings_unless_told_otherwise(swept: Swept, data: Path) -> None:
    won = swept.done.result["winner_settings"]["lr"]
    told = ["--data", str(data), "--from-sweep", str(swept.folder), "--embedding-dim", "8", "--dry-run"]
    settings = run_here("train.py", *told).result["settings"]
    assert (settings["lr"], settings["backbone"], settings["normalize"]) == (won, "test_convnext", False)
    assert (settings["epochs"], settings["triplets_per_epoch"], settings["photos_limit"]) == (30, 0, 0)
    assert settings["embedding_dim"] == 8
    assert winner_settings(str(swept.folder))["init"] == "none"


@pytest.mark.slow
def test_no_winner_is_taken_from_what_is_no_sweep_or_not_finished(swept: Swept, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no sweep"):
        winner_settings(str(data / "runs"))
    (tmp_path / "sweep.json").write_bytes((swept.folder / "sweep.json").read_bytes())
    with pytest.raises(UserError, match="is not finished and has no winner yet"):
        winner_settings(str(tmp_path))


@pytest.mark.slow
def test_a_sweep_of_other_settings_is_refused_naming_them(swept: Swept, data: Path) -> None:
    refused = run_here("sweep.py", *flags(data, "--margin", "0.4"))
    assert refused.status == 2
    assert "margins: [0.2] there, [0.4] now" in refused.last_error
    assert "Traceback" not in refused.errors


def test_a_small_sweep_ends_with_its_winner_and_tells_what_failed(connected_head: RayHead, data: Path) -> None:
    settings = ["--lrs", "2e-3,1e30", "--no-normalize", "--warmup-share", "0", "--epochs", "1", "--at-once", "2", *TINY]
    place = ["--data", str(data), "--cache-dir", str(data / "the cache"), "--name", "small"]
    done = run_here("sweep.py", *place, *settings, "--triplets-per-epoch", "480")
    assert done.status == 0, done.errors
    assert (done.result["trials"], done.result["finished"], done.result["failed"]) == (2, 1, 1)
    assert done.result["winner_settings"]["lr"] == 2e-3
    assert read_run(done.result["winner_url"]).state == "finished"
    page = (data / "sweeps" / "small" / "report.html").read_text()
    assert f"{done.result['winner']}: {100 * done.result['accuracy']:.2f} %" in page
    assert "the loss is not finite" in page


def test_unknown_backbones_are_all_named_before_anything_starts(data: Path) -> None:
    names = "test_convnext,convnext_tinny,resnet_9000"
    refused = run_here("sweep.py", "--data", str(data), "--name", "unknown", "--backbones", names)
    assert refused.status == 2
    assert "'convnext_tinny'" in refused.last_error
    assert "'resnet_9000'" in refused.last_error
    assert not (data / "sweeps" / "unknown").exists()
