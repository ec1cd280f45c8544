"""The cluster of a local run: nothing of it can be reached from outside, nothing is reported, and its death is told."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lib import local_ray, remote_ray
from lib.errors import UserError
from tests.job_runner import ROOT, environment, run_here

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@dataclass(frozen=True)
class Watched:
    """What a run of five jobs showed of itself, and the folders it was given."""

    seen: dict[str, Any]
    home: Path
    current: Path
    temporary: Path


def _unshare(*options: str) -> list[str]:
    """Return what stands before a command so that it runs in namespaces of its own."""
    if subprocess.run(["unshare", *options, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces of one's own may be made here")
    return ["unshare", *options]


@pytest.fixture(scope="module")
def watched(sample_data: Path) -> Iterator[Watched]:
    """Preprocess, train, embed, evaluate and export in namespaces of their own, from an empty home and folder."""
    unshare = _unshare("--net", "--mount", *(["--map-root-user"] if os.geteuid() else []))
    # Not pytest's own folder: its name is too long for the address of a socket.
    with tempfile.TemporaryDirectory(prefix="w-", dir="/tmp") as name:
        folders = [Path(name) / each for each in ("home", "now", "t")]
        for folder in folders:
            folder.mkdir()
        home, current, temporary = folders
        data = Path(name) / "data"
        shutil.copytree(sample_data, data, ignore=shutil.ignore_patterns("faces", "runs", "embeddings"))
        variables = environment({"HOME": str(home), "TMPDIR": str(temporary), "CI": ""})
        for variable in ("RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"):
            variables.pop(variable, None)
        done = subprocess.run(
            [*unshare, sys.executable, ROOT / "tests" / "watched_run.py", data, name],
            env=variables,
            cwd=current,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert (data / "runs" / "default" / "model.onnx").exists()
        yield Watched(json.loads(done.stdout.splitlines()[-1]), home, current, temporary)


@pytest.mark.slow
def test_no_job_looks_a_name_up(watched: Watched) -> None:
    assert watched.seen["lookups"] == [], watched.seen


@pytest.mark.slow
def test_no_job_leaves_a_file_where_it_was_not_told_to(watched: Watched) -> None:
    kept_at_home = {path.parent for path in watched.home.rglob("*") if path.is_file()}
    assert kept_at_home <= {watched.home / ".cache" / "matplotlib"}
    assert list(watched.current.iterdir()) == []
    known = ("conv-facenet", "torchinductor")
    assert [path for path in watched.temporary.iterdir() if not path.name.startswith(known)] == []


@pytest.mark.slow
def test_a_local_run_can_be_reached_from_this_machine_alone(watched: Watched) -> None:
    assert watched.seen["listens_on"]
    assert set(watched.seen["listens_on"]) <= LOOPBACK


@pytest.mark.slow
def test_a_local_run_has_a_token_and_a_folder_of_its_own(watched: Watched) -> None:
    assert watched.seen["folder_mode"] == "0o700"
    assert watched.seen["token_is_ours"]
    assert not (watched.home / ".ray").exists()


@pytest.fixture
def short() -> Iterator[Path]:
    """Return a folder whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as name:
        yield Path(name)


def test_the_folder_of_a_run_is_private_and_goes_with_it(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(short))
    with local_ray.private_folder() as folder:
        assert folder.parent == short
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "log").write_text("of Ray")
    assert list(short.iterdir()) == []


def test_what_a_killed_run_left_is_removed_and_what_a_running_one_has_stays(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(short))
    killed, others = short / "cf-ray-killed", short / "mine"
    others.mkdir()
    (others / "cf-ray-link").symlink_to(others)
    (killed / "logs").mkdir(parents=True)
    (short / "cf-ray-link").symlink_to(others)
    with local_ray.private_folder() as running:
        for folder in (killed, running):
            os.utime(folder, (0, 0))
        with local_ray.private_folder():
            assert not killed.exists()
            assert running.exists()
    assert sorted(path.name for path in short.iterdir()) == ["cf-ray-link", "mine"]
    assert (others / "cf-ray-link").is_symlink()


def test_a_folder_with_too_long_a_path_gives_way_to_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("long" * 20)))
    with local_ray.private_folder() as folder:
        assert folder.parent == Path("/tmp")


@pytest.mark.parametrize("name", ["/" + "long" * 20, "relative", "/proc/nothing"])
def test_a_folder_that_ray_cannot_use_is_refused_by_the_name_of_its_variable(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", name)
    with pytest.raises(UserError, match=r"RAY_TMPDIR .*path of up to \d+ bytes"), local_ray.private_folder():
        pass


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("head", "no HOST:PORT"),
        ("head:port", "no HOST:PORT"),
        ("head:70000", "no HOST:PORT"),
        (":6379", "no HOST:PORT"),
        ("http://127.0.0.1:1", "no host"),
        ("no-such-host.invalid:6379", "no host 'no-such-host.invalid' is known"),
        ("127.0.0.1:1", "Connection refused"),
        ("a..b:1", "no name of a host"),
    ],
)
def test_an_address_without_a_cluster_is_refused_by_its_reason(address: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"RAY_ADDRESS is '{address}'.*{reason}"):
        remote_ray.check_head_listens(address)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://127.0.0.1:1", "nonsense"])
def test_a_job_whose_cluster_does_not_answer_says_so_in_one_line(
    address: str, sample_data: Path, tmp_path: Path
) -> None:
    flags = ["--data", str(sample_data), "--faces", str(tmp_path / "faces")]
    refused = run_here("preprocess.py", *flags, extra={"RAY_ADDRESS": address})
    assert refused.status == 2
    assert f"RAY_ADDRESS is '{address}'" in refused.last_error
    assert "Traceback" not in refused.errors


@pytest.mark.parametrize("answer", [b"HTTP/1.0 400 Bad Request\r\n\r\n", b"SSH-2.0-server\r\n", b""])
def test_another_server_than_ray_is_told_from_a_head(answer: bytes) -> None:
    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(64)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        with pytest.raises(UserError, match="another server than a Ray head listens there"):
            remote_ray.check_head_listens(f"127.0.0.1:{listener.getsockname()[1]}")
        thread.join()


def test_a_user_without_a_home_and_a_name_is_given_both() -> None:
    nameless = _unshare("--user", "--map-user=54321", "--map-group=54321")
    code = "import lib, getpass, pathlib; print(getpass.getuser(), pathlib.Path('~').expanduser().is_dir())"
    variables = {name: value for name, value in environment().items() if name not in ("HOME", "USER", "LOGNAME")}
    done = subprocess.run(
        [*nameless, sys.executable, "-c", code], env=variables, cwd="/", capture_output=True, text=True, check=False
    )
    assert done.stdout == "54321 True\n", done.stderr


def test_a_job_takes_its_own_lib_before_another_package_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "__init__.py").write_text("raise ImportError('the wrong one')")
    for job in sorted((ROOT / "jobs").glob("*.py")):
        lines = job.read_text().splitlines()
        first = next(index for index, line in enumerate(lines) if line.startswith("from lib"))
        assert "sys.path.insert" in "".join(lines[:first]), job
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / "sample.py", "--help"],
        env=environment({"PYTHONPATH": str(tmp_path)}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
