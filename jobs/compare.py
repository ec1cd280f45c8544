#!/usr/bin/env python3
"""Compare runs on one page, even while they train."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package called lib

from lib.imports import quick_imports

with quick_imports():
    from lib.config import run_job
    from lib.tuning.compare_job import CompareConfig, compare

if __name__ == "__main__":
    run_job(CompareConfig, compare, description=__doc__ or "", look_at="{report}")
