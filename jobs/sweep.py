#!/usr/bin/env python3
"""Train every combination of settings and compare them. The same command continues after an interruption."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package called lib

from lib.imports import quick_imports

with quick_imports():
    from lib.config import run_job
    from lib.tuning.sweep_job import SweepConfig, sweep

if __name__ == "__main__":
    run_job(SweepConfig, sweep, description=__doc__ or "", look_at="{report}")
