"""How long users wait before a job works and after it has: from the command to its first result, and from its last one
to the prompt.

A first result is the first training step, or the first file of a table; a last one is the end of the last epoch, or the
last file. Drawn people, a tiny model, a Ray cluster of the job's own. `--beside` names another checkout of the project,
whose jobs take turns with these.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.inputs import ROOT, drawn, job_environment
from lib.training.history import read_rows

TRAINING = ["--backbone", "test_convnext", "--init", "none", "--image-size", "64", "--epochs", "1"]


def seconds_of(root: Path, script: str, *flags: str) -> tuple[float, float]:
    """Run a job of a checkout, and return when it began and when it ended."""
    command = [sys.executable, str(root / "jobs" / script), *flags]
    environment = {**job_environment(), "PYTHONPATH": str(root)}
    began = time.time()
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return began, time.time()


def around(times: Sequence[float], began: float, ended: float) -> tuple[float, float]:
    """Return the seconds before the first and after the last of these times."""
    return min(times) - began, ended - max(times)


def measure(root: Path, data: Path, number: int) -> dict[str, tuple[float, ...]]:
    """Return the seconds of each job of a checkout."""
    found: dict[str, tuple[float, ...]] = {}
    place = ["--data", str(data)]
    faces, embeddings = (str(data / f"{name} {root.name} {number}") for name in ("faces", "embeddings"))
    for name, script, flags, output in (
        ("preprocess", "preprocess.py", ["--faces", faces], faces),
        ("train", "train.py", ["--faces", faces, *TRAINING, "--triplets-per-epoch", "200"], ""),
        ("embed", "embed.py", ["--faces", faces, "--output", embeddings], embeddings),
    ):
        run = f"{root.name} {number}"
        if name == "train":
            flags = [*flags, "--name", run, "--cache-dir", str(data / "cache")]
        elif name == "embed":
            flags = [*flags, "--model", str(data / "runs" / run)]
        began, ended = seconds_of(root, script, *place, *flags)
        if name == "train":
            written = (data / "runs" / run / "history.parquet").stat().st_mtime
            epoch_s = float(read_rows(str(data / "runs" / run))[0]["seconds"] or 0)
            found[name] = (written - epoch_s - began, ended - written)
        else:
            found[name] = around([path.stat().st_mtime for path in Path(output).glob("split=*/*")], began, ended)
    for flag in ("--help", "--dry-run"):
        began, ended = seconds_of(root, "train.py", *place, "--faces", faces, *TRAINING, flag)
        found[f"train {flag}"] = (ended - began,)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beside", type=Path, help="another checkout, measured in turn with this one")
    options = parser.parse_args()
    roots = [ROOT, *([options.beside.resolve()] if options.beside else [])]
    with tempfile.TemporaryDirectory() as folder:
        data = drawn(Path(folder), 14, 8)
        rounds = [{root: measure(root, data, number) for root in roots} for number in range(options.rounds)]
    print(f"medians of {options.rounds}, in seconds: until the first result, after the last one")
    for root in roots:
        print(root)
        for name in rounds[0][root]:
            columns = zip(*(each[root][name] for each in rounds), strict=True)
            print(f"  {name:18}", *(f"{statistics.median(column):6.1f}" for column in columns))


if __name__ == "__main__":
    main()
