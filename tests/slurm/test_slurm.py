"""The launchers on a real Slurm cluster: photos to report, preemption, cancelled jobs, lost nodes, S3, a container.

Jobs are submitted as users do. What does not depend on each other runs side by side: `chain` goes on while others test.
"""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from lib import storage
from lib.sample.sample_job import SampleConfig, make_sample
from lib.training import checkpoints
from tests.job_runner import wait_until
from tests.s3_server import S3Server
from tests.slurm.slurm_cluster import SlurmCluster, photos_by_node, result, why_impossible
from tests.test_train_faults import same_but_times
from tests.training.learnable_faces import write_faces

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

TINY = ["--backbone", "test_convnext", "--init", "none", "--embedding-dim", "16", "--lr", "2e-3", "--val-pairs", "400"]
RUN = "it's a “run”"
EPOCHS = 8
SMALL = ["--cpus-per-task=1", "--mem-per-cpu=1G"]
"""Of sbatch: few processes, for these tests have few cores."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    if problem := why_impossible():
        assert not os.environ.get("CI"), problem
        pytest.skip(problem)
    with ExitStack() as stack:
        cluster = SlurmCluster(num_hosts=6)
        stack.callback(cluster.close)
        yield cluster


@pytest.fixture(scope="module")
def data(cluster: SlurmCluster) -> Path:
    """Return a folder of drawn photos that all nodes see."""
    folder = cluster.folder / "the photos é"
    make_sample(SampleConfig(data=str(folder), identities=48, photos_per_identity=5, seed=3))
    return folder


@pytest.fixture(scope="module")
def faces(cluster: SlurmCluster) -> str:
    """Return a faces table to train on for as long as it takes to interrupt it."""
    return write_faces(cluster.folder / "faces")


@pytest.fixture(scope="module", autouse=True)
def chain(cluster: SlurmCluster, data: Path) -> dict[str, int]:
    """Submit the whole chain on two nodes, and embed to run beside evaluate on the same nodes; return the jobs' ids."""
    where = ["--nodelist=node1,node2", "--cpus-per-task=2"]
    training = ["--name", RUN, *TINY, "--image-size", "48", "--epochs", "2", "--triplets-per-epoch", "960"]
    extra = {"DATA_URL": str(data)}
    submitted = cluster.login("slurm/pipeline.sh", *where, "--", *training, extra=extra)
    ids = {name: int(number) for name, number in map(str.split, submitted.splitlines())}
    assert list(ids) == ["preprocess", "train", "evaluate"]
    model = ["--model", f"{data}/runs/{RUN}", "--output", f'{data}/embeddings/"quoted" and spaced']
    ids["embed"] = cluster.submit(*where, f"--dependency=afterok:{ids['train']}", "slurm/embed.sh", *model, extra=extra)
    return ids


@pytest.fixture(scope="module", autouse=True)
def beheaded(cluster: SlurmCluster, faces: str, chain: dict[str, int]) -> int:
    """Start a training whose first host, with the batch script on it, dies: it takes a minute until Slurm gives up."""
    folder = cluster.folder / "beheaded"
    job = cluster.submit(*SMALL, "-w", "node5,node6", "slurm/train.sh", *training(folder, faces))
    cluster.wait_until(lambda: has_done_an_epoch(folder), job, 400)
    cluster.cut_power("node5")
    return job


def training(folder: Path, faces: str, *more: str) -> list[str]:
    """Return flags of a run of some seconds an epoch."""
    flags = ["--data", str(folder), "--faces", faces, *TINY, "--epochs", str(EPOCHS), "--triplets-per-epoch", "1920"]
    return [*flags, "--checkpoint-minutes", "0.003", *more]


def history(folder: Path, name: str = "default") -> list[dict[str, Any]]:
    # One opening, not pq.read_table's two: the job may put another file in its place between them.
    return storage.read_parquet(str(folder / "runs" / name / "history.parquet")).to_pylist()


def is_within_an_epoch(folder: Path) -> bool:
    progress = checkpoints.newest_progress(str(folder / "runs" / "default"))
    return progress is not None and progress.epoch > 1 and progress.anchors_done > 0


