#!/usr/bin/env python3
"""Take people or photos out of everything that was made of them, and keep them out."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before any other package that is called lib

from lib.imports import quick_imports

with quick_imports():
    from lib.config import run_job
    from lib.forgetting.forget_job import ForgetConfig, forget

if __name__ == "__main__":
    run_job(ForgetConfig, forget, description=__doc__ or "", look_at="{receipt}")
