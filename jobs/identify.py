#!/usr/bin/env python3
"""Identify the people in photos: the nearest faces of a gallery for each face, or that nobody knows the person."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package called lib

from lib.imports import quick_imports

with quick_imports():
    from lib.config import run_job
    from lib.recognition.identify_job import IdentifyConfig, identify

if __name__ == "__main__":
    run_job(IdentifyConfig, identify, description=__doc__ or "", look_at="{csv}")
