"""`jobs/train.py` on two nodes of which one dies: the workers that are left go on."""

import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray.cluster_utils

from tests.job_runner import children, finish, kill_session, start_job, wait_until
from tests.test_train_job import TINY
from tests.training.learnable_faces import write_faces

pytestmark = pytest.mark.slow

EPOCHS = 6


@contextmanager
def trained_on_two_nodes(
    folder: Path, *flags: str, extra: Mapping[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], Callable[[], None]]]:
    """Run a job whose workers train on two nodes; yield it, and what takes one of the nodes away."""
    write_faces(folder / "faces")
    checkpoints = folder / "runs" / "default" / "checkpoints"
    cluster = ray.cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        other = cluster.add_node(num_cpus=1)
        raylets = [node.all_processes["raylet"][0].process.pid for node in (cluster.head_node, other)]

        def both_work() -> bool:
            return all(any("RayTrainWorker" in command for command in children(raylet).values()) for raylet in raylets)

        arguments = [
            *("--data", str(folder), "--cache-dir", str(folder / "cache"), *TINY, "--epochs", str(EPOCHS)),
            *("--triplets-per-epoch", "1920", "--batch", "triplets", "--negatives", "hard", *flags),
        ]
        with start_job("train.py", *arguments, extra={"RAY_ADDRESS": cluster.address, **(extra or {})}) as job:
            try:
                # The checkpoint comes after the row: without it the epoch is done again, by the workers that are left.
                wait_until(lambda: both_work() and any(checkpoints.glob("epoch-000002-*")), job)
                yield job, lambda: cluster.remove_node(other, allow_graceful=False)
            finally:
                kill_session(job.pid)
    finally:
        cluster.shutdown()


def test_a_node_that_dies_costs_no_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with trained_on_two_nodes(tmp_path, "--workers", "1", "2") as (job, lose_node):
        lose_node()
        done = finish(job, 200)
    assert done.status == 0, done.errors
    rows = pq.read_table(tmp_path / "runs" / "default" / "history.parquet").to_pylist()
    assert [row["epoch"] for row in rows] == list(range(1, EPOCHS + 1))
    assert rows[0]["num_workers"] == 2
    assert rows[-1]["num_workers"] == 1
    assert rows[-1]["store_filled_share"] == 1.0


def test_too_few_nodes_of_which_no_more_will_come_end_the_job_with_75(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with trained_on_two_nodes(tmp_path, "--workers", "2", extra={"FIXED_NODES": "1"}) as (job, lose_node):
        lose_node()
        done = finish(job, 100)
    assert done.status == 75, done.errors
    # Before it stands what Ray tells of the worker that lost the other.
    assert done.last_error.startswith("stopped: nodes are lost, and too few are left for 2 workers of 1 CPUs")
