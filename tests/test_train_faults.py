"""`jobs/train.py` killed, starved and interrupted: it goes on from its last checkpoint, and no epoch counts twice."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from lib import storage
from lib.recognition.model import load_model
from lib.training import checkpoints
from tests.job_runner import (
    RayHead,
    finish,
    kill_session,
    mounted,
    run_here,
    run_job,
    session_processes,
    start_job,
    wait_until,
)
from tests.test_train_job import TIMES, TINY
from tests.training.learnable_faces import write_faces

pytestmark = pytest.mark.slow

WORKER = "ray::RayTrainWorker"
SHARD = "ray::Shard"
EPOCHS = 8
ANCHORS = 960
STOPPED = 75


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_faces(tmp_path_factory.mktemp("many") / "faces")


def flags(folder: Path, faces: str, *more: str) -> list[str]:
    """Return flags of a run of some seconds an epoch: there has to be time to kill something in the middle."""
    return [
        *("--data", str(folder), "--faces", faces, "--cache-dir", f"{faces}.cache", *TINY),
        *("--epochs", str(EPOCHS), "--triplets-per-epoch", str(ANCHORS), "--checkpoint-minutes", "0.003", *more),
    ]


def rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "runs" / "default" / "history.parquet"
    # One opening, not pq.read_table's two: the job may put another file in its place between them.
    return storage.read_parquet(str(path)).to_pylist() if path.exists() else []


def same_but_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in history]


@contextmanager
def half_done(folder: Path, faces: str, *more: str, extra: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Run a job that has finished an epoch and is within another; nothing of it is left in the end."""
    num_before = len(rows(folder))
    with start_job("train.py", *flags(folder, faces, *more), extra=extra) as job:
        try:
            wait_until(lambda: len(rows(folder)) > num_before and within_an_epoch(folder), job)
            yield job
        finally:
            kill_session(job.pid)


def within_an_epoch(folder: Path) -> bool:
    progress = checkpoints.newest_progress(str(folder / "runs" / "default"))
    return progress is not None and progress.anchors_done > 0


