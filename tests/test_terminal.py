"""What a user sees: our lines on the terminal, Ray's and the libraries' in a log; why a job failed; how far it is."""

import json
import logging
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lib import progress
from lib.progress import ProgressLine
from lib.terminal import Terminal
from lib.training.objective import EpochSums, StepFigures
from tests.job_runner import JOB_LIMIT_S, environment, wait_until

HEAD = """
import ctypes, logging, os, sys, time
from dataclasses import dataclass
from lib import cluster, part_workers
from lib.config import run_job
from lib.errors import JobError

@dataclass(frozen=True)
class Config:
    photos: str = ""

ours, others = logging.getLogger("lib.faces"), logging.getLogger("some.library")

def say():
    ours.info("ours")
    others.warning("a library's logger")
    print("a library's print")
    os.write(1, b"a core's standard output\\n")
    os.write(2, b"a core's standard error\\n")
"""
TAIL = "\nif __name__ == '__main__':\n    run_job(Config, job, description='', look_at='{made}/report.html')\n"
OTHERS = ("a library's logger", "a library's print", "a core's standard output", "a core's standard error")
OUR_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING) \S.*")


@dataclass(frozen=True)
class Ended:
    """What a job left behind."""

    status: int
    output: str
    errors: str
    logs: list[Path]


def run(folder: Path, job: str, *flags: str, tmp: str = "tmp") -> Ended:
    """Run a job of these lines in a process of its own, with a folder for its temporary files."""
    script, temporary = folder / "my job.py", folder / tmp
    script.write_text(HEAD + job + TAIL)
    temporary.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, script, *flags],
        env=environment({"TMPDIR": str(temporary), "RAY_TMPDIR": "/tmp"}),
        capture_output=True,
        text=True,
        timeout=JOB_LIMIT_S,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr, list(temporary.glob("conv-facenet-*/logs/*.log")))


def run_in_a_terminal(folder: Path, job: str) -> tuple[int, str]:
    """Run a job whose standard error is a terminal; return its status and what came there."""
    script = folder / "job.py"
    script.write_text(HEAD + job + TAIL)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, script],
        env=environment({"TMPDIR": str(folder), "RAY_TMPDIR": "/tmp"}),
        stdout=-3,
        stderr=theirs,
    )
    os.close(theirs)
    shown = all_of(ours)
    return process.wait(JOB_LIMIT_S), shown


def all_of(terminal: int) -> str:
    """Return what came to a terminal until nobody held the other side any more."""
    shown = b""
    with suppress(OSError):  # EIO
        while piece := os.read(terminal, 1 << 16):
            shown += piece
    os.close(terminal)
    return shown.decode()


def test_the_lines_of_libraries_go_to_a_log_that_only_the_user_reads(tmp_path: Path) -> None:
    ended = run(tmp_path, "def job(config):\n    say()\n    return {'made': '/a b', 'rows': 1}\n")
    assert ended.status == 0
    assert json.loads(ended.output) == {"made": "/a b", "rows": 1}, "the result alone is on standard output"
    first, last = ended.errors.splitlines()
    assert OUR_LINE.fullmatch(first)
    assert first.endswith("INFO ours")
    assert last == "look at /a b/report.html"
    (log,) = ended.logs
    assert all(line in log.read_text() for line in OTHERS)
    assert log.stat().st_mode & 0o777 == 0o600
    assert log.parent.stat().st_mode & 0o777 == 0o700


def test_verbose_shows_them(tmp_path: Path) -> None:
    ended = run(tmp_path, "def job(config):\n    say()\n    return {}\n", "--verbose")
    assert ended.status == 0
    assert ended.output == "{}\n"
    assert all(line in ended.errors for line in ("ours", *OTHERS))
    assert not ended.logs


def test_a_log_without_a_line_is_removed_and_old_ones_too(tmp_path: Path) -> None:
    job = "def job(config):\n    return {'dry_run': True, 'made': 'x'}\n"
    (log,) = run(tmp_path, "def job(config):\n    say()\n    return {}\n").logs
    os.utime(log, (0, 0))
    ended = run(tmp_path, job)
    assert not ended.logs
    assert ended.errors == "", "a dry run makes nothing to look at"


