"""The record of a run: history, best model and suspects. Worker 0 writes it after each epoch."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from lib import storage
from lib.recognition.model import VALIDATION_SPLIT, EmbeddingModel, save_model
from lib.training import collective
from lib.training.checkpoints import Progress
from lib.training.epoch_choice import Difference
from lib.training.face_cache import FaceCache
from lib.training.history import MODEL_FOLDER, History, has_plateaued, is_overfitting, run_result, watched_names
from lib.training.schedule import Phase, next_phase
from lib.training.settings import TrainConfig
from lib.training.suspects import SuspectLog
from lib.training.validation import Figures

Floats = npt.NDArray[np.float32]

FILTERED = ("faces within", "faces left out")
"""Entries of a model's spec about `--min-quality` and `--where`, which the driver writes."""


@dataclass(frozen=True, kw_only=True)
class EpochSteps:
    """Results of the training steps of an epoch."""

    sums: dict[str, float]
    """Over all workers, by `lib.training.objective.SUM_NAMES`."""
    seconds: dict[str, float]
    """Of this worker: train, and its parts data_wait (for crops) and store_wait."""
    was_used_N: npt.NDArray[np.bool_]
    """Which photos this worker trained on."""


@dataclass(frozen=True, kw_only=True)
class EpochOutcome:
    """What happened in an epoch."""

    sums: dict[str, float]
    """Over all steps of all workers, by `lib.training.objective.SUM_NAMES`."""
    figures: Figures
    usage: dict[str, float]
    """Statistics of the use of the photos, by all workers, since the run began."""
    suspects: SuspectLog
    """Of all workers, since the run began."""
    staleness: dict[str, float]
    """Of the feature store; empty if it is not used."""
    num_corrupt: int
    """Crops that this worker could not decode, so far."""
    num_filled: int
    """Photos without a stored feature at the start of the epoch."""
    seconds: dict[str, float]
    """Of this worker: train, data_wait, store_wait, refresh, epoch."""


