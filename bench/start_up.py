"""How long users wait before a job works and after it has: from the command to its first result, and from its last one
to the prompt.

A first result is the first training step, or the first file of a table; a last one is the end of the last epoch, or the
last file. Drawn people, a tiny model, a Ray cluster of the job's own. `--beside` names another checkout of the project,
whose jobs take turns with these. On a machine that does other work too, the CPU seconds of all processes of a job say
more than the clock.
"""

import argparse
import ctypes
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.inputs import ROOT, drawn, job_environment
from lib.training.history import read_rows

TRAINING = ["--backbone", "test_convnext", "--init", "none", "--image-size", "64", "--epochs", "1"]
TRAINING += ["--triplets-per-epoch", "200"]


PR_SET_CHILD_SUBREAPER = 36
"""Of prctl(2): orphans of the jobs become children of this process, so that their CPU time is counted."""


def run_and_time(root: Path, script: str, *flags: str) -> tuple[float, float, float]:
    """Run a job of a checkout, and return when it began, when it ended, and the CPU seconds of all its processes."""
    command = [sys.executable, str(root / "jobs" / script), *flags]
    environment = {**job_environment(), "PYTHONPATH": str(root)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.time()
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    ended = time.time()
    if done.returncode:
        raise SystemExit(done.stderr)
    try:
        while True:
            os.wait()
    except ChildProcessError:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return began, ended, used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime


def measure(root: Path, data: Path, number: int) -> dict[str, tuple[float, ...]]:
    """Return for each job its seconds before the first and after the last result, and its CPU seconds."""
    found: dict[str, tuple[float, ...]] = {}
    run = f"{root.name} {number}"
    faces, embeddings, run_folder = (data / name / run for name in ("tables", "embeddings", "runs"))
    place = ["--data", str(data), "--faces", str(faces)]
    training = [*place, "--name", run, "--cache-dir", str(data / "cache"), *TRAINING]

    began, ended, cpu_s = run_and_time(root, "preprocess.py", *place)
    written = [path.stat().st_mtime for path in faces.glob("split=*/*")]
    found["preprocess"] = (min(written) - began, ended - max(written), cpu_s)

    began, ended, cpu_s = run_and_time(root, "train.py", *training)
    epoch_ended = (run_folder / "history.parquet").stat().st_mtime
    epoch_s = float(read_rows(str(run_folder))[0]["seconds"] or 0)
    found["train"] = (epoch_ended - epoch_s - began, ended - epoch_ended, cpu_s)

    began, ended, cpu_s = run_and_time(
        root, "embed.py", *place, "--model", str(run_folder), "--output", str(embeddings)
    )
    written = [path.stat().st_mtime for path in embeddings.glob("split=*/*")]
    found["embed"] = (min(written) - began, ended - max(written), cpu_s)

    for flag in ("--help", "--no-such-flag"):
        began = time.time()
        subprocess.run([sys.executable, root / "jobs" / "train.py", flag], cwd=root, capture_output=True, check=False)
        found[f"train {flag}"] = (time.time() - began,)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beside", type=Path, help="another checkout, measured in turn with this one")
    options = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    roots = [ROOT, *([options.beside.resolve()] if options.beside else [])]
    with tempfile.TemporaryDirectory() as folder:
        data = drawn(Path(folder), 14, 8)
        rounds = [{root: measure(root, data, number) for root in roots} for number in range(options.rounds)]
    print(f"medians of {options.rounds}, in seconds: until the first result, after the last one, CPU of all processes")
    for root in roots:
        print(root)
        for name in rounds[0][root]:
            columns = zip(*(each[root][name] for each in rounds), strict=True)
            print(f"  {name:18}", *(f"{statistics.median(column):6.1f}" for column in columns))


if __name__ == "__main__":
    main()