@pytest.mark.parametrize(
    ("end", "last"),
    [
        ("raise JobError('the disk is full')", "failed: the disk is full"),
        ("raise ZeroDivisionError('a bug')", "ZeroDivisionError: a bug"),
    ],
)
def test_a_failure_brings_the_last_lines_and_names_the_log(tmp_path: Path, end: str, last: str) -> None:
    write = "os.write(2, b'reading s3://user:sec-ret@host/x\\n' + b''.join(b'line %d\\n' % n for n in range(40)))"
    ended = run(tmp_path, f"def job(config):\n    {write}\n    print('the reason'); sys.stderr.flush()\n    {end}\n")
    lines = ended.errors.splitlines()
    assert ended.status == 1
    assert lines[-1] == last
    assert str(ended.logs[0]) in lines[0]
    assert lines[1] == "    line 21"
    assert lines[20] == "    the reason"
    assert "line 20\n" in ended.logs[0].read_text()


def test_what_is_brought_along_shows_no_secret(tmp_path: Path) -> None:
    write = "os.write(2, b'reading s3://user:sec-ret@host/x\\n')"
    for end in ("raise JobError('no')", "os.kill(os.getpid(), 9)"):
        ended = run(tmp_path, f"def job(config):\n    {write}\n    {end}\n")
        assert "    reading s3://" in ended.errors
        assert "sec-ret" not in ended.errors


@pytest.mark.parametrize(
    ("end", "status", "word"),
    [
        ("ctypes.string_at(0)", -11, "Segmentation fault"),
        ("os.abort()", -6, "Aborted"),
        ("os.kill(os.getpid(), 9)", -9, ""),
    ],
)
def test_a_crash_shows_what_the_libraries_said_before_it(tmp_path: Path, end: str, status: int, word: str) -> None:
    ended = run(tmp_path, f"def job(config):\n    say()\n    {end}\n")
    assert ended.status == status
    assert word in ended.errors
    assert "    a core's standard error" in ended.errors
    assert str(ended.logs[0]) in ended.errors
    assert ended.errors.splitlines()[-1] == "failed: the process was killed, or a library has crashed"


def test_a_library_that_ends_the_job_before_it_can_say_why_does_not_hide_the_reason(tmp_path: Path) -> None:
    say = "from lib.terminal import terminal; terminal().leave_word('failed: s3://me:sec-ret@host has died')"
    ended = run(tmp_path, f"def job(config):\n    {say}\n    os._exit(1)\n")
    assert ended.status == 1
    assert ended.errors.splitlines()[-1] == "failed: s3://***@host has died"


def test_where_no_log_can_be_all_is_shown(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / f"conv-facenet-{os.geteuid()}").write_text("not a folder")
    ended = run(tmp_path, "def job(config):\n    say()\n    return {}\n")
    assert ended.status == 0
    assert all(line in ended.errors for line in OTHERS)


WORKER = """
class Work:
    def __call__(self, item):
        ours.warning("photo %d is odd\\nin two ways", item["part"])
        ours.warning("all workers say this")
        os.write(2, b"a worker's core\\n")
        END
        time.sleep(0.3 + item["part"])  # so that they end one after the other
        return part_workers.summary(lambda item: (5, 0), item)

def job(config):
    part_workers.TRIES_OF_A_PART = 2
    with cluster.connected():
        done = part_workers.run_parts([{"part": n} for n in range(4)], Work, (), unit="photo", num_done=0, num_all=20)
    return {"made": "/x", "rows": done.num}
"""


