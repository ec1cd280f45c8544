"""Preprocess from a list of 20 million photos to `_SUCCESS`, killed twice: what do its processes hold over time?

    python -m bench.scale_soak --photos 20e6 --picture soak.png

The photos are names in a list, and no file is there, so every photo gets its row with the status `missing`. All of the
job runs as it is, only the decoding and the detection of faces have nothing to do. Two kills (SIGKILL) end all
processes of the job: one in the middle of the planning, one when half of the parts are made. The same command goes on.
In the end each photo must have exactly one row. The picture shows the memory (PSS, so that shared pages count once) by
kind of process. Prints one line of JSON last.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bench.inputs import ROOT, job_command, job_environment
from bench.planning import name_of
from lib import storage
from lib.faces import table
from tests.job_runner import kill_session, session_processes

EVERY_S = 2.0
ROWS_AT_ONCE = 500_000
KINDS = {
    "driver": "jobs/preprocess.py",
    "head service": "gcs_server ",
    "raylet": "/raylet/raylet ",
    "worker": "ray::Map",
}
"""What the command lines of processes hold. The object store is part of the raylet."""


@dataclass
class Watch:
    """Memory of the processes of a job, over time.

    Attributes:
        seconds: since the start of the soak, a sample each.
        megabytes: the largest process of each kind, a sample each.
        kills: at which second.
    """

    started: float = field(default_factory=time.monotonic)
    seconds: list[float] = field(default_factory=list)
    megabytes: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    kills: list[float] = field(default_factory=list)

    def sample(self, session: int) -> None:
        """Add a sample of the processes of this session."""
        largest = dict.fromkeys([*KINDS, "others"], 0.0)
        for pid, command in session_processes(session).items():
            kind = next((kind for kind, part in KINDS.items() if part in command), "others")
            largest[kind] = max(largest[kind], megabytes_of(pid))
        self.seconds.append(time.monotonic() - self.started)
        for kind, most in largest.items():
            self.megabytes[kind].append(most)

    def draw(self, path: Path) -> None:
        """Write the picture."""
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
        for kind, most in self.megabytes.items():
            axes.plot(np.array(self.seconds) / 60, most, label=f"largest {kind}" if kind == "worker" else kind)
        for at in self.kills:
            axes.axvline(at / 60, color="black", linestyle=":", label="killed" if at == self.kills[0] else None)
        axes.set(xlabel="minutes", ylabel="memory, MB", ylim=(0, None))
        axes.legend(loc="upper left", ncols=2)
        figure.savefig(path, dpi=110)


def megabytes_of(pid: int) -> float:
    """Return the proportional share of memory of a process, 0 if it has ended."""
    try:
        found = re.search(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0.0
    return int(found[1]) / 1000 if found else 0.0


def job_of(folder: Path, num: int) -> tuple[list[str], Path]:
    """Write a list of so many photos, none of which is there; return the command of the job, and its faces."""
    photos, faces, listed = folder / "photos", folder / "faces", folder / "photos.parquet"
    photos.mkdir()
    (photos / "about.txt").write_text("An empty folder would count as gone.")
    _write_list(listed, num)
    flags = ["--photos", str(photos), "--photo-list", str(listed), "--faces", str(faces), "--data", str(folder)]
    return job_command("preprocess.py", *flags), faces


def _write_list(path: Path, num: int) -> None:
    schema = pa.schema([("photo", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num, ROWS_AT_ONCE):
            names = [name_of(number, num) for number in range(start, min(start + ROWS_AT_ONCE, num))]
            writer.write_table(pa.table([names], schema=schema))


def run(command: list[str], watch: Watch, log: Path, is_time: Callable[[float], bool]) -> int | None:
    """Run the job and return its status; None if it was killed, because it was time so many seconds after its start."""
    with log.open("w") as errors:
        job = subprocess.Popen(
            command, env=job_environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
        )
    started = time.monotonic()
    while job.poll() is None:
        watch.sample(job.pid)
        if is_time(time.monotonic() - started):
            kill_session(job.pid)
            job.wait()
            watch.kills.append(time.monotonic() - watch.started)
            return None
        time.sleep(EVERY_S)
    return job.returncode


def count_parts(faces: Path) -> int:
    """Return the number of finished parts."""
    return sum(1 for _ in faces.glob("split=*/part-*.parquet"))


def times_seen(faces: Path, num: int) -> np.ndarray:
    """Return how many rows each photo has."""
    seen = np.zeros(num, np.uint8)
    for name in table.read_success(str(faces))["parts"]:
        photos = storage.read_parquet(str(faces / name), table.columns("photo"))["photo"]
        numbers = pc.extract_regex(photos, r"photo_(?P<number>\d+)\.jpg$")
        np.add.at(seen, pc.struct_field(numbers.combine_chunks(), "number").cast(pa.int64()).to_numpy(), 1)
    return seen


def soak(num: int, folder: Path, watch: Watch) -> dict[str, Any]:
    """Run the job, kill it twice, and return what came of it."""
    command, faces = job_of(folder, num)
    started = time.monotonic()
    planned = subprocess.run(
        [*command, "--dry-run"], env=job_environment(), cwd=ROOT, check=True, stdout=subprocess.PIPE
    )
    planning_s = time.monotonic() - started
    num_parts = json.loads(planned.stdout.splitlines()[-1])["parts"]
    kills: list[Callable[[float], bool]] = [
        lambda seconds: seconds > planning_s / 2,
        lambda _: count_parts(faces) >= num_parts / 2,
        lambda _: False,
    ]
    watch.started = time.monotonic()
    statuses = [run(command, watch, folder / f"log {number}.txt", is_time) for number, is_time in enumerate(kills)]
    seconds = time.monotonic() - watch.started
    last = (folder / f"log {len(statuses) - 1}.txt").read_text(errors="replace")
    assert statuses == [None, None, 0], f"{statuses}: {last[-2000:]}"
    seen = times_seen(faces, num)
    return {
        "photos": num,
        "parts": num_parts,
        "planning_s": round(planning_s),
        "minutes": round(seconds / 60, 1),
        "killed_at_minutes": [round(at / 60, 1) for at in watch.kills],
        "photos_with_one_row": int((seen == 1).sum()),
        "most_mb": {kind: round(max(most)) for kind, most in watch.megabytes.items()},
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=float, default=200_000)
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    watch = Watch()
    with tempfile.TemporaryDirectory(prefix="scale soak ", ignore_cleanup_errors=True) as folder:
        figures = soak(int(given.photos), Path(folder), watch)
    if given.picture:
        watch.draw(given.picture)
    print(json.dumps({"bench": "scale_soak", **figures}))
    sys.exit(figures["photos_with_one_row"] != figures["photos"])


if __name__ == "__main__":
    main()