class RunRecord:
    """Writes the record of a run."""

    def __init__(
        self,
        config: TrainConfig,
        progress: Progress,
        cache: FaceCache,
        control: Any,
        *,
        ahead: Callable[[Floats, Floats], Difference] | None = None,
        best_scores_P: Floats | None = None,
    ) -> None:
        """Read the history up to the next epoch.

        Args:
            ahead: compares the scores of two epochs. Without it an epoch is kept only if its figure is better.
            best_scores_P: of the best epoch so far.
        """
        self.best_scores_P = best_scores_P
        self._ahead = ahead
        self._config = config
        self._cache = cache
        self._control = control
        self._history = History(config.run_url, next_epoch=progress.epoch)
        self._notes: list[str] = []

    def note(self, text: str) -> None:
        """Write a note for the user into the log and the next row of the history."""
        self._notes.append(text)
        self._control.tell.remote(line=text)

    def end_epoch(self, progress: Progress, outcome: EpochOutcome, model: EmbeddingModel) -> Progress:
        """Write the epoch's row, the model if it is the best so far, and suspects; return the next progress.

        The checkpoint comes after this. If it is lost, the epoch is done again and its row is written again.
        """
        config, figures = self._config, outcome.figures
        row = self._row(progress, outcome)
        value = figure_of(row, config.validation.best_by)
        is_best, progress = self._compared(value, progress, figures, row)
        phase = self._next_phase(progress, row, figures, is_best=None if value is None else is_best)
        finished = progress.epoch >= config.epochs or self._is_stuck(value, progress)
        row["is_best"] = is_best
        row["notes"] = "; ".join(self._notes) or None
        self._notes = []
        self._history.append(row)
        if is_best or (value is None and finished):
            self._save_model(model, progress, row, figures)
        self._write_suspects(outcome.suspects)
        self._control.tell.remote(line=_line(row, config))
        return dataclasses.replace(
            progress,
            epoch=progress.epoch + 1,
            anchors_done=0,
            negatives=phase.negatives,
            phase_first_epoch=phase.first_epoch,
            finished=finished,
            sums={},
        )

    def _next_phase(self, progress: Progress, row: dict[str, Any], figures: Figures, *, is_best: bool | None) -> Phase:
        """Return the policy of negatives for the next epoch, and note a change of policy and overfitting.

        `is_best` is None if the epoch has no figure to be judged by.
        """
        patience = self._config.validation.patience
        phase = Phase(negatives=progress.negatives, first_epoch=progress.phase_first_epoch)  # type: ignore[arg-type]
        losses, train_losses, val_losses = (
            [*self._since(phase, key), row[key]] if row.get(key) is not None else []
            for key in ("val_loss_random", "train_loss", "val_loss")
        )
        variances = [*self._history.values("embedding_variance"), figures.variance]
        phase, change = next_phase(
            phase,
            policy=self._config.negatives,
            epoch=progress.epoch,
            losses=losses,
            variances=variances if math.isfinite(figures.variance) else [],
            patience=patience,
            were_kept=[] if is_best is None else [*self._were_kept(phase), is_best],
            had_hard=any(each["negatives"] == "hard" for each in self._history.rows),
        )
        if change:
            self.note(change)
        if is_overfitting(train_losses, val_losses, patience=patience):
            self.note(f"overfitting: for {patience} epochs the validation loss has risen while the training loss fell")
        return phase

    def _compared(
        self, value: float | None, progress: Progress, figures: Figures, row: dict[str, Any]
    ) -> tuple[bool, Progress]:
        """Return whether the epoch is kept: it is the best, or its gap to the best may be chance."""
        if value is None:
            return False, progress
        if progress.best is None or value > progress.best:
            self.best_scores_P = figures.scores_P
            return True, dataclasses.replace(progress, best=value, best_epoch=progress.epoch)
        if self._ahead is None or figures.scores_P is None or self.best_scores_P is None:
            return False, progress
        if len(figures.scores_P) != len(self.best_scores_P):
            return False, progress  # the table of --val-faces has changed, and with it the pairs
        ahead = self._ahead(figures.scores_P, self.best_scores_P)
        row["ahead_of_best"], row["ahead_of_best_interval"] = ahead
        if ahead.is_worse:
            return False, progress
        return True, dataclasses.replace(progress, best_epoch=progress.epoch)

    def _were_kept(self, phase: Phase) -> list[bool]:
        return [bool(row["is_best"]) for row in self._history.rows if int(row["epoch"] or 0) >= phase.first_epoch]

    def finish(self, progress: Progress) -> None:
        """Send the driver the result of the run."""
        # Wait for it, because the process may end right after this.
        ray.get(self._control.finish.remote(run_result(self._history.rows, progress.best_epoch)))

    def _row(self, progress: Progress, outcome: EpochOutcome) -> dict[str, Any]:
        config, sums, seconds = self._config, outcome.sums, outcome.seconds
        steps, triplets = max(sums["steps"], 1), sums["triplets"]
        images_here = sums["images"] - progress.sums.get("images", 0.0)  # the rest came before a restart
        past_s = sum(self._history.values("seconds"))
        epochs_left = config.epochs - progress.epoch
        return {
            "epoch": progress.epoch,
            "negatives": progress.negatives,
            "train_loss": sums["loss"] / steps,
            "num_train_triplets": int(triplets),
            "time_min": seconds["epoch"] / 60,
            **outcome.figures.row,
            "active_share": sums["active"] / max(triplets, 1),
            "mean_positive_distance": sums["positive"] / steps,
            "mean_negative_distance": sums["negative"] / steps,
            "num_images": int(sums["images"]),
            "images_per_s": images_here / max(seconds["train"], 1e-9),
            "data_wait_share": seconds["data_wait"] / max(seconds["train"], 1e-9),
            "store_wait_share": seconds["store_wait"] / max(seconds["train"], 1e-9),
            "refresh_s": seconds["refresh"],
            "seconds": seconds["epoch"],
            "minutes_left": (past_s + seconds["epoch"]) / progress.epoch * epochs_left / 60,
            "num_workers": collective.num_workers(),
            **{f"store_{name}": value for name, value in outcome.staleness.items()},
            "store_num_filled": outcome.num_filled,
            **outcome.usage,
            "num_corrupt_crops": outcome.num_corrupt,
        }

    def _since(self, phase: Phase, key: str) -> list[float]:
        rows = [row for row in self._history.rows if int(row["epoch"] or 0) >= phase.first_epoch]
        return [float(value) for row in rows if isinstance(value := row.get(key), int | float)]

    def _is_stuck(self, value: float | None, progress: Progress) -> bool:
        values = [*(figure_of(row, self._config.validation.best_by) for row in self._history.rows), value]
        losses = [-value for value in values if value is not None]
        if not self._config.validation.stop_after or not has_plateaued(
            losses, patience=self._config.validation.stop_after
        ):
            return False
        self.note(
            f"no better epoch for {self._config.validation.stop_after} epochs: ended early, the best was "
            f"{progress.best_epoch}"
        )
        return True

    def _save_model(self, model: EmbeddingModel, progress: Progress, row: dict[str, Any], figures: Figures) -> None:
        config = self._config
        spec = dataclasses.replace(
            model.spec,
            threshold=figures.metrics.get("threshold"),
            metrics={"epoch": progress.epoch, "split": VALIDATION_SPLIT, **figures.metrics} if figures.metrics else {},
            training={
                "photos": len(self._cache),
                "identities": len(self._cache.identities),
                **{name: model.spec.training[name] for name in FILTERED if name in model.spec.training},
                "epoch": progress.epoch,
                "steps": progress.step,
                "batch": config.sampling.batch,
                **config.loss_settings(),
                "negatives": row["negatives"],
                "lr": progress.lr,
                "augment": config.sampling.augment,
                "init": storage.redacted(config.init),
                **({} if config.staged is None else {"recipe": config.staged.reason}),
                "seed": config.run.seed,
            },
        )
        save_model(model, storage.join(config.run_url, MODEL_FOLDER), spec)

    def _write_suspects(self, suspects: SuspectLog) -> None:
        if len(suspects):
            table = suspects.table(self._cache.photos, self._cache.identities, self._cache.labels_N)
            storage.write_parquet(storage.join(self._config.run_url, "suspects.parquet"), table)


