#!/usr/bin/env python3
"""Preprocess, train and evaluate in one go; started again it goes on where it was."""

from lib.config import run_job
from lib.training.pipeline import PipelineConfig, pipeline, pipeline_defaults

if __name__ == "__main__":
    run_job(PipelineConfig, pipeline, description=__doc__ or "", defaults=pipeline_defaults)
