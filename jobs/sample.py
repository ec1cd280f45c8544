#!/usr/bin/env python3
"""Draw photos of people who do not exist, with their identities and landmarks, to try everything."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package called lib

from lib.imports import quick_imports

with quick_imports():
    from lib.config import run_job
    from lib.sample.sample_job import SampleConfig, make_sample

if __name__ == "__main__":
    run_job(SampleConfig, make_sample, description=__doc__ or "", look_at="{data}/photos")
