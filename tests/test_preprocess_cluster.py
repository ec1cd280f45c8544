"""`jobs/preprocess.py` on clusters: submitted to a real one with a token, and on two nodes of which one dies."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray.cluster_utils

from tests.job_runner import (
    SCRIPTS,
    RayHead,
    children,
    copy_project,
    environment,
    finish,
    ray_head,
    run_job,
    start_job,
    wait_until,
)

pytestmark = pytest.mark.slow

COPIES = 2


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the project as git knows it, with what a user has beside it and must not upload."""
    folder = tmp_path_factory.mktemp("checkout")
    copy_project(folder)
    for name in (".venv/lib/large.bin", "data/photos/large.jpg", "runs/large.bin"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(os.urandom(2**20))
    return folder


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    """Start a cluster to submit jobs to, which wants a token."""
    with ray_head(num_cpus=3, dashboard=True) as head:
        yield head


def submit(head: RayHead, checkout: Path | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Submit as README says, from a shell that knows no more than the cluster's address and token.

    Without a checkout nothing is uploaded: the head was started in one.
    """
    upload = ["--working-dir", "."] if checkout is not None else []
    return subprocess.run(
        [SCRIPTS / "ray", "job", "submit", *upload, "--", "jobs/preprocess.py", *arguments],
        env=environment({name: value for name, value in head.environment.items() if name != "RAY_ADDRESS"}),
        cwd=checkout or "/",
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def read_photos(faces: Path) -> list[str]:
    parts = faces.glob("split=*/part-*.parquet")
    return sorted(name for part in parts for name in pq.ParquetFile(part).read(columns=["photo"])["photo"].to_pylist())


def test_a_submitted_job_uploads_the_code_alone_and_makes_the_table(
    head: RayHead, checkout: Path, sample_data: Path, tmp_path: Path
) -> None:
    faces = tmp_path / "faces ü"
    done = submit(head, checkout, "--data", str(sample_data), "--faces", str(faces))
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"job": "preprocess"' in done.stdout
    assert (faces / "_SUCCESS").exists()
    assert read_photos(faces) == sorted(path.name for path in (sample_data / "photos").iterdir())

    packages = head.folder.glob("session_*/runtime_resources/working_dir_files/_ray_pkg_*")
    (uploaded,) = {package.resolve() for package in packages if package.is_dir()}
    assert (uploaded / "lib" / "faces" / "preprocess_job.py").is_file()
    assert not list(uploaded.rglob("large.*"))
    assert sum(path.stat().st_size for path in uploaded.rglob("*") if path.is_file()) < 2 * 2**20
    assert not any((uploaded / name).exists() for name in (".venv", "data", "runs"))


def test_a_job_that_is_submitted_without_an_upload_runs_where_the_head_was_started(
    head: RayHead, sample_data: Path, tmp_path: Path
) -> None:
    done = submit(head, None, "--data", str(sample_data), "--faces", str(tmp_path / "faces"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"job": "preprocess"' in done.stdout
    assert read_photos(tmp_path / "faces") == sorted(path.name for path in (sample_data / "photos").iterdir())


def test_a_relative_place_in_a_submitted_job_is_refused(head: RayHead, checkout: Path) -> None:
    refused = submit(head, checkout)
    assert refused.returncode == 1, "the exit status of `ray job submit`, whatever that of the job"
    assert "exit code 2" in refused.stdout + refused.stderr
    assert "would vanish with the job's temporary working directory" in refused.stdout
    assert "Traceback" not in refused.stdout


@pytest.mark.parametrize(
    "variables",
    [
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": ""},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab" * 32},
    ],
)
def test_a_job_without_the_token_of_the_cluster_says_so(
    head: RayHead, sample_data: Path, tmp_path: Path, variables: dict[str, str]
) -> None:
    extra = {"RAY_ADDRESS": head.environment["RAY_ADDRESS"], "HOME": str(tmp_path), **variables}
    flags = ["--data", str(sample_data), "--faces", str(tmp_path / "faces")]
    refused = run_job("preprocess.py", *flags, extra=extra, timeout_s=100)
    assert refused.status == 2
    assert "this cluster wants another token: set RAY_AUTH_MODE=token" in refused.last_error
    assert "Traceback" not in refused.errors


def test_a_cluster_of_another_version_says_so(head: RayHead) -> None:
    code = """
import os, ray
from lib import remote_ray
ray.__version__ = "2.1.0"
try:
    remote_ray.join(os.environ["RAY_ADDRESS"], {})
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(head.environment),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "UserError" in done.stdout
    assert "a cluster of other versions: use the same Ray and Python" in done.stdout


def test_a_node_that_dies_costs_no_photo(sample_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos, faces = tmp_path / "photos", tmp_path / "faces"
    for line in (sample_data / "identities.txt").read_text().splitlines():
        name, identity = line.rsplit(" ", 1)
        for copy in range(COPIES):
            target = photos / f"{identity}-{copy}" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(sample_data / "photos" / name, target)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = ray.cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    try:
        other = cluster.add_node(num_cpus=2)
        raylets = [node.all_processes["raylet"][0].process.pid for node in (cluster.head_node, other)]

        def both_work() -> bool:
            return all(any("MapWorker" in command for command in children(raylet).values()) for raylet in raylets)

        with start_job("preprocess.py", "--data", str(tmp_path), extra={"RAY_ADDRESS": cluster.address}) as job:
            wait_until(lambda: both_work() and bool(read_photos(faces)), job)
            cluster.remove_node(other, allow_graceful=False)
            done = finish(job)
    finally:
        cluster.shutdown()
    assert done.status == 0, done.errors
    assert len(done.output.splitlines()) == 1, "what Ray says of the node goes to standard error"
    names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*") if path.is_file())
    assert done.result["photos_processed"] == len(names)
    assert read_photos(faces) == names
