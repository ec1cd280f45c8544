#!/usr/bin/env python3
"""Export a model as one ONNX file, checked on real faces; or a faces table as tars, Parquet or folders."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package called lib

from lib.imports import quick_imports

with quick_imports():
    from lib.config import run_job
    from lib.recognition.export_job import ExportConfig, export

if __name__ == "__main__":
    run_job(ExportConfig, export, description=__doc__ or "", look_at="{onnx}")
