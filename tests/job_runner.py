"""Runs the jobs as users do: a process of its own, its exit status, its last line, its errors."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


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


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a job: this one, without another cluster or data folder."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "DATA_URL")}
    return {**inherited, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", **(extra or {})}


def start_job(script: str, *arguments: str, extra: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a job in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / script), *arguments],
        env=environment(extra),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_job(script: str, *arguments: str, extra: Mapping[str, str] | None = None, timeout_s: float = 240) -> Finished:
    """Run a job to its end."""
    process = start_job(script, *arguments, extra=extra)
    output, errors = process.communicate(timeout=timeout_s)
    return Finished(process.returncode, output, errors)
