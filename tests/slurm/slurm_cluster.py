"""A real Slurm cluster for the tests, and what they ask of it: jobs submitted as users do, states, processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.job_runner import ROOT, copy_project

PROGRAMS = ("slurmctld", "slurmd", "munged", "ip", "nsenter", "ch-run")
PACKAGES = ("slurm-wlm", "munge", "iproute2", "charliecloud-runtime")
OF_HOST = ("unshare", "slurmd")
"""Processes that a host has while no job is on it."""


class SlurmCluster:
    """Hosts node1, node2, …, each with a network, processes, /tmp and /dev/shm of its own; see cluster.sh.

    Attributes:
        folder: shared by all hosts, as is everything but /tmp.
        project: a copy of the project, from which jobs are submitted; its path has spaces and a quote.
    """

    def __init__(self, num_hosts: int) -> None:
        # Not below /tmp, which each host has for itself.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/var/tmp"))
        self.project = self.folder / "it's the project é"
        copy_project(self.project)
        (self.project / ".venv").symlink_to(Path(sys.prefix))
        self._script("up", str(num_hosts))

    def close(self) -> None:
        """End everything, and remove the folder."""
        self._script("down")
        shutil.rmtree(self.folder, ignore_errors=True)

    def login(self, *command: str, extra: Mapping[str, str] | None = None) -> str:
        """Run a command on the login host, in the project's folder, and return what it prints."""
        done = subprocess.run(
            [self.folder / "login", *command],
            cwd=self.project,
            env=user_environment() | dict(extra or {}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, *arguments: str, extra: Mapping[str, str] | None = None) -> int:
        """Run sbatch and return the id of the job."""
        return int(self.login("sbatch", "--parsable", *arguments, extra=extra))

    def job(self, job_id: int) -> dict[str, str]:
        """Return what Slurm says of a job."""
        text = self.login("scontrol", "show", "job", str(job_id))
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def log(self, job_id: int) -> str:
        """Return what a job has printed so far."""
        return "".join(path.read_text() for path in (self.project / "logs").glob(f"*-{job_id}.out"))

    def wait(self, job_id: int, timeout_s: float = 400) -> dict[str, str]:
        """Wait for the end of a job, and return what Slurm says of it then."""
        self.wait_until(lambda: self._has_ended(job_id), job_id, timeout_s)
        return self.job(job_id)

    def wait_for_line(self, job_id: int, pattern: str, timeout_s: float = 400) -> None:
        """Wait until a job's log holds a match of the pattern."""
        self.wait_until(lambda: re.search(pattern, self.log(job_id)) is not None, job_id, timeout_s)

    def wait_until(self, is_so: Callable[[], bool], job_id: int, timeout_s: float) -> None:
        """Wait until something is so; where it never comes to that, the job's log is told."""
        deadline = time.monotonic() + timeout_s
        while not is_so():
            is_over = time.monotonic() > deadline or (self._has_ended(job_id) and not is_so())
            assert not is_over, f"it never came to that:\n{self.job(job_id)}\n{self.log(job_id)}"
            time.sleep(0.3)

    def _has_ended(self, job_id: int) -> bool:
        return self.job(job_id)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

    def processes(self, host: str) -> list[str]:
        """Return the names of the processes on a host that do not belong to the host itself."""
        pids = self.host_pids(host)
        names = [Path(f"/proc/{pid}/comm") for pid in pids]
        found = []
        for path in names:
            with suppress(OSError):  # the process has ended meanwhile
                found.append(path.read_text().strip())
        return [name for name in found if name not in OF_HOST]

    def files_in_tmp(self, host: str) -> list[str]:
        """Return what lies in the host's own /tmp, but for the copies of crops that one user can read."""
        found = Path(f"/proc/{self.host_pids(host)[-1]}/root/tmp").iterdir()
        return [path.name for path in found if not self._holds_copies(path)]

    @staticmethod
    def _holds_copies(folder: Path) -> bool:
        """Return whether a folder is private and holds copies of crops alone, all of them whole."""
        if not re.fullmatch(r"conv-facenet-\d+", folder.name) or folder.stat().st_mode & 0o777 != 0o700:
            return False
        return all(re.fullmatch(r"faces-.*\.(arrow|lock)", path.name) for path in folder.rglob("*"))

    def cut_power(self, host: str) -> None:
        """Kill slurmd and everything else on a host at once."""
        os.kill(int((self.folder / "pid" / f"{host}.pid").read_text()), signal.SIGKILL)

    def boot(self, host: str) -> None:
        """Start a host again."""
        self._script("host", host.removeprefix("node"))

    def on_network(self, host: str, *command: str) -> None:
        """Run a command of `ip` in the network of a host."""
        subprocess.run(["ip", "-n", self._network(host), *command], check=True)

    def _network(self, host: str) -> str:
        names = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout.split()
        prefix = re.search(r"netns/(slurm-\w+)-login", (self.folder / "login").read_text())
        assert prefix is not None
        name = f"{prefix[1]}-{host}"
        assert name in names
        return name

    def host_pids(self, host: str) -> list[int]:
        """Return the ids of all processes on a host, by this machine's numbers."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self._network(host)], check=True, capture_output=True, text=True
        )
        return sorted(map(int, listed.stdout.split()))

    def _script(self, command: str, *arguments: str) -> None:
        subprocess.run([ROOT / "tests" / "slurm" / "cluster.sh", command, self.folder, *arguments], check=True)


def result(cluster: SlurmCluster, job: int) -> dict[str, Any]:
    """Return what the last line of a job says that has done its work."""
    ended = cluster.wait(job)
    log = cluster.log(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), log
    return json.loads(log.splitlines()[-1])


def photos_by_node(cluster: SlurmCluster, job: int) -> dict[str, int]:
    """Return how many photos, or faces, each node has done."""
    told = re.search(r"(?:photo|face)s by node: (.*)", cluster.log(job))
    assert told is not None, cluster.log(job)
    return {node: int(number) for node, number in map(str.split, told[1].split(", "))}


def user_environment() -> dict[str, str]:
    """Return the environment of a user on the login host: none of this one's settings for Ray, data or Slurm."""
    foreign = ("RAY_", "SLURM_", "SBATCH_", "DATA_URL", "CONTAINER", "PYTHONPATH", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


def why_impossible() -> str:
    """Return why no Slurm cluster can run here, after an attempt to install it; empty where one can."""
    if os.geteuid() != 0:
        return "only root can make the networks and hosts of a Slurm cluster"
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        if shutil.which("apt-get") is None:
            return f"{', '.join(missing)} are missing: install Slurm, munge, iproute2 and Charliecloud"
        for command in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(["apt-get", *command], capture_output=True, text=True, check=False)
            if done.returncode:
                return f"apt-get {command[0]} fails: {done.stderr.strip()[-500:]}"
    return ""
