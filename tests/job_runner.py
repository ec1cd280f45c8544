"""Runs the jobs as users do: a process of its own, its exit status, its last line, its errors, and Ray clusters."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(sys.executable).parent


@dataclass(frozen=True)
class Finished:
    """What a job left behind."""

    status: int
    output: str
    errors: str

    @property
    def result(self) -> dict[str, Any]:
        """The one line of JSON that ends standard output."""
        return json.loads(self.output.splitlines()[-1])

    @property
    def last_error(self) -> str:
        """The last line of standard error."""
        return self.errors.strip().splitlines()[-1]


@dataclass(frozen=True)
class RayHead:
    """A Ray cluster of one node.

    Attributes:
        environment: what makes a job use it.
        folder: where its files lie.
        session: its processes are those of this session.
    """

    environment: dict[str, str]
    folder: Path
    session: int


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a job: this one, without another cluster or data folder."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "DATA_URL")}
    path = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
    return {**inherited, "PATH": path, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", **(extra or {})}


def start_job(script: str, *arguments: str, extra: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a job in a session, and so a process group, of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / script), *arguments],
        env=environment(extra),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 240) -> Finished:
    """Wait for the end of a job; whatever of it still runs after the time limit is killed."""
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_session(process.pid)
        output, errors = process.communicate()
        raise TimeoutError(f"the job hangs:\n{output}\n{errors}") from None
    return Finished(process.returncode, output, errors)


def run_job(script: str, *arguments: str, extra: Mapping[str, str] | None = None, timeout_s: float = 240) -> Finished:
    """Run a job to its end."""
    return finish(start_job(script, *arguments, extra=extra), timeout_s)


@contextmanager
def ray_head(
    *,
    num_cpus: int,
    dashboard: bool = False,
    extra: Mapping[str, str] | None = None,
    grows_by: Mapping[str, Any] | None = None,
) -> Iterator[RayHead]:
    """Run a Ray cluster of its own, on free ports, for the duration; with a dashboard jobs can be submitted to it.

    A submitted job needs the cluster's token; `environment` of the result holds it. `grows_by` names the kinds of nodes,
    processes of this machine, that Ray's autoscaler starts on demand: their resources and max_workers.
    """
    gcs_port, dashboard_port, agent_port, client_port = free_ports(4)
    cluster_environment = {"RAY_ADDRESS": f"127.0.0.1:{gcs_port}", **(extra or {})}
    if dashboard:
        cluster_environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        cluster_environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard_port}"
    # Not pytest's own folder: its name is too long for the address of a socket.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        without_address = environment(cluster_environment)
        del without_address["RAY_ADDRESS"]
        autoscaling = []
        if grows_by is not None:
            (folder / "autoscaler.yaml").write_text(json.dumps(_autoscaler_config(grows_by)))
            autoscaling = [f"--autoscaling-config={folder / 'autoscaler.yaml'}"]
            without_address |= {"RAY_enable_autoscaler_v2": "1", "RAY_FAKE_CLUSTER": "1"}
            without_address |= {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID}
            without_address["RAY_OVERRIDE_NODE_ID_FOR_TESTING"] = FAKE_HEAD_NODE_ID
        with (folder / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                [
                    *(SCRIPTS / "ray", "start", "--head", "--block", "--disable-usage-stats", f"--num-cpus={num_cpus}"),
                    *("--node-ip-address=127.0.0.1", f"--port={gcs_port}", f"--ray-client-server-port={client_port}"),
                    *(f"--include-dashboard={dashboard}", f"--dashboard-port={dashboard_port}"),
                    *(f"--dashboard-agent-listen-port={agent_port}", f"--temp-dir={folder}", *autoscaling),
                ],
                env=without_address,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            wait_until(lambda: "Ray runtime started" in (folder / "log.txt").read_text(), process)
            yield RayHead(cluster_environment, folder, process.pid)
        finally:
            kill_session(process.pid)
            process.wait()


def _autoscaler_config(kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of Ray's own provider of nodes for tests."""
    steps = ("setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray", "initialization")
    return {
        "cluster_name": "growing",
        "max_workers": 8,
        # By its name: as a type of its own it would want a file that Ray's wheel does not hold.
        "provider": {
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.FakeMultiNodeProvider",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            **{name: {"node_config": {}, "min_workers": 0, **kind} for name, kind in kinds.items()},
        },
        "head_node_type": "ray.head.default",
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 1,
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{step}_commands": [] for step in steps},
    }


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Mount a small disk of its own."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[Any] | None = None, timeout_s: float = 120) -> None:
    """Wait until something is so; meanwhile `process` has to run."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it never came to that"
        assert process is None or process.poll() is None, "the process ended before"
        time.sleep(0.005)


def kill_session(session: int) -> None:
    """Kill every process of a session, until none is left."""
    while pids := session_processes(session):
        for pid in pids:
            _kill(pid)
        time.sleep(0.01)


def session_processes(session: int) -> dict[int, str]:
    """Return the processes of a session that run, with their command lines."""
    return {pid: command for pid, (_, of_session, command) in _processes().items() if of_session == session}


def children(parent: int) -> dict[int, str]:
    """Return the processes that run as children of another, with their command lines."""
    return {pid: command for pid, (of_parent, _, command) in _processes().items() if of_parent == parent}


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _processes() -> dict[int, tuple[int, int, str]]:
    """Return parent, session and command line of each process that is not dead."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, _, session, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            found[int(folder.name)] = (int(parent), int(session), command)
    return found
