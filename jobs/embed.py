#!/usr/bin/env python3
"""Turn faces or photos into a Parquet table of embeddings. The same command continues after an interruption."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package called lib

from lib.imports import quick_imports

with quick_imports():
    from lib.config import run_job
    from lib.recognition.embed_job import EmbedConfig, embed_job

if __name__ == "__main__":
    run_job(EmbedConfig, embed_job, description=__doc__ or "", look_at="{embeddings}")
