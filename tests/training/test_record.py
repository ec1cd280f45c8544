"""What a run writes at the end of an epoch, on plain objects: which model it keeps, and what it decides."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lib.recognition.model import EmbeddingModel, ModelSpec, load_model
from lib.training.cache_building import build_cache
from lib.training.checkpoints import Progress
from lib.training.epoch_choice import Difference
from lib.training.face_cache import FaceCache
from lib.training.objective import SUM_NAMES
from lib.training.record import EpochOutcome, RunRecord
from lib.training.settings import TrainConfig
from lib.training.suspects import SuspectLog
from lib.training.validation import Figures
from tests.training.learnable_faces import write_faces


class Run:
    """A run whose epochs have given accuracies and losses."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        write_faces(folder / "faces", people={"train": 3}, photos=3)
        self.config = TrainConfig.of(data=str(folder), backbone="test_convnext", **settings)
        self.cache = FaceCache(build_cache(self.config.faces_url, ["train"], str(folder)))
        self.lines: list[str] = []
        control: Any = SimpleNamespace(tell=SimpleNamespace(remote=lambda *, line: self.lines.append(line)))
        self.progress = Progress(epoch=1)
        self.interval = 0.0
        self.record = RunRecord(self.config, self.progress, self.cache, control, ahead=self.ahead)
        self.model = EmbeddingModel(ModelSpec(backbone="test_convnext", embedding_dim=8, image_size=32))

    def end_epoch(self, accuracy: float, loss: float = 1.0, train_loss: float = 1.0) -> Progress:
        """End an epoch; the bias of its model's head is the epoch's number."""
        with torch.no_grad():
            self.model.head[0].bias.fill_(self.progress.epoch)
        row = {"accuracy": accuracy, "accuracy_std": 0.01, "auc": accuracy, "val_loss": loss, "val_loss_random": loss}
        outcome = EpochOutcome(
            sums={**dict.fromkeys(SUM_NAMES, 1.0), "loss": train_loss},
            figures=Figures(
                row=row,
                loss=loss,
                loss_random=loss,
                variance=1.0,
                metrics={"threshold": 0.5},
                scores_P=np.array([accuracy], np.float32) if self.config.validation.best_by != "loss" else None,
            ),
            usage={},
            suspects=SuspectLog(),
            staleness={},
            num_corrupt=0,
            num_filled=0,
            seconds=dict.fromkeys(("train", "data_wait", "store_wait", "refresh", "epoch"), 1.0),
        )
        self.progress = self.record.end_epoch(self.progress, outcome, self.model)
        return self.progress

    def ahead(self, scores_P: np.ndarray, earlier_P: np.ndarray) -> Difference:
        return Difference(float(scores_P[0] - earlier_P[0]), self.interval)

    def kept_epoch(self) -> int:
        return int(load_model(f"{self.config.run_url}/model").head[0].bias[0].item())


def test_the_model_of_the_best_epoch_is_kept(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for accuracy in (0.7, 0.9, 0.8):
        progress = run.end_epoch(accuracy)
    assert (progress.best, progress.best_epoch, progress.epoch) == (0.9, 2, 4)
    assert run.kept_epoch() == 2
    assert [line.endswith("(best)") for line in run.lines] == [True, True, False]


def test_a_later_epoch_is_kept_unless_it_is_worse_than_the_best_by_more_than_chance(tmp_path: Path) -> None:
    run = Run(tmp_path, negatives="random")
    run.interval = 0.03
    kept = []
    for accuracy in (0.7, 0.9, 0.88, 0.86, 0.88, 0.85):
        progress = run.end_epoch(accuracy)
        kept.append(progress.best_epoch)
    assert kept == [1, 2, 3, 3, 5, 5], "always against the best, so that small steps down do not add up"
    assert progress.best == 0.9
    assert run.kept_epoch() == 5
    rows = run.record._history.rows
    assert rows[2]["ahead_of_best"] == pytest.approx(-0.02, abs=1e-6)
    assert run.lines[2].endswith("-2.00 ± 3.00 against the best (kept)")
    assert run.lines[3].endswith("-4.00 ± 3.00 against the best")


def test_hard_negatives_that_do_harm_are_undone_and_do_not_come_again(tmp_path: Path) -> None:
    run = Run(tmp_path, patience=2, epochs=20)
    seen = []
    for accuracy, loss in ((0.8, 0.5), (0.9, 0.4), (0.89, 0.41), (0.88, 0.42), *((0.85, 0.5),) * 6):
        seen.append(run.progress.negatives)
        run.end_epoch(accuracy, loss)
    assert seen == ["random"] * 4 + ["hard"] * 2 + ["random"] * 4
    assert sum("2 epochs of hard negatives were all worse" in line for line in run.lines) == 1
    assert "random negatives again" in str(run.record._history.rows[5]["notes"])


def test_hard_negatives_that_are_as_good_stay(tmp_path: Path) -> None:
    run = Run(tmp_path, patience=2, epochs=20)
    run.interval = 0.02
    for accuracy, loss in ((0.8, 0.5), (0.9, 0.4), (0.89, 0.41), (0.88, 0.42), *((0.89, 0.5),) * 4):
        run.end_epoch(accuracy, loss)
    assert run.progress.negatives == "hard"


def test_the_lowest_loss_may_choose_instead(tmp_path: Path) -> None:
    run = Run(tmp_path, best_by="loss")
    for accuracy, loss in ((0.9, 0.5), (0.8, 0.3), (0.95, 0.4)):
        run.end_epoch(accuracy, loss)
    assert run.kept_epoch() == 2


def test_negatives_get_hard_when_the_loss_has_stopped_falling(tmp_path: Path) -> None:
    run = Run(tmp_path, patience=2)
    policies = [run.end_epoch(0.8, loss).negatives for loss in (0.5, 0.4, 0.41, 0.42)]
    assert policies == ["random", "random", "random", "hard"]
    assert run.progress.phase_first_epoch == 5
    assert sum("hard negatives from now on" in line for line in run.lines) == 1


def test_a_run_ends_early_where_it_is_told_to(tmp_path: Path) -> None:
    run = Run(tmp_path, stop_after=2)
    assert [run.end_epoch(accuracy).finished for accuracy in (0.8, 0.7, 0.75)] == [False, False, True]
    assert any("no better epoch for 2" in line for line in run.lines)


def test_overfitting_is_told(tmp_path: Path) -> None:
    run = Run(tmp_path, patience=2, negatives="random")
    for val_loss, train_loss in ((0.5, 0.5), (0.6, 0.4), (0.7, 0.3)):
        run.end_epoch(0.8, val_loss, train_loss)
    assert any(line.startswith("overfitting: for 2 epochs") for line in run.lines)


@pytest.mark.parametrize("accuracy", [0.7])
def test_an_epoch_that_is_done_again_takes_the_place_of_its_row(tmp_path: Path, accuracy: float) -> None:
    run = Run(tmp_path)
    run.end_epoch(0.6)
    before = run.progress
    run.end_epoch(0.9)
    again = RunRecord(run.config, before, run.cache, SimpleNamespace(tell=SimpleNamespace(remote=lambda **_: None)))
    run.record, run.progress = again, before
    run.end_epoch(accuracy)
    assert [row["accuracy"] for row in again._history.rows] == [0.6, accuracy]
