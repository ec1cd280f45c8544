"""Kills at random moments: are all photos in the table, all epochs in the history, and is one line on the terminal?

    python -m bench.kills --preprocess 60 --training 30 --seed 1

A campaign repeats a job on drawn people, and kills (SIGKILL) one of its processes at a random moment: the driver, a
worker, a shard of the feature store, Ray's raylet or its head service. A job that ends of it is started again by the
same command, until it finishes. A faces table must then have the rows of an undisturbed one, and a run each epoch once
and the files of an undisturbed run. A job that ends must say why in one line, its last, and within 15 seconds. Several
kills may hit one job, and one table or run. `--keep FOLDER` keeps the output of each job. Prints one line of JSON last.
"""

import argparse
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.inputs import ROOT, drawn, job_command, job_environment
from lib import storage
from lib.faces import table
from tests.job_runner import kill_session, session_processes
from tests.training.learnable_faces import write_faces

LINE_LIMIT_S = 15.0
"""Between a kill and the end of the job."""
HUNG_S = 300.0
ORPHANS_LIMIT_S = 120.0
"""Within which all processes of killed jobs must have ended, after the output is finished.

Ray's agents try for a minute to reach a head that is dead.
"""
EPOCHS = 4

DRIVER = "driver"
RAY = {"raylet": "/raylet/raylet ", "head": "gcs_server "}
"""What the command lines of Ray's daemons hold."""
PREPROCESS_WORKERS = {"worker": "ray::MapWorker"}
TRAINING_WORKERS = {"worker": "ray::RayTrainWorker", "store": "ray::Shard"}

_END = re.compile(r"(failed|error|stopped|interrupted): ")


@dataclass
class Campaign:
    """A job to kill, and what must be there in the end.

    Attributes:
        command: the job's script and flags, but for the output.
        output: the flag of the folder that the job makes.
        workers: parts of the command lines of processes that the job replaces when they die.
        content: returns what a finished output holds.
        faults: what was wrong, in words.
        slowest_line_s: the longest time from a kill to the end of the job.
    """

    command: tuple[str, ...]
    output: str
    workers: Mapping[str, str]
    content: Callable[[Path], Any]
    kept: Path
    kills: Counter[str] = field(default_factory=Counter)
    num_finished: int = 0
    faults: list[str] = field(default_factory=list)
    slowest_line_s: float = 0.0

    def run(self, num_kills: int, rng: random.Random, scratch: Path) -> None:
        """Make outputs under fire until so many kills are done; compare each with that of an undisturbed job."""
        started = time.monotonic()
        _, status = self._attempt(scratch / "undisturbed", None)
        assert status == 0, "the job fails without a kill"
        seconds = time.monotonic() - started
        wanted = self.content(scratch / "undisturbed")
        for number in itertools.count():
            if self.kills.total() >= num_kills:
                return
            folder = scratch / f"output {number}"
            sessions: list[int] = []
            status = -1
            while status != 0 and len(sessions) < 50:
                session, status = self._attempt(folder, Killer(rng, seconds, num_kills - self.kills.total()))
                sessions.append(session)
            self._check(folder, wanted, status)
            for session in sessions:
                self._wait_for_orphans(session)

    def _attempt(self, folder: Path, killer: "Killer | None") -> tuple[int, int]:
        """Run the job once under fire; return its session and its exit status."""
        errors_path = self.kept / f"{self.command[0]}-{folder.name}-{time.time():.0f}.txt"
        with errors_path.open("w") as errors:
            job = subprocess.Popen(
                job_command(self.command[0], *self.command[1:], self.output, str(folder)),
                env=job_environment(),
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
            )
        wait_for(lambda: errors_path.stat().st_size > 0 or job.poll() is not None)  # before, it cannot say anything
        killed, at = killer.strike(job, self.workers) if killer else ([], 0.0)
        self.kills.update(killed)
        ending = killed[-1] if killed and killed[-1] not in self.workers else None
        try:
            status = job.wait(HUNG_S)
        except subprocess.TimeoutExpired:
            self._fault(f"{errors_path.name}: hangs after {killed}")
            kill_session(job.pid)
            status = job.wait()
        ended_s = time.monotonic() - at
        if ending and status != 0:
            # Of a job that was killed, by us or by Ray, the shell that outlives it says so.
            wait_for(lambda: "failed: " in errors_path.read_text(errors="replace"), LINE_LIMIT_S)
        if ending and ending != DRIVER and status != 0:
            self.slowest_line_s = max(self.slowest_line_s, ended_s)
            if ended_s > LINE_LIMIT_S:
                self._fault(f"{errors_path.name}: {ended_s:.0f} s from the kill of {ending} to the end")
        if problem := wrong_end(status, errors_path.read_text(errors="replace"), ending):
            self._fault(f"{errors_path.name}: {problem} after {killed}, status {status}")
        print(f"{errors_path.name}: {killed}, status {status}", file=sys.stderr, flush=True)
        return job.pid, status

    def _wait_for_orphans(self, session: int) -> None:
        """Wait until Ray's processes have noticed that their job is dead, and ended too."""
        deadline = time.monotonic() + ORPHANS_LIMIT_S
        while left := session_processes(session):
            if time.monotonic() > deadline:
                self._fault(f"processes are left of session {session}: {[each[:40].strip() for each in left.values()]}")
                kill_session(session)
                return
            time.sleep(0.5)

    def _check(self, folder: Path, wanted: Any, status: int) -> None:
        self.num_finished += 1
        if status != 0:
            self._fault(f"{folder.name}: not finished")
        elif (found := self.content(folder)) != wanted:
            (self.kept / f"{self.command[0]} {folder.name}.json").write_text(json.dumps([wanted, found], default=str))
            self._fault(f"{folder.name}: differs from what an undisturbed job makes")

    def _fault(self, what: str) -> None:
        self.faults.append(what)
        print(f"FAULT {what}", file=sys.stderr, flush=True)

    def figures(self) -> dict[str, Any]:
        """Return what came of it."""
        counts = {"kills": dict(self.kills), "finished": self.num_finished, "faults": self.faults}
        return {**counts, "slowest_line_s": round(self.slowest_line_s, 1)}


