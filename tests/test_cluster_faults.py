"""Ray's daemons that do not start, hang or die, and signals: each ends the job soon, in one line."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lib import local_ray, ray_watch
from tests.job_runner import (
    ROOT,
    children,
    environment,
    finish,
    kill_session,
    run_job,
    session_processes,
    start_job,
    wait_until,
)


@pytest.mark.slow
def test_a_local_ray_that_does_not_start_is_explained_in_one_line(sample_data: Path, tmp_path: Path) -> None:
    """Ray itself says that it waited in vain for a file; why its head service died stands in a log of it."""
    flags = ["--data", str(sample_data), "--faces", str(tmp_path / "faces")]
    done = run_job("preprocess.py", *flags, extra={"RAY_gcs_storage": "nonsense"})
    assert done.status == 1
    assert done.last_error.startswith(
        "failed: Ray does not start on this machine: its gcs_server died: Unsupported GCS storage type: nonsense: free "
    )
    assert "Traceback" not in done.errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "pause_s"),
    [
        ("", 0),  # before it has written its port, for which Ray would wait 30 s
        ("", 0.3),
        ("Started a local Ray", 0),  # from here on Ray holds the interpreter, and no thread of ours runs
    ],
)
def test_a_head_service_that_is_killed_while_ray_starts_ends_the_job_in_one_line(
    sample_data: Path, tmp_path: Path, said: str, pause_s: float
) -> None:
    """Ray itself would wait for a minute and abort with a dump of its stack."""
    flags = ["--data", str(sample_data), "--faces", str(tmp_path / "faces")]

    def heads(job: subprocess.Popen[str]) -> list[int]:
        return [pid for pid, command in children(job.pid).items() if "gcs_server" in command]

    def log(job: subprocess.Popen[str]) -> str:
        folder = tmp_path / "tmp" / f"conv-facenet-{os.geteuid()}" / "logs"
        return "".join(path.read_text() for path in folder.glob(f"*-{job.pid}.log"))

    (tmp_path / "tmp").mkdir()
    with start_job("preprocess.py", *flags, extra={"TMPDIR": str(tmp_path / "tmp"), "RAY_TMPDIR": "/tmp"}) as job:
        wait_until(lambda: bool(heads(job)) and said in log(job), job)
        time.sleep(pause_s)
        for pid in heads(job):
            os.kill(pid, signal.SIGKILL)
        done = finish(job, 25)
    assert done.status == 1
    died = r"failed: (Ray's head service \(gcs_server\) has died|a process of Ray died while it started): killed, "
    assert re.match(died, done.last_error)
    assert "Traceback" not in done.errors


@pytest.mark.parametrize(("words", "line"), [("its raylet died: no head", "no head"), ("", "gcs_server")])
def test_a_start_of_ray_that_hangs_over_a_dead_daemon_is_ended(
    words: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(ray_watch, "REPORT_LIMIT_S", 0.1)
    monkeypatch.setattr(ray_watch, "_end", said.append)
    seen = iter([{"gcs_server": 1}])
    with ray_watch.watched_start(lambda alive: next(seen, {}) if alive else {}, lambda: words):
        wait_until(lambda: bool(said))
    assert line in said[0]


def test_a_child_that_died_and_was_not_waited_for_is_a_dead_daemon(tmp_path: Path) -> None:
    shutil.copy("/bin/sleep", tmp_path / "raylet")
    child = subprocess.Popen([tmp_path / "raylet", "100"])
    wait_until(lambda: local_ray.daemons() == {"raylet": child.pid})
    assert local_ray.daemons(alive=False) == {}
    child.kill()
    wait_until(lambda: local_ray.daemons(alive=False) == {"raylet": child.pid})
    assert local_ray.daemons() == {}
    child.wait()


def _kill_once_it_works(job: subprocess.Popen[str], faces: Path, daemon: str) -> None:
    """Kill a daemon of a job's Ray, or signal its whole process group, once a part is there."""
    wait_until(lambda: any(faces.glob("split=*/*.parquet")), job)
    if daemon == "group":
        os.killpg(job.pid, signal.SIGTERM)
        return
    (pid,) = (pid for pid, command in session_processes(job.pid).items() if f"/{daemon} " in command)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("daemon", "status", "line"),
    [
        ("gcs_server", 1, "failed: Ray's head service (gcs_server) has died"),
        ("raylet", 1, "failed: Ray's raylet on this machine has died"),
        ("group", 75, "stopped: asked by a signal"),
    ],
)
def test_a_job_whose_ray_dies_ends_soon_in_one_line_and_goes_on(
    sample_data: Path, tmp_path: Path, daemon: str, status: int, line: str
) -> None:
    faces = tmp_path / "faces"
    for path in (sample_data / "photos").iterdir():  # more than are done before the kill
        for copy in range(8):
            target = tmp_path / "photos" / f"{copy}" / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)
    job = start_job("preprocess.py", "--data", str(tmp_path))
    try:
        _kill_once_it_works(job, faces, daemon)
        done = finish(job, timeout_s=60)
    finally:
        kill_session(job.pid)
    assert done.status == status
    assert done.last_error.startswith(line)
    assert "the same command goes on from here" in done.last_error
    assert "Traceback" not in done.errors
    if daemon == "raylet":
        again = finish(start_job("preprocess.py", "--data", str(tmp_path)))
        assert again.status == 0, again.errors
        assert again.result["rows"] == 8 * len(list((sample_data / "photos").iterdir()))
        assert again.result["photos_processed"] < again.result["rows"]


DONE_JOB = """
import atexit, logging, os, signal, time
from dataclasses import dataclass
from lib import cluster, ray_watch
from lib.config import run_job

@dataclass(frozen=True, kw_only=True)
class Config:
    ray: bool = False

def job(config):
    if config.ray:
        with cluster.connected():
            logging.getLogger("lib").info("leaving")
    else:
        atexit.register(time.sleep, 60)
        with ray_watch.limited_leave():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
    return {}

run_job(Config, job, description="")
"""


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--ray"], marks=pytest.mark.slow, id="its Ray is gone"),
        pytest.param([], id="Ray is just being left"),
    ],
)
def test_a_job_that_is_signalled_once_its_work_is_done_ends_within_seconds(flags: list[str]) -> None:
    """Ray's exit handlers would look for its dead head for a minute, at full load of a CPU."""
    job = subprocess.Popen(
        [sys.executable, "-c", DONE_JOB, *flags],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        if flags:
            assert job.stderr is not None
            assert any(line.endswith("leaving\n") for line in job.stderr)
            os.killpg(job.pid, signal.SIGTERM)
        done = finish(job, timeout_s=40)
    finally:
        kill_session(job.pid)
    assert done.status == 75, done.errors
    assert done.last_error.startswith("stopped: asked by a signal")
