"""Where the benches take their photos from: `$BENCH_DATA` (celeba/, lfw/ and weights/ in it), or drawn people."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS_NAME = "mobilenet0.25_Final.pth"


def bench_data() -> Path | None:
    """Return the folder of real photos, or None where there is none."""
    folder = os.environ.get("BENCH_DATA")
    return Path(folder) if folder else None


def drawn(folder: Path, identities: int, photos_per_identity: int) -> Path:
    """Return a data folder of drawn people."""
    flags = ["--identities", str(identities), "--photos-per-identity", str(photos_per_identity)]
    run_job("sample.py", "--data", str(folder), *flags)
    return folder


def job_command(script: str, *arguments: str) -> list[str]:
    """Return the command of a job, to run in `ROOT`."""
    return [sys.executable, str(ROOT / "jobs" / script), *arguments]


def job_environment() -> dict[str, str]:
    """Return the environment of a job that no other cluster or data folder gets into."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "DATA_URL")}
    return {**kept, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}


def run_job(script: str, *arguments: str) -> dict[str, Any]:
    """Run a job and return its result; its progress goes to this process's standard error."""
    command = job_command(script, *arguments)
    done = subprocess.run(command, stdout=subprocess.PIPE, env=job_environment(), cwd=ROOT, check=True)
    return json.loads(done.stdout.splitlines()[-1])
