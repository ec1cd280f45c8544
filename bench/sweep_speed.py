"""What a sweep gains by running its trials side by side, and what it costs them to share one cache of faces.

1. Trials an hour: jobs/sweep.py with its trials side by side, against jobs/train.py for the same settings one after the
   other, on the same machine, in alternation.
2. The cache: so many processes at once, each asking for the crops and reading all of them, from one folder that they
   share, against a folder each. Cost of the building, disk taken, and rate of the reading.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.inputs import ROOT, drawn, job_environment, run_job

READER = """
import sys, time
import numpy as np
from lib.training.cache_building import build_cache
from lib.training.face_cache import FaceCache
started = time.perf_counter()
cache = FaceCache(build_cache(sys.argv[1], ["train"], sys.argv[2]))
ready = time.perf_counter()
rng = np.random.default_rng(0)
for _ in range(int(sys.argv[3])):
    cache.decode(rng.permutation(len(cache)))
print(ready - started, int(sys.argv[3]) * len(cache) / (time.perf_counter() - ready))
"""


def side_by_side(data: Path, rates: list[float], name: str, flags: list[str], at_once: int) -> float:
    """Return the seconds of a sweep, from command to page; no trial is stopped early."""
    started = time.perf_counter()
    lrs = ",".join(map(str, rates))
    epochs = flags[flags.index("--epochs") + 1]
    more = ["--min-epochs", epochs, "--at-once", str(at_once)]
    run_job("sweep.py", "--data", str(data), "--name", name, "--lrs", lrs, *flags, *more)
    return time.perf_counter() - started


def one_after_the_other(data: Path, rates: list[float], name: str, flags: list[str]) -> float:
    """Return the seconds of the same trainings as single jobs."""
    started = time.perf_counter()
    for rate in rates:
        run_job("train.py", "--data", str(data), "--name", f"{name} {rate}", "--lr", str(rate), *flags)
    return time.perf_counter() - started


def readers(faces: Path, folders: list[Path], passes: int) -> dict[str, float]:
    """Run a reader for each folder at once; return the longest wait for the cache, the readers' rate, and the disk."""
    commands = [[sys.executable, "-c", READER, str(faces), str(folder), str(passes)] for folder in folders]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=job_environment())
        for command in commands
    ]
    outputs = [process.communicate()[0].split() for process in started]
    disk = sum(path.stat().st_size for folder in set(folders) for path in folder.rglob("*.arrow"))
    return {
        "ready_s": max(float(ready) for ready, _ in outputs),
        "crops_per_s": sum(float(rate) for _, rate in outputs),
        "disk_mb": disk / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--identities", type=int, default=100)
    parser.add_argument("--photos-per-identity", type=int, default=10)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--at-once", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    rates = [1e-3 * (n + 1) for n in range(options.trials)]
    flags = ["--backbone", "test_convnext", "--init", "none", "--image-size", "80"]
    flags += ["--epochs", str(options.epochs), "--triplets-per-epoch", "1000", "--val-pairs", "400"]
    seconds: dict[str, list[float]] = {"side_by_side": [], "one_after_the_other": []}
    cache: dict[str, list[dict[str, float]]] = {"shared": [], "own": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = drawn(folder / "data", options.identities, options.photos_per_identity)
        run_job("preprocess.py", "--data", str(data))
        flags += ["--cache-dir", str(folder / "cache")]
        for number in range(3 * options.rounds):
            for kind in cache:
                folders = [
                    folder / f"{kind} {number} {'' if kind == 'shared' else place}" for place in range(options.at_once)
                ]
                cache[kind].append(readers(data / "faces", folders, passes=3))
        print(cache, file=sys.stderr)
        for number in range(options.rounds):
            seconds["side_by_side"].append(side_by_side(data, rates, f"sweep {number}", flags, options.at_once))
            seconds["one_after_the_other"].append(one_after_the_other(data, rates, f"single {number}", flags))
            print({name: [round(value, 1) for value in values] for name, values in seconds.items()}, file=sys.stderr)
    ratios = [one / side for side, one in zip(*seconds.values(), strict=True)]
    result = {
        **{f"{name}_trials_per_h": round(3600 * len(rates) / statistics.median(v)) for name, v in seconds.items()},
        "gain": round(statistics.median(ratios), 2),
        "cache": {
            kind: {key: round(statistics.median(each[key] for each in measured), 2) for key in measured[0]}
            for kind, measured in cache.items()
        },
        **vars(options),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