@dataclass(frozen=True)
class Killer:
    """Kills a process of a job at a random moment within so many seconds, a few times at most."""

    rng: random.Random
    seconds: float
    most: int

    def strike(self, job: subprocess.Popen[bytes], workers: Mapping[str, str]) -> tuple[list[str], float]:
        """Kill until one ends the job or the job ends; return the kinds of what was killed, and the last moment."""
        killed: list[str] = []
        while len(killed) < self.most:
            with suppress(subprocess.TimeoutExpired):
                job.wait(self.rng.uniform(0, self.seconds))
                break
            found: dict[str, list[int]] = {DRIVER: [job.pid]}
            for pid, command in session_processes(job.pid).items():
                for kind, part in {**workers, **RAY}.items():
                    if part in command:
                        found.setdefault(kind, []).append(pid)
            kind = self.rng.choice(sorted(found))
            at = time.monotonic()
            with suppress(ProcessLookupError):
                os.kill(self.rng.choice(found[kind]), signal.SIGKILL)
                killed.append(kind)
                if kind not in workers:
                    return killed, at
        return killed, time.monotonic()


def wait_for(is_so: Callable[[], bool], limit_s: float = HUNG_S) -> None:
    """Wait until something is so, or for the limit."""
    deadline = time.monotonic() + limit_s
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.1)


def wrong_end(status: int, errors: str, ending: str | None) -> str:
    """Return what is wrong with how a job ended, an empty string where it ended as it should."""
    lines = errors.splitlines()
    # What Ray has said last is brought along, indented.
    said = [line for line in lines if _END.match(line)]
    if any(line.startswith("Traceback") for line in lines):
        return "a traceback"
    if status == 0:
        return f"done, but says {said[0]!r}" if said else ""
    if ending is None:
        return f"ended without a kill that ends it: {lines[-1:]}"
    if ending == DRIVER and lines and lines[-1].startswith("look at "):
        return ""  # it had done all and said so, and was killed while Python ended
    if len(said) != 1 or lines[-1] != said[0]:
        return f"says {len(said)} lines of its end; the last line is {lines[-1:]}"
    return ""


def rows_of(faces: Path) -> list[str]:
    """Return the rows of a finished faces table, in the order of their photos, and its counts."""
    success = table.read_success(str(faces))
    rows = [row for name in success["parts"] for row in storage.read_parquet(str(faces / name)).to_pylist()]
    return [repr(success["counts"]), *(repr(row) for row in sorted(rows, key=lambda row: str(row["photo"])))]


def epochs_and_files(folder: Path) -> tuple[list[int], list[str]]:
    """Return the epochs in the history of a run, and the names of the files in its folder."""
    run = folder / "runs" / "default"
    history = storage.read_parquet(str(run / "history.parquet")).to_pylist()
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    # TensorBoard names its files after time and process, and begins one at each start.
    names = {re.sub(r"events\.out\.tfevents.*", "events", name) for name in names}
    # How many triplets an epoch has depends on the negatives that the store knew of in time.
    names = {re.sub(r"step-\d+", "step", name) for name in names}
    return [row["epoch"] for row in history], sorted(names)


def preprocess_campaign(scratch: Path, kept: Path) -> Campaign:
    """Return the campaign against preprocess, on some hundred drawn photos in several parts."""
    data = drawn(scratch / "drawn people", 16, 8)
    command = ("preprocess.py", "--data", str(data))
    return Campaign(command, "--faces", PREPROCESS_WORKERS, rows_of, kept)


def training_campaign(scratch: Path, kept: Path) -> Campaign:
    """Return the campaign against a training of some seconds an epoch, with hard negatives from the store."""
    faces = write_faces(scratch / "faces")
    tiny = ("--backbone", "test_convnext", "--init", "none", "--embedding-dim", "16", "--lr", "2e-3")
    size = ("--epochs", str(EPOCHS), "--triplets-per-epoch", "480", "--checkpoint-minutes", "0.01")
    mining = ("--val-pairs", "400", "--batch", "triplets", "--negatives", "hard")
    command = ("train.py", "--faces", faces, "--cache-dir", str(scratch / "cache"), *tiny, *size, *mining)
    return Campaign(command, "--data", TRAINING_WORKERS, epochs_and_files, kept)


def main() -> None:
    """Run the campaigns and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preprocess", type=int, default=60)
    parser.add_argument("--training", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path)
    given = parser.parse_args()
    figures: dict[str, Any] = {"bench": "kills", "seed": given.seed}
    with tempfile.TemporaryDirectory(prefix="kills ", ignore_cleanup_errors=True) as name:
        kept = given.keep or Path(name)
        kept.mkdir(parents=True, exist_ok=True)
        for job, make, num_kills in (
            ("preprocess", preprocess_campaign, given.preprocess),
            ("training", training_campaign, given.training),
        ):
            if num_kills:
                (Path(name) / job).mkdir()
                campaign = make(Path(name) / job, kept)
                campaign.run(num_kills, random.Random(f"{given.seed} {job}"), Path(name) / job)
                figures[job] = campaign.figures()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
