"""The cluster of a local run: nothing of it can be reached from outside, nothing is reported, and its death is told."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.job_runner import ROOT, environment

pytestmark = pytest.mark.timeout(300)

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@dataclass(frozen=True)
class Watched:
    """What a run of five jobs showed of itself, and the folders it was given."""

    seen: dict[str, Any]
    home: Path
    current: Path
    temporary: Path


@pytest.fixture(scope="module")
def watched(sample_data: Path) -> Iterator[Watched]:
    """Preprocess, train, embed, evaluate and export in namespaces of their own, from an empty home and folder."""
    unshare = ["unshare", "--net", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
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


def test_no_job_looks_a_name_up(watched: Watched) -> None:
    assert watched.seen["lookups"] == [], watched.seen


def test_no_job_leaves_a_file_where_it_was_not_told_to(watched: Watched) -> None:
    assert {path.parent for path in watched.home.rglob("*") if path.is_file()} <= {
        watched.home / ".cache" / "matplotlib"
    }
    assert list(watched.current.iterdir()) == []
    known = ("conv-facenet", "torchinductor")
    assert [path for path in watched.temporary.iterdir() if not path.name.startswith(known)] == []


def test_a_local_run_can_be_reached_from_this_machine_alone(watched: Watched) -> None:
    assert watched.seen["listens_on"]
    assert set(watched.seen["listens_on"]) <= LOOPBACK


def test_a_local_run_has_a_token_and_a_folder_of_its_own(watched: Watched) -> None:
    assert watched.seen["folder_mode"] == "0o700"
    assert watched.seen["token_is_ours"]
    assert not (watched.home / ".ray").exists()
