#!/usr/bin/env python3
"""Measure how well a model tells people apart: metrics, and an HTML report with pictures."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package called lib

from lib.imports import quick_imports

with quick_imports():
    from lib.config import run_job
    from lib.evaluation.evaluate_job import EvaluateConfig, evaluate

if __name__ == "__main__":
    run_job(EvaluateConfig, evaluate, description=__doc__ or "", look_at="{report}")