def figure_of(row: Mapping[str, Any], best_by: str) -> float | None:
    """Return an epoch's figure by `--best-by`, of which more is better; None if it could not be measured."""
    if best_by == "loss":
        loss = row.get("val_loss_random")
        return -loss if loss is not None and math.isfinite(loss) else None
    value: float | None = row.get(best_by)
    return value


def _line(row: dict[str, Any], config: TrainConfig) -> str:
    parts = [f"epoch {row['epoch']}/{config.epochs} ({row['negatives']})", f"loss {row['train_loss']:.4f}"]
    if "val_loss" in row:
        parts.append(f"val loss {row['val_loss']:.4f} (random {row['val_loss_random']:.4f})")
    if "accuracy" in row:
        parts.append(f"accuracy {100 * row['accuracy']:.2f} % ± {100 * row['accuracy_std']:.2f}")
        parts.append(f"AUC {row['auc']:.4f}")
    parts += [
        f"{name} {100 * row[f'{name}_accuracy']:.2f} % ± {100 * row[f'{name}_accuracy_std']:.2f}"
        for name in watched_names(row)
    ]
    parts.append(f"active {100 * row['active_share']:.0f} %")
    parts.append(f"{row['images_per_s']:.0f} images/s")
    parts.append(
        f"waited {100 * row['data_wait_share']:.0f} % for crops, {100 * row['store_wait_share']:.0f} % for store"
    )
    parts.append(f"{row['time_min']:.1f} min, {row['minutes_left']:.1f} left")
    if "ahead_of_best" in row:
        parts.append(f"{100 * row['ahead_of_best']:+.2f} ± {100 * row['ahead_of_best_interval']:.2f} against the best")
    mark = " (kept)" if "ahead_of_best" in row else " (best)"
    return ", ".join(parts) + (mark if row["is_best"] else "")
