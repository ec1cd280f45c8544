#!/usr/bin/env python3
"""Find wrong labels, split and mixed identities, duplicates and unlabelled people, for review and correction."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package that is called lib

from lib.imports import quick_imports

with quick_imports():
    from lib.config import run_job
    from lib.curation.curate_job import CurateConfig, curate

if __name__ == "__main__":
    run_job(CurateConfig, curate, description=__doc__ or "", look_at="{page}")
