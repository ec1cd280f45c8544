#!/usr/bin/env python3
"""Turn faces, or photos, into a Parquet table of embeddings; started again it goes on where it was."""

from lib.config import run_job
from lib.recognition.embedding import EmbedConfig, embed_job

if __name__ == "__main__":
    run_job(EmbedConfig, embed_job, description=__doc__ or "")
