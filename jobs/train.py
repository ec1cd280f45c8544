#!/usr/bin/env python3
"""Train an embedding model on the faces of a table. The same command continues after an interruption."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package called lib

from lib.imports import quick_imports

with quick_imports():
    from lib.config import run_job
    from lib.training.settings import TrainConfig
    from lib.training.train_job import train
    from lib.tuning.winner import train_defaults

if __name__ == "__main__":
    run_job(TrainConfig, train, description=__doc__ or "", defaults=train_defaults, look_at="{model}/README.md")
