"""The recipe that fine-tunes published weights on few photos, with the very commands of the documentation."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from lib import storage
from lib.recognition import iresnet
from lib.recognition.model import load_model
from tests.job_runner import RayHead, run_job
from tests.recognition.test_face_weights import random_like

RECIPES = Path(__file__).parents[1] / "docs" / "recipes.md"


def commands() -> list[list[str]]:
    """Return the commands of the recipe, without Python: the job and its flags."""
    section = RECIPES.read_text().split("## Fine-tune a published ArcFace model on few photos")[1].split("\n## ")[0]
    lines = re.sub(r"\\\n\s+", " ", section).splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("    .venv/bin/python jobs/")]


@pytest.mark.slow
def test_the_commands_of_the_recipe_measure_tune_and_compare(head: RayHead, sample_data: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights é" / "backbone.pth"
    weights.parent.mkdir()
    torch.save(random_like(iresnet.iresnet18().state_dict(), 1), weights)
    here = {
        "/my/folder": str(tmp_path / "data é"),
        "/my/folder/runs/tuned": str(tmp_path / "data é" / "runs" / "tuned"),
        "/my/photos": str(sample_data / "photos"),
        "backbone.pth": str(weights),
        "iresnet50": "iresnet18",  # as the others, and quick
        "10": "1",
    }
    more = {
        "preprocess.py": ["--identities", str(sample_data / "identities.txt")],
        "evaluate.py": ["--split", "all", "--num-pairs", "200"],  # the drawn people are few
        "train.py": ["--cache-dir", str(tmp_path / "the cache")],
    }
    jobs = [(Path(job).name, [here.get(flag, flag) for flag in flags]) for job, *flags in commands()]
    assert [job for job, _ in jobs] == ["preprocess.py", "evaluate.py", "train.py", "evaluate.py"]
    results = []
    for job, flags in jobs:
        done = run_job(job, *flags, *more[job], extra=head.environment)
        assert done.status == 0, done.errors
        results.append(done.result)
    assert results[1]["num_pairs"] == 200
    assert not results[1]["threshold_kept"]
    spec = load_model(results[2]["model"]).spec
    assert (spec.backbone, spec.embedding_dim, spec.image_size, spec.flip) == ("iresnet18", 512, 112, True)
    assert spec.fingerprint["template"] == "arcface-112"
    metrics = storage.read_json(results[3]["report"].replace("report.html", "metrics.json"))
    assert [model["name"] for model in metrics["models"]] == ["backbone", "tuned"]
    assert all(model["flip"] for model in metrics["models"])
    assert np.isfinite(metrics["difference"]["accuracy"])