@pytest.fixture(scope="module")
def undisturbed(head: RayHead, faces: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the history of a deterministic run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run_job("train.py", *flags(folder, faces, "--deterministic"), extra=head.environment)
    assert done.status == 0, done.errors
    return same_but_times(rows(folder))


def test_the_same_command_goes_on_as_if_nothing_had_happened(
    connected_head: RayHead, faces: str, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Killed and stopped by each signal in the middle of epochs, with a checkpoint damaged, it has the same history.

    A second run of its name is refused meanwhile.
    """
    head = connected_head
    for number in (signal.SIGKILL, signal.SIGUSR1, signal.SIGTERM):
        with half_done(tmp_path, faces, "--deterministic", extra=head.environment) as job:
            if number == signal.SIGUSR1:
                refused = run_here("train.py", *flags(tmp_path, faces, "--deterministic"))
                assert refused.status == 2, refused.errors
                assert "is training on this cluster already" in refused.last_error
            os.kill(job.pid, number)
            left = finish(job, 100)
        assert left.status == (-number if number == signal.SIGKILL else STOPPED), left.errors
        assert "Traceback" not in left.errors
        assert ("run the same command again to resume" in left.last_error) == (left.status == STOPPED)
    assert len(rows(tmp_path)) < EPOCHS
    newest = max((tmp_path / "runs" / "default" / "checkpoints").glob("epoch-*"))
    newest.write_bytes(newest.read_bytes()[:100_000])
    done = run_job("train.py", *flags(tmp_path, faces, "--deterministic"), extra=head.environment)
    assert done.status == 0, done.errors
    assert "is damaged" in done.errors
    assert "resuming from the checkpoint of epoch" in done.errors
    assert same_but_times(rows(tmp_path)) == undisturbed


def test_a_killed_run_goes_on_under_its_id_in_mlflow(connected_head: RayHead, faces: str, tmp_path: Path) -> None:
    store = tmp_path / "ml flow"
    tracked = ("--track", f"mlflow:{store}")
    with half_done(tmp_path, faces, *tracked, extra=connected_head.environment) as job:
        wait_until(lambda: (tmp_path / "runs" / "default" / "tracking.json").exists(), job)
        os.kill(job.pid, signal.SIGKILL)
        finish(job, 100)
    done = run_here("train.py", *flags(tmp_path, faces, *tracked))
    assert done.status == 0, done.errors
    client = MlflowClient(tracking_uri=store.as_uri())
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert run.info.status == "FINISHED"
    assert run.data.params["loss"] == "softmax"
    assert run.data.metrics["best_epoch"] == done.result["best_epoch"]
    told = {each.step for each in client.get_metric_history(run.info.run_id, "train_loss")}
    assert told == set(range(1, EPOCHS + 1))


def test_a_signal_to_all_processes_of_a_local_run_stops_it_within_seconds(faces: str, tmp_path: Path) -> None:
    """Ray's daemons die of it too, so nothing more can be saved; still the launcher has to hear of a stop."""
    with half_done(tmp_path, faces, extra={}) as job:
        os.killpg(job.pid, signal.SIGTERM)
        left = finish(job, 40)
    assert left.status == STOPPED, left.errors
    assert left.last_error.startswith("stopped: asked by a signal")


@pytest.mark.parametrize("loss", ["softmax", "arcface+softmax"])
def test_a_killed_worker_is_replaced_within_the_run(head: RayHead, faces: str, tmp_path: Path, loss: str) -> None:
    with half_done(tmp_path, faces, "--workers", "2", "--loss", loss, extra=head.environment) as job:
        workers = [pid for pid, command in session_processes(head.session).items() if WORKER in command]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        done = finish(job, 200)
    assert done.status == 0, done.errors
    assert "resuming from the checkpoint of epoch" in done.errors
    assert [row["epoch"] for row in rows(tmp_path)] == list(range(1, EPOCHS + 1))
    assert done.result["images"] == EPOCHS * ANCHORS


def test_a_killed_run_with_centres_goes_on_with_another_number_of_workers(
    head: RayHead, faces: str, tmp_path: Path
) -> None:
    with half_done(tmp_path, faces, "--workers", "2", "--loss", "cosface+softmax", extra=head.environment) as job:
        os.kill(job.pid, signal.SIGKILL)
        finish(job, 100)
    done = run_job("train.py", *flags(tmp_path, faces, "--loss", "cosface+softmax"), extra=head.environment)
    assert done.status == 0, done.errors
    assert "with 1 worker(s)" in done.errors
    assert [row["epoch"] for row in rows(tmp_path)] == list(range(1, EPOCHS + 1))


def test_a_killed_shard_of_the_store_comes_back_and_is_filled_again(head: RayHead, faces: str, tmp_path: Path) -> None:
    mining = ["--batch", "triplets", "--negatives", "hard"]
    with half_done(tmp_path, faces, *mining, extra=head.environment) as job:
        shards = [pid for pid, command in session_processes(head.session).items() if SHARD in command]
        assert len(shards) == 1
        os.kill(shards[0], signal.SIGKILL)
        done = finish(job, 200)
    assert done.status == 0, done.errors
    history = rows(tmp_path)
    assert [row["epoch"] for row in history] == list(range(1, EPOCHS + 1))
    assert max(row["store_num_filled"] for row in history[1:]) > 0
    assert history[-1]["store_filled_share"] == 1.0


def test_a_full_disk_is_told_after_several_tries_and_a_larger_one_goes_on(
    head: RayHead, faces: str, tmp_path: Path
) -> None:
    """Worker 0 alone writes checkpoints: it gives up while the other waits to hear from it."""
    # Room for two of the checkpoints of 3.4 MB and the model, not for three.
    with mounted(tmp_path / "a small disk", "size=9m") as disk:
        full = run_job("train.py", *flags(disk, faces), "--workers", "2", extra=head.environment, timeout_s=200)
        assert full.status == 1, full.errors
        assert "no checkpoint could be written" in full.last_error or "full" in full.last_error
        assert "Traceback" not in full.errors
        checkpoints.load_newest(str(disk / "runs" / "default"))
        subprocess.run(["mount", "-o", "remount,size=60m", str(disk)], check=True)
        done = run_job("train.py", *flags(disk, faces), extra=head.environment)
        assert done.status == 0, done.errors
        assert [row["epoch"] for row in rows(disk)] == list(range(1, EPOCHS + 1))
        load_model(done.result["model"])


def test_a_full_disk_of_the_cache_is_one_line_and_the_run_reads_the_table(
    head: RayHead, faces: str, tmp_path: Path
) -> None:
    """The crops need more than the disk has; each epoch is the same to the last digit as with a cache."""
    histories = []
    with mounted(tmp_path / "a small disk", "size=64k") as disk:
        for name, cache_dir in (("with", f"{faces}.cache"), ("without", str(disk))):
            more = ["--name", name, "--cache-dir", cache_dir, *("--epochs", "2", "--negatives", "random")]
            done = run_job("train.py", *flags(tmp_path, faces, *more, "--deterministic"), extra=head.environment)
            assert done.status == 0, done.errors
            lines = [line for line in done.errors.splitlines() if "this node reads the crops from the table" in line]
            assert len(lines) == (name == "without"), "\n".join(lines)
            path = tmp_path / "runs" / name / "history.parquet"
            histories.append(same_but_times(storage.read_parquet(str(path)).to_pylist()))
        assert not list(disk.glob("*.arrow"))
    assert histories[0] == histories[1]
