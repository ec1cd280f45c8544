#!/usr/bin/env python3
"""Turn photos into a Parquet table of aligned faces. The same command continues after an interruption."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package called lib

from lib.imports import quick_imports

with quick_imports():
    from lib.config import run_job
    from lib.faces.preprocess_config import PreprocessConfig
    from lib.faces.preprocess_job import preprocess

if __name__ == "__main__":
    run_job(PreprocessConfig, preprocess, description=__doc__ or "", look_at="{faces}/contact_sheet.jpg")
