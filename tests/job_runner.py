"""Runs the jobs as users do: a process of its own, its exit status, its last line, its errors, and Ray clusters."""

import io
import json
import logging
import os
import random
import runpy
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(sys.executable).parent
JOB_LIMIT_S = 600.0
"""Far longer than any job of the tests takes on a slow machine."""


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


def copy_project(folder: Path) -> None:
    """Copy the project as git knows it."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def start_job(
    script: str, *arguments: str, extra: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.Popen[str]:
    """Start a job in a session, and so a process group, of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / script), *arguments],
        env=environment(extra),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = JOB_LIMIT_S) -> Finished:
    """Wait for the end of a job; whatever of it still runs after the time limit is killed."""
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        # The job prints the stack of its main thread, and the last lines of Ray.
        process.send_signal(signal.SIGABRT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        kill_session(process.pid)
        output, errors = process.communicate()
        raise TimeoutError(f"the job hangs:\n{output}\n{errors}") from None
    return Finished(process.returncode, output, errors)


def run_job(
    script: str,
    *arguments: str,
    extra: Mapping[str, str] | None = None,
    timeout_s: float = JOB_LIMIT_S,
    cwd: Path = ROOT,
) -> Finished:
    """Run a job to its end."""
    return finish(start_job(script, *arguments, extra=extra, cwd=cwd), timeout_s)


def run_here(script: str, *arguments: str, extra: Mapping[str, str] | None = None) -> Finished:
    """Run a job that ends before it needs Ray in this process: its file and its exit, without starting Python anew."""
    output, errors, status = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.dict(os.environ, environment(extra), clear=True),
        mock.patch.object(sys, "argv", [script, *arguments]),
        # The job's log goes to this call's output, not to where an earlier call has sent it.
        mock.patch.object(logging.getLogger(), "handlers", []),
        redirect_stdout(output),
        redirect_stderr(errors),
    ):
        level = logging.getLogger().level
        try:
            runpy.run_path(str(ROOT / "jobs" / script), run_name="__main__")
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            logging.getLogger().setLevel(level)
    return Finished(status, output.getvalue(), errors.getvalue())


@contextmanager
def ray_head(*, num_cpus: int, dashboard: bool = False, extra: Mapping[str, str] | None = None) -> Iterator[RayHead]:
    """Run a Ray cluster of its own, on free ports, for the duration; with a dashboard jobs can be submitted to it.

    A submitted job needs the cluster's token; `environment` of the result holds it. Ray gives its start 30 s, which a
    machine under load may not keep: it is tried three times.
    """
    with ExitStack() as stack:
        for tries_left in (2, 1, 0):
            try:
                head = stack.enter_context(_started_head(num_cpus, dashboard, extra))
                break
            except AssertionError:
                if not tries_left:
                    raise
        yield head


@contextmanager
def _started_head(num_cpus: int, dashboard: bool, extra: Mapping[str, str] | None) -> Iterator[RayHead]:
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
        with (folder / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                [
                    *_ray_start(folder),
                    *("--head", "--block", "--disable-usage-stats", f"--num-cpus={num_cpus}"),
                    *("--node-ip-address=127.0.0.1", f"--port={gcs_port}", f"--ray-client-server-port={client_port}"),
                    *(f"--include-dashboard={dashboard}", f"--dashboard-port={dashboard_port}"),
                    *(f"--dashboard-agent-listen-port={agent_port}", f"--temp-dir={folder}"),
                ],
                env=without_address,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            try:
                wait_until(lambda: "Ray runtime started" in (folder / "log.txt").read_text(), process)
            except AssertionError as error:
                raise AssertionError((folder / "log.txt").read_text()) from error
            yield RayHead(cluster_environment, folder, process.pid)
        finally:
            kill_session(process.pid)
            process.wait()


def _ray_start(folder: Path) -> list[str]:
    """Return the command that starts a node, by way of a link: Ray hands the path of Python to a shell as it is."""
    link = folder / "venv"
    if not link.is_symlink():
        link.symlink_to(SCRIPTS.parent)
    return [str(link / "bin" / "python"), "-m", "ray.scripts.scripts", "start"]


@contextmanager
def connected(head: RayHead) -> Iterator[RayHead]:
    """Connect this process to a cluster: what jobs call runs there, without the start of a process for each."""
    import ray

    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(address=head.environment["RAY_ADDRESS"], log_to_driver=False)
    try:
        yield head
    finally:
        ray.shutdown()


@contextmanager
def ray_node(head: RayHead, *, num_cpus: int) -> Iterator[int]:
    """Let another node, processes of this machine, join a cluster for the duration; yield their session."""
    (agent_port,) = free_ports(1)
    said = head.folder / f"node {agent_port}.txt"
    with said.open("wb") as log:
        process = subprocess.Popen(
            [
                *_ray_start(head.folder),
                *(f"--address={head.environment['RAY_ADDRESS']}", f"--num-cpus={num_cpus}"),
                *("--block", f"--dashboard-agent-listen-port={agent_port}", f"--object-store-memory={200 * 2**20}"),
            ],
            env=environment(head.environment),
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until(lambda: "Ray runtime started" in said.read_text(), process)
        yield process.pid
    finally:
        kill_session(process.pid)
        process.wait()


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


def wait_until(
    is_so: Callable[[], bool], process: subprocess.Popen[Any] | None = None, timeout_s: float = JOB_LIMIT_S
) -> None:
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
    """Return ports that nobody listens on, below those that Linux gives to outgoing connections meanwhile."""
    ports: list[int] = []
    for port in random.sample(range(20_000, 32_000), 1000):
        with socket.socket() as probe:
            if len(ports) < count and probe.connect_ex(("127.0.0.1", port)) != 0:
                ports.append(port)
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
