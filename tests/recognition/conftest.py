"""What the tests of the model in use share: a saved model of random weights, and faces of drawn people."""

from pathlib import Path

import pytest
import torch

from lib.faces.extraction import ExtractionSettings, fingerprint
from lib.recognition.model import EmbeddingModel, ModelSpec, save_model
from tests.job_runner import run_job


@pytest.fixture(scope="session")
def model_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a small model of random weights, with a threshold, in a path with spaces."""
    torch.manual_seed(0)
    url = str(tmp_path_factory.mktemp("a run é") / "model")
    spec = ModelSpec(
        backbone="test_convnext",
        image_size=64,
        embedding_dim=16,
        threshold=0.1,
        fingerprint=fingerprint(ExtractionSettings()),
    )
    save_model(EmbeddingModel(spec), url)
    return url


@pytest.fixture(scope="session")
def faces_url(sample_data: Path) -> str:
    """Return the faces table that preprocess makes of the drawn people."""
    url = sample_data / "faces"
    if not (url / "_SUCCESS").exists():
        done = run_job("preprocess.py", "--data", str(sample_data))
        assert done.status == 0, done.errors
    return str(url)
