"""conv-facenet: photos become aligned faces, aligned faces become a verified embedding model."""

import getpass
import os
import sys
import tempfile

__version__ = "0.1.0"

# Every job, worker and notebook comes through here before it imports what would report to its vendor. These packages
# read their switch at their import, and a child inherits the environment.
os.environ.update(RAY_USAGE_STATS_ENABLED="0", ORT_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_TELEMETRY="1")
os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", WANDB_ERROR_REPORTING="false")
# Ray would say once what differs in numbers alone, such as the names of photos. See lib/terminal.py.
os.environ.setdefault("RAY_DEDUP_LOGS_ALLOW_REGEX", r"conv-facenet\|")
# OpenVINO knows no switch but a file in the user's home. Without this package it takes a stub that sends nothing.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
# timm imports it where it is installed, and that makes folders in TMPDIR. `--track wandb` takes the lock away.
sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]

# Ray and torch ask for a home and a name when they are imported. The user id of a container often has neither.
if os.path.expanduser("~") == "~":  # noqa: PTH111 - pathlib raises
    os.environ["HOME"] = tempfile.gettempdir()
try:
    getpass.getuser()
except (KeyError, OSError):
    os.environ["USER"] = str(os.getuid())
