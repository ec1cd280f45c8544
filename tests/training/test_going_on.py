"""A run goes on as itself: with what it has found, with its own settings, and past no damage."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lib import storage
from lib.errors import UserError
from lib.faces.table import read_success
from lib.parts import present_files
from lib.recognition.model import ModelSpec
from lib.training import checkpoints
from lib.training.control import StopRequests, WorkerJob
from lib.training.first_checkpoint import begin
from lib.training.loop import Worker
from lib.training.record import EpochOutcome, RunRecord
from lib.training.saving import all_suspects
from lib.training.settings import TrainConfig
from lib.training.suspects import SuspectLog
from lib.training.train_job import CONFIG_NAME, _settle, train
from lib.training.validation import Figures
from tests.training.learnable_faces import write_faces

CONTROL: Any = SimpleNamespace(tell=SimpleNamespace(remote=lambda **_: None))
SPEC = ModelSpec(backbone="test_convnext", embedding_dim=8, image_size=32)
FACES = {"run_id": "r", "fingerprint": {"id": "f"}}


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    write_faces(tmp_path / "faces", people={"train": 4, "val": 3}, photos=4)
    return TrainConfig.of(
        data=str(tmp_path), cache_dir=str(tmp_path / "cache"), backbone="test_convnext", init="none", epochs=1
    )


def begun(config: TrainConfig) -> Worker:
    job = WorkerJob(config=config, spec=begin(config, config.content(FACES), SPEC), num_shards=0, use_gpu=False)
    return Worker(job, CONTROL, torch.device("cpu"))


def gone_on(worker: Worker) -> Worker:
    job = WorkerJob(config=worker.config, spec=worker.state.model.spec, num_shards=0, use_gpu=False)
    return Worker(job, CONTROL, torch.device("cpu"))


def test_suspects_found_before_a_restart_stay(config: TrainConfig) -> None:
    worker = begun(config)
    worker.state.suspects.add(np.array([1]), np.array([9]), np.array([0.97]))
    worker.state.save(config.run_url, worker.state.progress, all_suspects(worker.state))
    assert len(gone_on(worker).state.suspects) == 1


def test_a_checkpoint_of_an_older_version_has_none(config: TrainConfig) -> None:
    assert len(gone_on(begun(config)).state.suspects) == 0


def test_the_usage_stands_before_the_last_checkpoint_does(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job killed between the two finds the run finished, and writes nothing any more."""
    worker = begun(config)
    record = RunRecord(config, worker.state.progress, worker.data.train, CONTROL)
    names = ("loss", "steps", "triplets", "active", "positive", "negative", "images")
    outcome = EpochOutcome(
        sums=dict.fromkeys(names, 1.0),
        figures=Figures(row={}, loss=1.0, loss_random=1.0, variance=1.0, metrics={}),
        usage={},
        suspects=SuspectLog(),
        staleness={},
        num_corrupt=0,
        num_filled=0,
        seconds=dict.fromkeys(("train", "data_wait", "store_wait", "refresh", "epoch"), 1.0),
    )
    progress = record.end_epoch(worker.state.progress, outcome, worker.state.evaluated)
    assert progress.finished
    usage_url = storage.join(config.run_url, "usage.parquet")
    monkeypatch.setattr(StopRequests, "is_asked", lambda _: False)
    monkeypatch.setattr(worker.state, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    worker.state.usage.add(*np.zeros((3, 2), np.int64))
    for each in (replace(progress, finished=False), progress):
        assert not storage.exists(usage_url)
        with pytest.raises(KeyboardInterrupt):
            worker._saving.after_epoch(worker.state, each, SuspectLog(), worker.data.train.photos)
    assert storage.read_parquet(usage_url)["anchor"].to_pylist() == [2, *[0] * (len(worker.data.train) - 1)]
    assert "- init: none" in storage.read_bytes(storage.join(config.run_url, "model", "README.md")).decode()


def test_a_damaged_part_of_the_validation_people_is_no_lack_of_them(config: TrainConfig, tmp_path: Path) -> None:
    part = tmp_path / "faces" / "split=val" / "part-000001.parquet"
    data = bytearray(part.read_bytes())
    data[200:-2000] = bytes(len(data) - 2200)
    part.write_bytes(data)
    with pytest.raises(UserError, match=r"split=val/part-000001\.parquet"):
        begun(config)
    (tmp_path / "faces" / "split=val" / "part-000000.parquet").unlink()
    part.unlink()
    assert begun(config).validation.problem == "no photo of a validation person is aligned"


def test_what_a_killed_write_has_left_goes_when_the_run_goes_on(config: TrainConfig) -> None:
    worker = begun(config)
    folder = Path(config.run_url) / checkpoints.FOLDER
    for name in (f".{'0a' * 16}.tmp", ".0a.tmp", "mine.tmp"):
        (folder / name).write_bytes(b"half a checkpoint")
    before = {path.name for path in folder.iterdir()}
    gone_on(worker)
    assert before - {path.name for path in folder.iterdir()} == {f".{'0a' * 16}.tmp"}


def test_other_initial_weights_are_another_run(config: TrainConfig) -> None:
    begin(config, config.content(FACES), SPEC)
    assert _settle(config, config.content(FACES)) == checkpoints.newest_progress(config.run_url)
    other = config.replaced(init="s3://me:secret@host/weights")
    with pytest.raises(UserError, match=r"init: none there, s3://\*\*\*@host/weights now"):
        _settle(other, other.content(FACES))


@pytest.mark.parametrize(("setting", "value"), [("confusable_share", 0.5), ("accumulate", 4)])
def test_a_run_older_than_a_setting_had_its_default(config: TrainConfig, setting: str, value: float) -> None:
    begin(config, config.content(FACES), SPEC)
    path = Path(config.run_url) / CONFIG_NAME
    earlier = json.loads(path.read_text())
    del earlier[setting], earlier["init"]
    path.write_text(json.dumps(earlier))
    assert _settle(config, config.content(FACES)) is not None
    other = config.replaced(**{setting: value})
    with pytest.raises(UserError, match=f"{setting}: .* there, {value} now"):
        _settle(other, other.content(FACES))


def test_the_rate_is_the_flags_or_the_one_for_the_backbone_and_stays(config: TrainConfig) -> None:
    for lr, expected in ((None, 9e-4), (3e-4, 3e-4)):
        named = config.replaced(name=f"run {lr}", lr=lr)
        state = begun(named).state
        assert state.progress.lr == expected
        assert state.optimizer.param_groups[0]["lr"] == expected


def test_a_run_goes_on_with_the_version_of_the_table_that_it_began_with(config: TrainConfig) -> None:
    faces = Path(config.faces_url)
    before = {**json.loads((faces / "_SUCCESS").read_text()), "version": 1, "parts": present_files(str(faces))}
    kept = [name for name in before["parts"] if not name.startswith("split=train/part-000000")]
    after = {**before, "run_id": "grown", "version": 2, "parts": {name: before["parts"][name] for name in kept}}
    storage.write_json(str(faces / "_SUCCESS"), before)
    begin(config, config.content(read_success(config.faces_url)), SPEC)
    storage.write_json(str(faces / "_versions" / "000001.json"), before)
    storage.write_json(str(faces / "_SUCCESS"), after)

    asked = config.replaced(dry_run=True)
    assert train(asked)["photos"] == 16
    assert train(asked.replaced(name="another"))["photos"] == 8
    job = WorkerJob(config=config, spec=SPEC, num_shards=0, use_gpu=False, faces_run_id=before["run_id"])
    worker = Worker(job, CONTROL, torch.device("cpu"))
    assert len(worker.data.train) == 16

    (faces / "_versions" / "000001.json").unlink()
    with pytest.raises(UserError, match="faces_run_id: made for tests there, grown now"):
        train(asked)
