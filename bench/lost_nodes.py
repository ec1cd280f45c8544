"""Preprocess on a Ray cluster of 16 nodes that loses two of them: does each photo get its row, once?

    python -m bench.lost_nodes --nodes 16 --parts 4000

All nodes are processes of this machine, each with its own raylet and one logical CPU. The photos are names in a list,
as in `bench/scale_soak.py`. When a third, and when two thirds of the parts are made, all processes of a node are killed
(SIGKILL). The job must go on with the others, without being started again. Prints one line of JSON last.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.inputs import ROOT, job_environment
from bench.scale_soak import count_parts, job_of, times_seen
from tests.job_runner import kill_session, ray_head, ray_node

PHOTOS_A_PART = 1000
LOST = (1 / 3, 2 / 3)
EVERY_S = 1.0


def lose_nodes(folder: Path, num_nodes: int, num_photos: int) -> dict[str, Any]:
    """Run the job on a cluster of so many nodes, lose two of them, and return what came of it."""
    command, faces = job_of(folder, num_photos)
    said = folder / "log.txt"
    with ExitStack() as stack:
        head = stack.enter_context(ray_head(num_cpus=1))
        nodes = [stack.enter_context(ray_node(head, num_cpus=1)) for _ in range(num_nodes - 1)]
        started = time.monotonic()
        lost_at: list[int] = []
        with said.open("w") as errors:
            environment = {**job_environment(), **head.environment}
            job = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
        num_parts = num_photos / PHOTOS_A_PART  # at least: how many there are is planned by the job
        while job.poll() is None:
            if len(lost_at) < len(LOST) and count_parts(faces) > LOST[len(lost_at)] * num_parts:
                kill_session(nodes.pop())
                lost_at.append(round(time.monotonic() - started))
            time.sleep(EVERY_S)
        seconds = time.monotonic() - started
    assert job.returncode == 0, said.read_text(errors="replace")[-2000:]
    by_node = next(line for line in reversed(said.read_text().splitlines()) if "by node" in line)
    seen = times_seen(faces, num_photos)
    success = json.loads((faces / "_SUCCESS").read_text())
    return {
        "nodes": num_nodes,
        "photos": num_photos,
        "parts": len(success["parts"]),
        "lost_at_seconds": lost_at,
        "seconds": round(seconds),
        "photos_with_one_row": int((seen == 1).sum()),
        "said": by_node[-200:],
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--parts", type=int, default=4000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lost nodes ", ignore_cleanup_errors=True) as folder:
        figures = lose_nodes(Path(folder), given.nodes, given.parts * PHOTOS_A_PART)
    print(json.dumps({"bench": "lost_nodes", **figures}))
    sys.exit(figures["photos_with_one_row"] != figures["photos"])


if __name__ == "__main__":
    main()
