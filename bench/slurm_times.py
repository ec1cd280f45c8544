"""What the launchers cost on Slurm, and what a second node gives; root alone can run it.

    python -m bench.slurm_times

Starts the Slurm cluster of the tests: two hosts, each kept to a core of its own. Three rounds: preprocess on one node
and on two, one CPU each; training on two nodes from its submission to the first step, and from SIGUSR1 to the queue and
to the next step. Prints one line of JSON with all rounds.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.inputs import bench_data, drawn
from lib.training import checkpoints
from tests.slurm.slurm_cluster import SlurmCluster, why_impossible

ONE_CPU = ("--cpus-per-task=1", "--mem-per-cpu=4G")


def pin(cluster: SlurmCluster, host: int) -> None:
    """Keep a host, and all that will run on it, to one core."""
    pid = (cluster.folder / "pid" / f"node{host}.pid").read_text().strip()
    for each in [pid, *cluster.host_pids(f"node{host}")]:
        subprocess.run(
            ["taskset", "-cp", str((host - 1) % (os.cpu_count() or 1)), str(each)], check=True, capture_output=True
        )


def result(cluster: SlurmCluster, job: int) -> dict[str, Any]:
    """Return what the last line of a job says."""
    ended = cluster.wait(job, timeout_s=1200)
    if ended["JobState"] != "COMPLETED":
        raise RuntimeError(f"job {job} is {ended['JobState']}:\n{cluster.log(job)}")
    return json.loads(cluster.log(job).splitlines()[-1])


def preprocess_rate(cluster: SlurmCluster, data: Path, faces: Path, num_nodes: int) -> float:
    """Return the photos/s from the first worker's first photo on."""
    flags = ["--data", str(data), "--faces", str(faces)]
    job = cluster.submit(f"--nodes={num_nodes}", *ONE_CPU, "slurm/preprocess.sh", *flags)
    return float(result(cluster, job)["photos_per_s"])


def until(is_so: Callable[[], bool]) -> float:
    """Wait until something is so, and return the seconds it took."""
    began = time.perf_counter()
    while not is_so():
        if time.perf_counter() - began > 600:
            raise TimeoutError("it never came to that")
        time.sleep(0.02)
    return time.perf_counter() - began


def training_times(cluster: SlurmCluster, data: Path, faces: Path) -> dict[str, float]:
    """Train on two nodes, ask the job to leave once, and return the seconds of each wait."""
    flags = ["--data", str(data), "--faces", str(faces), "--backbone", "test_convnext", "--init", "none"]
    flags += [
        "--image-size",
        "112",
        "--epochs",
        "1000",
        "--triplets-per-epoch",
        "4000",
        "--checkpoint-minutes",
        "0.0001",
    ]
    job = cluster.submit("--nodes=2", *ONE_CPU, "slurm/train.sh", *flags)

    def step() -> int:
        progress = checkpoints.newest_progress(str(data / "runs" / "default"))
        return progress.step if progress else 0

    first_step_s = until(lambda: step() > 0)
    time.sleep(5)
    cluster.login("scancel", "--batch", "--signal=USR1", str(job))
    requeued_s = until(lambda: cluster.job(job)["Restarts"] == "1")
    left_at = step()
    running_s = until(lambda: cluster.job(job)["JobState"] == "RUNNING")
    training_s = until(lambda: step() > left_at)
    cluster.login("scancel", str(job))
    cluster.wait(job)
    return {
        "submit_to_first_step_s": first_step_s,
        "usr1_to_requeued_s": requeued_s,
        "requeued_to_running_s": running_s,
        "running_to_training_s": training_s,
        "usr1_to_training_s": requeued_s + running_s + training_s,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photos", type=int, default=4000, help="drawn photos, where $BENCH_DATA has no celeba/")
    options = parser.parse_args()
    if problem := why_impossible():
        raise SystemExit(f"error: {problem}")
    cluster = SlurmCluster(num_hosts=2)
    try:
        for host in (1, 2):
            pin(cluster, host)
        real = bench_data()
        data = real / "celeba" if real else drawn(cluster.folder / "data", options.photos // 10, 10)
        rounds = []
        for number in range(options.rounds):
            faces = [cluster.folder / f"faces-{number}-{num_nodes}" for num_nodes in (1, 2)]
            rates = [preprocess_rate(cluster, data, folder, nodes) for nodes, folder in enumerate(faces, start=1)]
            times = training_times(cluster, cluster.folder / f"run-{number}", faces[1])
            rates_by_name = {"photos_per_s_1": rates[0], "photos_per_s_2": rates[1], "gain": rates[1] / rates[0]}
            rounds.append(rates_by_name | times)
            print({name: round(value, 2) for name, value in rounds[-1].items()}, flush=True)
        waited = re.search(r"cred_expire=(\d+)", (cluster.folder / "slurm.conf").read_text())
        medians = {name: round(statistics.median(each[name] for each in rounds), 2) for name in rounds[0]}
        print(json.dumps({**medians, "slurm_waits_s": int(waited[1]) if waited else 120, "rounds": rounds}))
    finally:
        cluster.close()


if __name__ == "__main__":
    main()
