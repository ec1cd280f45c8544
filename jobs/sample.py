#!/usr/bin/env python3
"""Draw photos of people who do not exist, with their identities and landmarks, to try everything on."""

from lib.config import run_job
from lib.faces.sample import SampleConfig, make_sample

if __name__ == "__main__":
    run_job(SampleConfig, make_sample, description=__doc__ or "")