def has_done_an_epoch(folder: Path) -> bool:
    # The row of an epoch is written before its checkpoint: only with the checkpoint it is never trained again.
    progress = checkpoints.newest_progress(str(folder / "runs" / "default"))
    return progress is not None and progress.epoch > 1


def test_wrong_arguments_end_a_job_with_2_and_one_line_in_its_log(cluster: SlurmCluster, data: Path) -> None:
    job = cluster.submit(*SMALL, "--nodes=1", "slurm/train.sh", "--data", f"{data}/nowhere", "--name", "a b")
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0")
    assert f"error: no finished faces at {data}/nowhere/faces" in cluster.log(job)
    assert "Traceback" not in cluster.log(job)


def test_a_preempted_job_goes_on_by_itself_as_if_nothing_had_happened(cluster: SlurmCluster, faces: str) -> None:
    """One that more important work pushes away, and that is asked by hand later, has the history of one left alone."""
    calm, disturbed = cluster.folder / "calm", cluster.folder / "disturbed"
    where = [*SMALL, "--nodes=1"]
    undisturbed_job = cluster.submit(*where, "-w", "node4", "slurm/train.sh", *training(calm, faces, "--deterministic"))
    job = cluster.submit(*where, "-w", "node3", "slurm/train.sh", *training(disturbed, faces, "--deterministic"))
    cluster.wait_until(lambda: is_within_an_epoch(disturbed), job, 400)
    urgent = cluster.submit("-p", "urgent", "-w", "node3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    assert cluster.wait(urgent)["JobState"] == "COMPLETED"
    cluster.wait_for_line(job, r"start 1 of job \d+(.|\n)*resuming from the checkpoint of epoch \d, step")
    num_before = len(history(disturbed))
    cluster.login("scancel", "--batch", "--signal=USR1", str(job))
    assert result(cluster, job)["epochs"] == EPOCHS
    assert cluster.job(job)["Restarts"] == "2"
    assert num_before < EPOCHS
    assert len(re.findall("launcher: the job is stopped and goes back into the queue", cluster.log(job))) == 2
    assert result(cluster, undisturbed_job)["epochs"] == EPOCHS
    assert same_but_times(history(disturbed)) == same_but_times(history(calm))


def test_a_cancelled_job_leaves_no_process_and_no_file(cluster: SlurmCluster, faces: str) -> None:
    folder = cluster.folder / "cancelled"
    job = cluster.submit(*SMALL, "-w", "node3,node4", "slurm/train.sh", *training(folder, faces, "--epochs", "1000"))
    cluster.wait_until(lambda: has_done_an_epoch(folder), job, 400)
    for host in ("node3", "node4"):
        assert {"raylet", "ray::RayTrainWo"} <= set(cluster.processes(host))
        assert f"ray-{job}" in cluster.files_in_tmp(host)
    cluster.login("scancel", str(job))
    assert cluster.wait(job)["JobState"] == "CANCELLED"
    for host in ("node3", "node4"):
        wait_until(lambda host=host: not cluster.processes(host), timeout_s=60)
        assert cluster.files_in_tmp(host) == []


def test_gpus_of_the_allocation_are_used_without_a_flag(cluster: SlurmCluster, faces: str) -> None:
    folder = cluster.folder / "gpus"
    job = cluster.submit(*SMALL, "-w", "node3,node4", "--gres=gpu:2", "slurm/train.sh", *training(folder, faces))
    cluster.wait_for_line(job, "training test_convnext on 4 workers of 1 CPUs and a GPU")
    cluster.login("scancel", str(job))
    assert cluster.wait(job)["JobState"] == "CANCELLED"


def test_a_node_that_does_not_come_is_named(cluster: SlurmCluster, faces: str) -> None:
    """The head cannot reach the other node, though Slurm can."""
    route = ["blackhole", "10.77.0.13"]
    cluster.on_network("node4", "route", "add", *route)
    try:
        job = cluster.submit(
            *(*SMALL, "-w", "node3,node4", "slurm/train.sh", *training(cluster.folder / "never", faces)),
            extra={"RAY_START_LIMIT_S": "20"},
        )
        ended = cluster.wait(job)
    finally:
        cluster.on_network("node4", "route", "delete", *route)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "1:0")
    assert re.search("failed: .*node4", cluster.log(job))
    assert not (cluster.folder / "never").exists()


