"""Resident memory of the preprocess job's whole process tree, at 2,000 and at 20,000 photos.

Counts each process's proportional share (PSS), so that shared pages count once. Prints one line of JSON last.
"""

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

import cv2

from bench.inputs import drawn, job_command, job_environment

SIZES = (2_000, 20_000)
PHOTO_SIDE = 160


def tree_megabytes(root_pid: int) -> float:
    """Return the PSS of a process and all that descend from it, in megabytes."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    tree, grown = {root_pid}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in tree} - tree
        tree |= more
        grown = bool(more)
    total = 0
    for pid in tree:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1000


def peak_megabytes(data: Path) -> float:
    """Run the job and return the most that its processes held at once."""
    command = job_command("preprocess.py", "--data", str(data))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=job_environment())
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, tree_megabytes(process.pid))
        time.sleep(0.5)
    assert process.returncode == 0, f"the job ended with {process.returncode}"
    return peak


def main() -> None:
    """Measure and print."""
    result: dict[str, object] = {"bench": "preprocess_memory"}
    peaks = []
    with tempfile.TemporaryDirectory() as scratch:
        sources = sorted((drawn(Path(scratch) / "drawn", 20, 10) / "photos").glob("*.jpg"))
        small = []
        for path in sources:
            picture = cv2.imread(str(path))
            if picture is not None:
                shrunk = cv2.resize(picture, (PHOTO_SIDE, PHOTO_SIDE), interpolation=cv2.INTER_AREA)
                small.append(cv2.imencode(".jpg", shrunk)[1].tobytes())
        for size in SIZES:
            photos = Path(scratch) / str(size) / "photos"
            for number in range(size):
                path = photos / f"person {number % (size // 10)}" / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(small[number % len(small)])
            peaks.append(peak_megabytes(photos.parent))
            result[f"peak_mb_{size}"] = round(peaks[-1])
            print(f"{size:6} photos: {peaks[-1]:.0f} MB at most, on {os.cpu_count()} CPUs")
    result["growth_mb"] = round(peaks[-1] - peaks[0])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
