"""MLflow and Weights & Biases get what the history holds, once each, and cost the training nothing when they fail."""

import importlib.util
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from lib import storage
from lib.errors import UserError
from lib.training import tracking, tracking_services
from lib.training.history import write_history
from lib.training.tracking import Tracking, about_run, add_evaluation
from lib.training.tracking_services import TRACKERS, Tracker, trackers


def write_rows(run: Path, num_epochs: int) -> None:
    rows = [{"epoch": n, "accuracy": n / 10, "val_loss": float("nan"), "notes": "x"} for n in range(1, num_epochs + 1)]
    write_history(str(run), rows)


def track(word: str, run: Path, *, ending: Any = "finished", settings: dict[str, Any] | None = None) -> None:
    about = about_run("first", str(run), settings or {"lr": 1e-3, "loss": "arcface"})
    with Tracking([word], about) as started:
        started.end(ending, {"best_epoch": 2, "accuracy": 0.3, "epochs": None})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "it's a run"
    folder.mkdir()
    return folder


def test_mlflow_gets_settings_epochs_and_result_and_a_later_start_goes_on_with_the_same_run(run: Path) -> None:
    store = run.parent / "ml flow"
    write_rows(run, 2)
    track(f"mlflow:{store}", run, ending="stopped")
    client = MlflowClient(tracking_uri=store.as_uri())
    (experiment,) = [each for each in client.search_experiments() if each.name == "conv-facenet"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.params == {"lr": "0.001", "loss": "arcface"}
    assert found.info.status == "KILLED"
    assert found.info.run_name == "first"
    write_rows(run, 3)
    track(f"mlflow:{store}", run)
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "accuracy")
    assert [(each.step, each.value) for each in history if each.step] == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert found.data.metrics["best_epoch"] == 2
    assert "val_loss" not in found.data.metrics
    add_evaluation([f"mlflow:{store}"], about_run("first", str(run), {}), {"accuracy": 0.7})
    assert client.get_run(found.info.run_id).data.metrics["test_accuracy"] == 0.7


def test_wandb_offline_writes_what_it_would_send_under_one_id(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_rows(run, 1)
    track("wandb:faces of all", run, ending="stopped")
    write_rows(run, 2)
    track("wandb:faces of all", run)
    notes = storage.read_json(str(run / "tracking.json"))["wandb:faces of all"]
    assert notes["epoch"] == 2
    files = sorted((run / "wandb").glob(f"offline-run-*-{notes['id']}/run-{notes['id']}.wandb"))
    assert files, "the second start has the id of the first"
    content = b"".join(file.read_bytes() for file in files)
    for text in (b"faces of all", b"arcface", b"accuracy", b"best_epoch"):
        assert text in content
    names = {path.name for path in (run / "wandb").rglob("*")}
    assert not names & {"wandb-metadata.json", "requirements.txt", "output.log"}


def test_a_server_that_is_away_costs_one_line_without_its_password(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_rows(run, 3)
    with caplog.at_level(logging.WARNING):
        track("mlflow:http://me:secret@127.0.0.1:9", run)
    ours = [record.getMessage() for record in caplog.records if record.name == tracking.__name__]
    assert len(ours) == 1
    assert ours[0].startswith("--track mlflow:http://***@127.0.0.1:9 fails (")
    assert "training continues" in ours[0]
    assert "secret" not in caplog.text
    assert not (run / "tracking.json").exists()


class Moody(Tracker):
    """A service that is away until `is_there`, and keeps what it is told."""

    package = requirement = "json"
    is_there = False
    told: list[int] = []  # noqa: RUF012 - emptied by the test

    def open(self, run_id: str | None, about: tracking_services.About) -> str:
        if not Moody.is_there:
            raise ConnectionError("away")
        return run_id or "id"

    def log(self, epoch: int, figures: tracking_services.Figures) -> None:
        Moody.told.append(epoch)

    def summarize(self, figures: tracking_services.Figures) -> None:
        assert figures == {"best_epoch": 2.0, "accuracy": 0.3}

    def close(self, ending: tracking_services.Ending) -> None:
        time.sleep(tracking.LAST_LIMIT_S * 100)


def test_what_a_service_missed_it_gets_later_and_one_that_hangs_is_left_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking_services, "TRACKERS", {**TRACKERS, "moody": Moody})
    monkeypatch.setattr(tracking, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(tracking, "LAST_LIMIT_S", 0.3)
    Moody.told.clear()
    Moody.is_there = False
    write_rows(run, 1)
    with caplog.at_level(logging.WARNING), Tracking(["moody"], about_run("first", str(run), {})) as started:
        deadline = time.monotonic() + 60
        while "away" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        Moody.is_there = True
        write_rows(run, 2)
        while Moody.told != [1, 2] and time.monotonic() < deadline:
            time.sleep(0.01)
        started.end("finished", {"best_epoch": 2, "accuracy": 0.3})
    assert Moody.told == [1, 2]
    assert caplog.text.count("away") == 1
    assert "not waiting any longer" in caplog.text


def test_what_is_not_known_or_not_installed_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--track is 'neptune:x': mlflow:URI, wandb, or wandb:PROJECT"):
        trackers(["neptune:x"])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="--track mlflow: name the server or a folder"):
        trackers(["mlflow"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs the package mlflow-skinny: pip install -c constraints"):
        trackers(["mlflow:/x"])
    with pytest.raises(UserError, match="needs the package wandb: pip install"):
        trackers(["wandb"])
