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

from tests.job_runner import (
    RayHead,
    finish,
    kill_session,
    mounted,
    ray_head,
    run_here,
    run_job,
    session_processes,
    start_job,
    wait_until,
)

pytestmark = pytest.mark.slow

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
def undisturbed(data: Path, photos: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the files of a run that nothing happens to, on one CPU: it must not hang there."""
    faces = tmp_path_factory.mktemp("undisturbed") / "faces"
    with ray_head(num_cpus=1) as single:
        done = run_job("preprocess.py", *flags(data, faces), extra=single.environment, timeout_s=120)
    assert done.status == 0, done.errors
    assert rows(faces) == photos
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


@contextmanager
def half_done(data: Path, faces: Path, extra: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run a job that has finished a part, but not all; nothing of it is left in the end."""
    with start_job("preprocess.py", *flags(data, faces), extra=extra) as job:
        try:
            wait_until(lambda: bool(rows(faces)), job)
            yield job
        finally:
            kill_session(job.pid)


@pytest.mark.parametrize("victim", ["driver and workers", "driver"])
def test_after_kill_9_the_same_command_does_what_is_missing(
    head: RayHead, data: Path, photos: list[str], undisturbed: dict[str, str], tmp_path: Path, victim: str
) -> None:
    faces = tmp_path / "faces"
    with half_done(data, faces) as job:
        if victim == "driver":
            job.kill()
        else:
            kill_session(job.pid)
        job.wait()
        assert not (faces / "_SUCCESS").exists()
        refused = run_here("preprocess.py", *flags(data, faces), "--min-face", "40")
        assert refused.status == 2
        assert "min_face: 20 there, 40 now" in refused.last_error

        # The workers of a driver that is gone may still write meanwhile: what they write is the same.
        num_present = len(rows(faces))
        assert 0 < num_present < len(photos)
        again = run_job("preprocess.py", *flags(data, faces), extra=head.environment)
    assert again.status == 0, again.errors
    assert 0 < again.result["photos_processed"] <= len(photos) - num_present
    assert f"going on with the list of {len(photos)} photos made before" in again.errors
    assert not (faces / "_manifest").exists()
    assert rows(faces) == photos
    assert digests(faces) == undisturbed


def test_a_killed_worker_is_replaced_within_the_run(
    head: RayHead, data: Path, photos: list[str], undisturbed: dict[str, str], tmp_path: Path
) -> None:
    faces = tmp_path / "faces"
    with half_done(data, faces, head.environment) as job:
        workers = [pid for pid, command in session_processes(head.session).items() if command.startswith(WORKER)]
        assert workers
        os.kill(workers[0], signal.SIGKILL)
        done = finish(job)
    assert done.status == 0, done.errors
    assert done.result["photos_processed"] == len(photos)
    assert digests(faces) == undisturbed


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (signal.SIGTERM, 75, "stopped: asked by a signal; what is done stays, and the same command goes on from here"),
        (signal.SIGUSR1, 75, "stopped: asked by a signal; what is done stays, and the same command goes on from here"),
        (signal.SIGINT, 1, "interrupted: the same command goes on from here"),
    ],
)
def test_a_signal_ends_the_job_with_one_clear_line(
    head: RayHead, data: Path, tmp_path: Path, number: int, status: int, message: str
) -> None:
    with half_done(data, tmp_path / "faces", head.environment) as job:
        job.send_signal(number)
        done = finish(job, timeout_s=60)
    assert done.status == status
    assert done.last_error == message
    assert "Traceback" not in done.errors


def test_a_kill_between_the_last_steps_costs_no_photo(head: RayHead, sample_data: Path, tmp_path: Path) -> None:
    faces = tmp_path / "faces"
    first = run_job("preprocess.py", *flags(sample_data, faces), extra=head.environment)
    assert first.status == 0, first.errors
    whole = {path.name: path.read_bytes() for path in faces.iterdir() if path.is_file()}
    for num_written in range(4):
        for name in ["card.json", "README.md", "contact_sheet.jpg", "_SUCCESS"][num_written:]:
            (faces / name).unlink()
        again = run_here("preprocess.py", *flags(sample_data, faces))
        assert again.status == 0, again.errors
        assert again.result["photos_processed"] == 0
        assert again.result["aligned"] == first.result["aligned"]
        for name in ("_SUCCESS", "contact_sheet.jpg", "_plan.json"):
            assert (faces / name).read_bytes() == whole[name]


def test_a_full_disk_is_told_in_one_line_and_a_larger_one_goes_on(
    head: RayHead, data: Path, photos: list[str], undisturbed: dict[str, str], tmp_path: Path
) -> None:
    with mounted(tmp_path / "small disk", "size=1m") as disk:
        faces = disk / "faces"
        full = run_job("preprocess.py", *flags(data, faces), extra=head.environment)
        assert full.status == 1
        assert full.last_error.startswith("failed: ")
        assert str(faces) in full.last_error
        assert "No space left on device" in full.last_error
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        again = run_job("preprocess.py", *flags(data, faces), extra=head.environment)
        assert again.status == 0, again.errors
        assert rows(faces) == photos
        assert digests(faces) == undisturbed


def test_a_read_only_disk_is_refused_before_anything_starts(sample_data: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "read only", "size=1m,ro") as disk:
        refused = run_here("preprocess.py", *flags(sample_data, disk / "faces"))
    assert refused.status == 2
    assert "Read-only file system" in refused.last_error
    assert str(tmp_path / "read only") in refused.last_error


def test_a_kill_while_workers_list_a_large_folder_costs_no_photo(head: RayHead, tmp_path: Path) -> None:
    """More photos than one process lists. They are empty files, so that nothing but the listing takes time."""
    for person in range(140):
        (tmp_path / "photos" / f"person {person}").mkdir(parents=True)
        for photo in range(500):
            (tmp_path / "photos" / f"person {person}" / f"{photo}.jpg").touch()
    faces = tmp_path / "faces"
    listing = faces / "_manifest" / "listing"
    with start_job("preprocess.py", *flags(tmp_path, faces), extra=head.environment) as job:
        try:
            wait_until(lambda: len(list(listing.rglob("*.parquet"))) > 3, job)
        finally:
            kill_session(job.pid)
    assert not list(faces.glob("split=*"))
    listed = {path: path.stat().st_mtime_ns for path in listing.rglob("*.parquet")}
    with start_job("preprocess.py", *flags(tmp_path, faces), extra=head.environment) as job:
        try:
            wait_until(
                lambda: any(faces.glob("split=*/part-*")) or len(list(listing.rglob("*.parquet"))) > len(listed), job
            )
        finally:
            assert all(path.stat().st_mtime_ns == at for path, at in listed.items() if path.exists()), "listed again"
            kill_session(job.pid)
    done = run_job("preprocess.py", *flags(tmp_path, faces), extra=head.environment)
    assert done.status == 0, done.errors
    assert done.result["corrupt"] == 70_000
    assert rows(faces) == sorted(f"person {person}/{photo}.jpg" for person in range(140) for photo in range(500))
