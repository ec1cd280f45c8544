#!/usr/bin/env python3
"""Preprocess, train and evaluate in one go. The same command continues after an interruption."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package called lib

from lib.imports import quick_imports

with quick_imports():
    from lib.config import run_job
    from lib.pipeline_job import PipelineConfig, pipeline, pipeline_defaults

if __name__ == "__main__":
    run_job(PipelineConfig, pipeline, description=__doc__ or "", defaults=pipeline_defaults, look_at="{report}")