def test_a_node_that_dies_costs_no_epoch(cluster: SlurmCluster, faces: str) -> None:
    folder = cluster.folder / "lost"
    flags = training(folder, faces, "--workers", "1", "2", "--batch", "triplets", "--negatives", "hard")
    job = cluster.submit(*SMALL, "-w", "node3,node4", "slurm/train.sh", *flags)
    cluster.wait_until(lambda: has_done_an_epoch(folder), job, 400)
    cluster.cut_power("node4")
    try:
        assert result(cluster, job)["epochs"] == EPOCHS
    finally:
        cluster.boot("node4")
    rows = history(folder)
    assert [row["epoch"] for row in rows] == list(range(1, EPOCHS + 1))
    assert rows[0]["num_workers"] == 2
    assert rows[-1]["num_workers"] == 1
    assert "Ray has ended on node4" in cluster.log(job)


def test_a_job_whose_first_node_dies_goes_back_into_the_queue(cluster: SlurmCluster, beheaded: int) -> None:
    """Slurm would let it run on until its time limit, with nobody to watch it."""
    cluster.wait_until(lambda: cluster.job(beheaded)["Restarts"] == "1", beheaded, 400)
    cluster.boot("node5")
    assert result(cluster, beheaded)["epochs"] == EPOCHS
    assert [row["epoch"] for row in history(cluster.folder / "beheaded")] == list(range(1, EPOCHS + 1))


def test_both_nodes_work_on_s3_in_a_container(cluster: SlurmCluster, request: pytest.FixtureRequest) -> None:
    """In Charliecloud, on a folder that holds this machine's own programs; the S3 server is on the login host."""
    server = S3Server("10.77.0.1", within=[str(cluster.folder / "login")])
    request.addfinalizer(server.close)
    server.start()
    s3 = server.environment() | {"DATA_URL": "s3://bucket/the photos é", "PYTHONPATH": "."}
    cluster.login(".venv/bin/python", "-c", "import s3fs; s3fs.S3FileSystem().mkdir('bucket')", extra=s3)
    cluster.login(".venv/bin/python", "jobs/sample.py", "--identities", "24", "--photos-per-identity", "4", extra=s3)
    image = {"CONTAINER": str(cluster.folder / "image"), "CONTAINER_PATH": f"{cluster.project}/.venv/bin:/usr/bin:/bin"}
    job = cluster.submit(*SMALL, "-w", "node3,node4", "slurm/preprocess.sh", extra=s3 | image)
    assert result(cluster, job)["photos"] == 96
    by_node = photos_by_node(cluster, job)
    assert sum(by_node.values()) == 96
    assert set(by_node) <= {"node3", "node4"}


def test_the_chain_goes_from_photos_to_a_report_on_two_nodes(
    cluster: SlurmCluster, chain: dict[str, int], data: Path
) -> None:
    results = {name: result(cluster, job) for name, job in chain.items()}
    assert results["preprocess"]["photos"] == 240
    rows = history(data, RUN)
    assert [row["num_workers"] for row in rows] == [2, 2]
    assert results["evaluate"]["num_pairs"] > 0
    assert (data / "runs" / RUN / "report" / "report.html").exists()
    embedded = pq.ParquetDataset(data / "embeddings" / '"quoted" and spaced').read()
    assert len(embedded) == 240
    by_node = {name: photos_by_node(cluster, job) for name, job in chain.items() if name in ("preprocess", "embed")}
    assert [sum(photos.values()) for photos in by_node.values()] == [240, 240]
    # One may have done all while the other's workers still started.
    assert {node for photos in by_node.values() for node in photos} == {"node1", "node2"}


def test_two_jobs_share_nodes(cluster: SlurmCluster, chain: dict[str, int]) -> None:
    evaluate, embed = (cluster.wait(chain[name]) for name in ("evaluate", "embed"))
    assert evaluate["NodeList"] == embed["NodeList"] == "node[1-2]"
    assert max(evaluate["StartTime"], embed["StartTime"]) < min(evaluate["EndTime"], embed["EndTime"])


def test_nothing_is_left_on_the_nodes(cluster: SlurmCluster) -> None:
    for number in range(1, 7):
        host = f"node{number}"
        wait_until(lambda host=host: not cluster.processes(host), timeout_s=60)
        assert cluster.files_in_tmp(host) == []
