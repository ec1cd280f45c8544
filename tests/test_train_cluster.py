"""`jobs/train.py` on two nodes of which one dies: the workers that are left go on."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray.cluster_utils

from tests.job_runner import children, finish, kill_session, start_job, wait_until
from tests.test_train_job import TINY
from tests.training.learnable_faces import write_faces

pytestmark = pytest.mark.timeout(300)

EPOCHS = 6


def test_a_node_that_dies_costs_no_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_faces(tmp_path / "faces")
    history = tmp_path / "runs" / "default" / "history.parquet"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = ray.cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        other = cluster.add_node(num_cpus=1)
        raylets = [node.all_processes["raylet"][0].process.pid for node in (cluster.head_node, other)]

        def both_work() -> bool:
            return all(any("RayTrainWorker" in command for command in children(raylet).values()) for raylet in raylets)

        arguments = [
            *("--data", str(tmp_path), "--cache-dir", str(tmp_path / "cache"), *TINY, "--workers", "1", "2"),
            *("--epochs", str(EPOCHS), "--triplets-per-epoch", "1920", "--batch", "triplets", "--negatives", "hard"),
        ]
        with start_job("train.py", *arguments, extra={"RAY_ADDRESS": cluster.address}) as job:
            try:
                wait_until(lambda: both_work() and history.exists(), job)
                cluster.remove_node(other, allow_graceful=False)
                done = finish(job, 200)
            finally:
                kill_session(job.pid)
    finally:
        cluster.shutdown()
    assert done.status == 0, done.errors
    rows = pq.read_table(history).to_pylist()
    assert [row["epoch"] for row in rows] == list(range(1, EPOCHS + 1))
    assert rows[0]["num_workers"] == 2
    assert rows[-1]["num_workers"] == 1
    assert rows[-1]["store_filled_share"] == 1.0
