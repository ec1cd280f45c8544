#!/usr/bin/env python3
"""Compare runs on one page, also runs that are still going."""

from lib.config import run_job
from lib.training.comparing import CompareConfig, compare

if __name__ == "__main__":
    run_job(CompareConfig, compare, description=__doc__ or "")
