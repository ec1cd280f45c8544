"""Runs to compare: the winner, its rivals, and the effect of each setting.

Shapes: R runs, C columns of a design matrix.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lib.evaluation.report import DASH

State = Literal["finished", "stopped", "failed", "unfinished"]
INTERVAL_ERRORS = 1.96
"""Standard errors on each side of a 95 % interval."""

_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """A run, as its folder describes it."""

    name: str
    url: str
    state: State
    reason: str
    """Why it was stopped or failed."""
    settings: Mapping[str, Any]
    """The settings that decide the result, and the fingerprint of the faces."""
    rows: Sequence[Mapping[str, Any]]
    """Rows of its history, one per epoch."""
    best: Mapping[str, Any] | None
    """The row of the best epoch, by the run's `--best-by`."""
    value: float | None
    """The metric of `--best-by` in that row; higher is better."""
    num_parameters: int | None

    @property
    def images_per_s(self) -> float | None:
        """Training images/s, the median over the epochs."""
        rates = [float(row["images_per_s"]) for row in self.rows if row.get("images_per_s")]
        return float(np.median(rates)) if rates else None


@dataclass(frozen=True, kw_only=True)
class Effect:
    """The average effect of one value of a setting."""

    setting: str
    value: str
    num_runs: int
    accuracy: float
    """Mean accuracy at the last epoch that all runs reached."""
    gain: float | None
    """Difference from the mean of the setting's values, other settings equal; None if the runs cannot tell."""
    best_accuracy: float
    """Mean accuracy of the best epochs."""
    images_per_s: float | None


def winner_of(runs: Sequence[ComparedRun]) -> ComparedRun | None:
    """Return the run with the highest value that did not fail; the first of equal ones."""
    judged = [run for run in runs if run.value is not None and run.state != "failed"]
    return max(judged, key=lambda run: run.value or 0.0, default=None)


def varied_settings(runs: Sequence[ComparedRun]) -> list[str]:
    """Return the settings in which the runs differ, without runs that have not begun."""
    begun = [run.settings for run in runs if run.settings]
    names = dict.fromkeys(name for settings in begun for name in settings)
    return [name for name in names if len({setting_text(settings.get(name)) for settings in begun}) > 1]


def setting_text(value: Any) -> str:
    """Return a setting as text."""
    if value is None or value == "":
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)


def pareto_front(gain_R: NDArray, thrift_R: NDArray) -> NDArray[np.intp]:
    """Return the Pareto front: the runs that no other run beats in one value without being worse in the other.

    Higher is better in both. The runs are sorted by falling thrift.
    """
    order_R = np.lexsort((-gain_R, -thrift_R))
    best_before_R = np.maximum.accumulate(np.concatenate([[-np.inf], gain_R[order_R][:-1]]))
    return order_R[gain_R[order_R] > best_before_R]


def common_epoch(runs: Sequence[ComparedRun]) -> int:
    """Return the last epoch that every run with a history reached, without failed runs; 0 if there is none."""
    return min((int(run.rows[-1]["epoch"]) for run in runs if run.rows and run.state != "failed"), default=0)


def rivals_of(winner: ComparedRun, runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """Return the other runs whose accuracy is within the winner's 95 % interval."""
    if not winner.best or winner.best.get("accuracy") is None:
        return []
    lowest = winner.best["accuracy"] - INTERVAL_ERRORS * winner.best["accuracy_std"]
    others = [run for run in runs if run is not winner and run.state != "failed" and run.best]
    return [run for run in others if ((run.best or {}).get("accuracy") or 0.0) >= lowest]


def setting_effects(runs: Sequence[ComparedRun]) -> list[Effect]:
    """Return the effect of each value of each varied setting that has at least two measured values.

    Gains come from a least-squares fit of the accuracies at the common epoch, with one term per setting. So missing
    combinations and trials that were stopped early do not bias them.
    """
    epoch = common_epoch(runs)
    runs = [run for run in runs if run.state != "failed"]
    accuracies = [_at(run, epoch).get("accuracy") for run in runs]
    measured = [run for run, accuracy in zip(runs, accuracies, strict=True) if accuracy is not None]
    accuracy_R = np.array([accuracy for accuracy in accuracies if accuracy is not None])
    columns = [
        (setting, value)
        for setting in varied_settings(measured)
        for value in dict.fromkeys(setting_text(run.settings.get(setting)) for run in measured)
    ]
    if not columns:
        return []
    design_RC = np.array(
        [[setting_text(run.settings.get(setting)) == value for setting, value in columns] for run in measured], float
    )
    gains = _gains(design_RC, accuracy_R, [setting for setting, _ in columns])
    effects = []
    for (setting, value), gain, member_R in zip(columns, gains, design_RC.T == 1, strict=True):
        members = [run for run, is_member in zip(measured, member_R, strict=True) if is_member]
        rates = [run.images_per_s for run in members if run.images_per_s]
        effects.append(
            Effect(
                setting=setting,
                value=value,
                num_runs=len(members),
                accuracy=float(accuracy_R[member_R].mean()),
                gain=gain,
                best_accuracy=float(np.mean([run.best["accuracy"] for run in members if run.best])),
                images_per_s=float(np.mean(rates)) if rates else None,
            )
        )
    return effects


def _at(run: ComparedRun, epoch: int) -> Mapping[str, Any]:
    return next((row for row in run.rows if row["epoch"] == epoch), {})


def _gains(design_RC: NDArray, accuracy_R: NDArray, setting_C: Sequence[str]) -> list[float | None]:
    """Return the term of each column minus the mean of its setting's terms; None where the fit is not unique."""
    full = np.column_stack([np.ones(len(design_RC)), design_RC])
    inverse = np.linalg.pinv(full)
    terms, determined = inverse @ accuracy_R, inverse @ full
    gains: list[float | None] = []
    for place, setting in enumerate(setting_C, start=1):
        same = np.array([False, *(other == setting for other in setting_C)], float)
        contrast = -same / same.sum()
        contrast[place] += 1
        is_told = np.abs(contrast @ determined - contrast).max() < _EPSILON
        gains.append(float(contrast @ terms) if is_told else None)
    return gains