def test_a_job_on_ray_shows_our_lines_alone_and_how_far_it_is_in_one(tmp_path: Path) -> None:
    status, shown = run_in_a_terminal(tmp_path, WORKER.replace("END", ""))
    assert status == 0, shown
    lines = [re.split(r"\r(?:\x1b\[K)?", line) for line in shown.removesuffix("\r\n").split("\r\n")]
    kept = [parts[-1] for parts in lines]
    renewed = [part for parts in lines for part in parts[:-1] if part]
    assert kept.pop() == "look at /x/report.html"
    assert not [line for line in kept if not OUR_LINE.fullmatch(line)], shown
    assert sorted(re.findall(r"WARNING photo (\d) is odd in two ways", "\n".join(kept))) == ["0", "1", "2", "3"]
    assert sum(line.endswith("WARNING all workers say this") for line in kept) == 1
    assert any(
        re.fullmatch(
            r"working: (5/20 photos \(25|10/20 photos \(50|15/20 photos \(75) %\), .*photos?(/s)?, .* left", line
        )
        for line in renewed
    ), renewed
    (log,) = tmp_path.glob("conv-facenet-*/logs/job-*.log")
    assert "a worker's core" in log.read_text()
    assert "Started a local Ray instance" in log.read_text()


@pytest.mark.slow
def test_a_worker_that_dies_brings_its_reason_along(tmp_path: Path) -> None:
    ended = run(tmp_path, WORKER.replace("END", "time.sleep(1); os._exit(1)"))
    lines = ended.errors.splitlines()
    assert ended.status == 1
    assert lines[-1].startswith("failed: workers died 2 times over one part")
    assert any("a worker's core" in line for line in lines), ended.errors
    assert len([line for line in lines if line.startswith("    ")]) <= 20


def counts(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 10))  # looked at twice for each hundred images
    monkeypatch.setattr(progress, "terminal", lambda: terminal)
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with ProgressLine("starting", unit="image") as line:
        for done in (0, 100, 200, 300, 400, 500, 600, 700):
            line.update(done, total=1000 if done else 0, label="epoch 1/2" if done else "", note="loss 0.5000")
            terminal.say("a line between")


def test_progress_is_one_line_that_is_renewed_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        counts(Terminal(stream), monkeypatch)
    shown = all_of(ours)
    assert shown.count("\n") == shown.count("a line between\r\n") == 8
    assert shown.endswith("\x1b[K")
    last = shown.split("\x1b[K")[-2].splitlines()[-1]
    assert last == "epoch 1/2: 700/1000 images (70 %), 5 images/s, loss 0.5000, 1 min 0 s left"


def test_progress_is_a_line_a_minute_elsewhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    with caplog.at_level(logging.INFO), (tmp_path / "errors").open("w") as stream:
        counts(Terminal(stream), monkeypatch)
    assert "\r" not in (tmp_path / "errors").read_text()
    assert 1 <= len(caplog.messages) <= 3
    assert "images/s, loss 0.5000, " in caplog.messages[-1]


def test_progress_that_stalls_says_so_and_what_libraries_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    log = tmp_path / "job.log"
    log.write_text("2 workers killed: the node is out of memory\n")
    monkeypatch.setattr(progress, "BEAT_EVERY_S", 0.01)
    monkeypatch.setattr(progress, "STALLED_S", 0.1)
    with caplog.at_level(logging.INFO), (tmp_path / "errors").open("w") as stream:
        monkeypatch.setattr(progress, "terminal", lambda: Terminal(stream, log=log))
        with ProgressLine("working", unit="photo", total=2) as line:
            wait_until(lambda: "out of memory" in (tmp_path / "errors").read_text())
            line.add(1)
    assert caplog.messages[0] == "no photo was finished for 0 s"


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (3600, "1 h 0 min"), (90_061, "25 h 1 min")],
)
def test_a_time_is_told_in_the_units_that_people_use(seconds: float, told: str) -> None:
    assert progress._short_time(seconds) == told


def test_the_loss_that_is_shown_is_the_mean_of_the_steps() -> None:
    sums = EpochSums(torch.device("cpu"), {})
    one = torch.ones(())
    for loss in (1.0, 2.0, 6.0):
        figures = StepFigures(
            loss=one * loss, num_active=one, num_triplets=one, positive_distance=one, negative_distance=one
        )
        sums.add(figures, 4)
    assert float(sums.loss) == 3.0
