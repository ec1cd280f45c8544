"""`jobs/preprocess.py` killed, starved and interrupted: started again it finishes, and each photo is there once."""

import hashlib
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.job_runner import RayHead, finish, kill_session, ray_head, run_job, session_processes, start_job, wait_until

pytestmark = pytest.mark.timeout(300)

COPIES = 2
WORKER = "ray::MapWorker"


@pytest.fixture(scope="module")
def data(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the sample's photos several times over, by folders: enough parts to be in the middle of them."""
    folder = tmp_path_factory.mktemp("many")
    for line in (sample_data / "identities.txt").read_text().splitlines():
        name, identity = line.rsplit(" ", 1)
        for copy in range(COPIES):
            target = folder / "photos" / f"{identity}-{copy}" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(sample_data / "photos" / name, target)
    return folder


@pytest.fixture(scope="module")
def photos(data: Path) -> list[str]:
    folder = data / "photos"
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    """Start a cluster of 4 logical CPUs, whatever the machine has."""
    with ray_head(num_cpus=4) as head:
        yield head


@pytest.fixture(scope="module")
def undisturbed(head: RayHead, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the table that nothing happened to."""
    faces = tmp_path_factory.mktemp("undisturbed") / "faces"
    done = run_job("preprocess.py", *flags(data, faces), extra=head.environment)
    assert done.status == 0, done.errors
    return digests(faces)


def flags(data: Path, faces: Path) -> list[str]:
    return ["--data", str(data), "--faces", str(faces)]


def digests(faces: Path) -> dict[str, str]:
    parts = sorted(faces.glob("split=*/*"))
    return {str(path.relative_to(faces)): hashlib.sha256(path.read_bytes()).hexdigest() for path in parts}


def rows(faces: Path) -> list[str]:
    """Return the photos of the table as far as it is there."""
    parts = faces.glob("split=*/part-*.parquet")
    return sorted(name for part in parts for name in pq.ParquetFile(part).read(columns=["photo"])["photo"].to_pylist())


def half_done(data: Path, faces: Path, extra: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Return a job that has finished a part, but not all."""
    job = start_job("preprocess.py", *flags(data, faces), extra=extra)
    wait_until(lambda: bool(rows(faces)), job)
    return job


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mount a small disk of its own."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_one_cpu_gives_the_same_files_as_four_and_does_not_hang(
    data: Path, photos: list[str], undisturbed: dict[str, str], tmp_path: Path
) -> None:
    with ray_head(num_cpus=1) as single:
        done = run_job("preprocess.py", *flags(data, tmp_path / "faces"), extra=single.environment, timeout_s=120)
    assert done.status == 0, done.errors
    assert rows(tmp_path / "faces") == photos
    assert digests(tmp_path / "faces") == undisturbed


@pytest.mark.parametrize("victim", ["driver and workers", "driver"])
def test_after_kill_9_the_same_command_does_what_is_missing(
    head: RayHead, data: Path, photos: list[str], undisturbed: dict[str, str], tmp_path: Path, victim: str
) -> None:
    faces = tmp_path / "faces"
    job = half_done(data, faces)
    if victim == "driver":
        job.kill()
    else:
        kill_session(job.pid)
    job.communicate()
    assert not (faces / "_SUCCESS").exists()
    refused = run_job("preprocess.py", *flags(data, faces), "--min-face", "40")
    assert refused.status == 2
    assert "min_face: 20 there, 40 now" in refused.last_error

    # The workers of a driver that is gone may still write meanwhile: what they write is the same.
    num_present = len(rows(faces))
    assert 0 < num_present < len(photos)
    again = run_job("preprocess.py", *flags(data, faces), extra=head.environment)
    assert again.status == 0, again.errors
    assert 0 < again.result["photos_processed"] <= len(photos) - num_present
    assert rows(faces) == photos
    assert digests(faces) == undisturbed
    wait_until(lambda: not session_processes(job.pid))


def test_a_killed_worker_is_replaced_within_the_run(
    head: RayHead, data: Path, photos: list[str], undisturbed: dict[str, str], tmp_path: Path
) -> None:
    faces = tmp_path / "faces"
    job = half_done(data, faces, head.environment)
    workers = [pid for pid, command in session_processes(head.session).items() if command.startswith(WORKER)]
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    done = finish(job)
    assert done.status == 0, done.errors
    assert done.result["photos_processed"] == len(photos)
    assert digests(faces) == undisturbed
