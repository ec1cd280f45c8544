"""A run that goes on from a model of faces keeps its centres; new people start at their mean embedding."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lib.recognition.model import ModelSpec, embed, load_model, save_model
from lib.training import checkpoints
from lib.training.centre_start import start_centres
from lib.training.checkpoints import newest_progress
from lib.training.control import WorkerJob
from lib.training.first_checkpoint import begin
from lib.training.loop import Worker
from lib.training.saving import all_suspects
from lib.training.settings import TrainConfig
from tests.job_runner import RayHead, run_here
from tests.test_train_job import flags
from tests.training.learnable_faces import write_faces
from tests.training.test_going_on import CONTROL, FACES

SPEC = ModelSpec(backbone="test_convnext", embedding_dim=8, image_size=32)
EARLIER, NOW = 4, 12
"""Of 12 people, person 10 and 11 stand between 1 and 2 in the order of names."""


def begun(data: Path, *, people: int, init: str = "none", name: str = "run", **settings: object) -> Worker:
    faces = write_faces(data / f"faces of {people}", people={"train": people, "val": 3}, photos=3)
    given: dict[str, Any] = {
        "data": str(data),
        "faces": faces,
        "cache_dir": str(data / "cache"),
        "name": name,
        "init": init,
    }
    given |= {"epochs": 1, "backbone": SPEC.backbone, "embedding_dim": 8, "loss": "arcface", "batch": "photos"}
    config = TrainConfig.of(**{**given, **settings})
    names = sorted(f"person {person}" for person in range(people))
    checkpoints.write_identities(config.run_url, pa.array(names))
    job = WorkerJob(config=config, spec=begin(config, config.content(FACES), SPEC))
    return Worker(job, CONTROL, torch.device("cpu"))


def finished(worker: Worker, data: Path) -> str:
    """Save the state and a model as a run does that has trained; return the run's folder."""
    state = worker.state
    assert state.centres is not None
    state.save(worker.config.run_url, state.progress, all_suspects(worker.state))
    save_model(state.evaluated, str(data / "runs" / "run" / "model"))
    return worker.config.run_url


def means(worker: Worker, model_url: str) -> np.ndarray:
    cache = worker.data.train
    vectors_ND = embed(load_model(model_url), cache.decode(np.arange(len(cache)), 32)[0])
    sums = np.stack([vectors_ND[cache.labels_N == label].mean(axis=0) for label in range(len(cache.identities))])
    return sums / np.linalg.norm(sums, axis=1, keepdims=True)


@pytest.mark.parametrize("sub_centers", [1, 3])
def test_people_of_the_earlier_run_keep_their_centres_and_new_ones_start_at_their_mean(
    tmp_path: Path, sub_centers: int
) -> None:
    earlier = begun(tmp_path, people=EARLIER, sub_centers=sub_centers)
    run_url = finished(earlier, tmp_path)
    worker = begun(tmp_path, people=NOW, init=run_url, name="longer", sub_centers=sub_centers)
    assert earlier.state.centres is not None
    assert worker.state.centres is not None
    before_RSD, now_RSD = earlier.state.centres.centres_RSD, worker.state.centres.centres_RSD
    known = earlier.data.train.identities
    expected_RD = means(worker, f"{run_url}/model")
    for place, name in enumerate(worker.data.train.identities):
        if name in known:
            torch.testing.assert_close(now_RSD[place], before_RSD[known.index(name)], msg=name)
        else:
            np.testing.assert_allclose(now_RSD[place, 0], expected_RD[place], atol=1e-4, err_msg=name)
            assert len(torch.unique(now_RSD[place], dim=0)) == sub_centers
    torch.testing.assert_close(now_RSD.norm(dim=2), torch.ones(NOW, sub_centers))


def test_a_model_without_centres_starts_all_of_them_at_the_means(tmp_path: Path) -> None:
    run_url = finished(begun(tmp_path, people=EARLIER), tmp_path)
    worker = begun(tmp_path, people=NOW, init=f"{run_url}/model", name="longer", sub_centers=2)
    assert worker.state.centres is not None
    np.testing.assert_allclose(worker.state.centres.centres_RSD[:, 0], means(worker, f"{run_url}/model"), atol=1e-4)


def test_centres_of_a_run_whose_list_of_people_is_shorter_are_nobody_s(tmp_path: Path) -> None:
    """As after jobs/forget.py, which takes a name out of it: the rows of the centres are those of others then."""
    run_url = finished(begun(tmp_path, people=EARLIER), tmp_path)
    checkpoints.write_identities(run_url, pa.array(["person 0", "person 2", "person 3"]))
    worker = begun(tmp_path, people=EARLIER, init=run_url, name="longer")
    assert worker.state.centres is not None
    np.testing.assert_allclose(worker.state.centres.centres_RSD[:, 0], means(worker, f"{run_url}/model"), atol=1e-4)


def test_other_weights_and_another_head_start_at_random(tmp_path: Path) -> None:
    run_url = finished(begun(tmp_path, people=EARLIER), tmp_path)
    worker = begun(tmp_path, people=EARLIER, name="other")
    assert worker.state.centres is not None
    drawn = worker.state.centres.centres_RSD.clone()
    wider = dataclasses.replace(SPEC, head=(16,))
    data, model = worker.data, worker.state.evaluated
    for init, spec in (("none", SPEC), (run_url, wider), ("weights.safetensors", SPEC)):
        assert start_centres(worker.state.centres, init, spec, data.train, data.embedding, model) == ""
    torch.testing.assert_close(worker.state.centres.centres_RSD, drawn)


@pytest.mark.slow
def test_two_workers_go_on_from_a_run_on_fewer_people(connected_head: RayHead, tmp_path: Path) -> None:
    write_faces(tmp_path / "faces", people={"train": EARLIER, "val": 4})
    more = ("--loss", "cosface", "--batch", "photos", "--epochs", "1", "--batch-size", "8", "--workers", "2")
    done = run_here("train.py", *flags(tmp_path, "first", *more))
    assert done.status == 0, done.errors
    grown = write_faces(tmp_path / "grown", people={"train": NOW, "val": 4})
    run = str(tmp_path / "runs" / "first")
    again = run_here("train.py", *flags(tmp_path, "second", *more, "--faces", grown), "--init", run)
    assert again.status == 0, again.errors
    assert f"centres: 4 people keep those of {run}, 8 start as the mean of their embeddings" in again.errors
    progress = newest_progress(str(tmp_path / "runs" / "second"))
    assert progress is not None
    assert progress.num_centres == NOW
