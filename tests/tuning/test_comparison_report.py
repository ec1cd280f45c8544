"""The page that compares runs: what it computes, and what a browser shows of it."""

import dataclasses
import itertools
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.tuning.compared_runs import (
    ComparedRun,
    common_epoch,
    pareto_front,
    rivals_of,
    setting_effects,
    varied_settings,
    winner_of,
)
from lib.tuning.comparison_report import page
from tests.browser import screenshot

HOSTILE = "<script>alert(1)</script>'\"&\udcff"
STAR = (0x1F, 0x77, 0xB4)
"""The first colour of the figures, which is the winner's here."""


def made_run(name: str, accuracies: list[float], rate: float = 100.0, **more: Any) -> ComparedRun:
    """Return a finished run with these accuracies, an epoch each."""
    rows = [
        {
            "epoch": n,
            "accuracy": accuracy,
            "accuracy_std": 0.01,
            "auc": accuracy,
            "val_loss_random": 1 - accuracy,
            "train_loss": 1.1 - accuracy,
            "images_per_s": rate,
            "time_min": 0.5,
        }
        for n, accuracy in enumerate(accuracies, start=1)
    ]
    best = max(rows, key=lambda row: row["accuracy"], default=None)
    fields: dict[str, Any] = {
        "url": f"runs/{name}",
        "state": "finished",
        "reason": "",
        "settings": {},
        "value": best and best["accuracy"],
        "num_parameters": 1_000_000,
        **more,
    }
    return ComparedRun(name=name, rows=rows, best=best, **fields)


@pytest.fixture(scope="module")
def runs() -> list[ComparedRun]:
    """Return twelve runs of three backbones, two rates and two margins; one failed, two were stopped early."""
    rng = np.random.default_rng(0)
    made = []
    worth = {"convnext_tiny": 0.08, "efficientnet_b1": 0.05, "mobilenetv4_conv_small": 0.0}
    size = {"convnext_tiny": 28_000_000, "efficientnet_b1": 7_000_000, "mobilenetv4_conv_small": 2_500_000}
    for n, (backbone, lr, margin) in enumerate(itertools.product(worth, (3e-4, 1e-3), (0.2, 0.5))):
        final = 0.8 + worth[backbone] - (0.03 if lr == 1e-3 else 0.0) + rng.normal(0, 0.005)
        early = n in (3, 7)
        epochs = 2 if early else 6
        accuracies = [float(final - 0.2 * 0.5**epoch) for epoch in range(epochs)]
        more: dict[str, Any] = {"settings": {"backbone": backbone, "lr": lr, "margin": margin, "epochs": 6}}
        more["num_parameters"] = size[backbone]
        if early:
            more |= {"state": "stopped", "reason": "not in the best 1/3"}
        if n == 9:
            more |= {"state": "failed", "reason": f"the loss is not finite {HOSTILE}"}
        made.append(made_run(f"{n:03d}-{backbone}-lr{lr}", accuracies, 3e9 / size[backbone] / (n + 20), **more))
    return made


def test_the_winner_is_the_best_that_has_not_failed(runs: list[ComparedRun]) -> None:
    best = winner_of(runs)
    assert best is not None
    assert best.value == max(run.value or 0 for run in runs if run.state != "failed")
    failed = made_run("failed", [0.99], state="failed", reason="x")
    assert winner_of([*runs, failed]) is best
    assert winner_of([failed, made_run("new", [])]) is None


def test_rivals_are_within_the_interval_of_the_winner() -> None:
    winner, near, far = made_run("a", [0.90]), made_run("b", [0.885]), made_run("c", [0.87])
    assert rivals_of(winner, [winner, near, far, made_run("d", [])]) == [near]


def test_the_front_is_what_brute_force_says() -> None:
    rng = np.random.default_rng(1)
    gain_R, thrift_R = rng.integers(0, 12, (2, 60)).astype(float)
    points = list(zip(gain_R, thrift_R, strict=True))
    undominated = {
        point for point in points if not any(a >= point[0] and b >= point[1] and (a, b) != point for a, b in points)
    }
    front = pareto_front(gain_R, thrift_R)
    assert {points[n] for n in front} == undominated
    assert len(front) == len(undominated)
    assert list(thrift_R[front]) == sorted(thrift_R[front], reverse=True)


def test_effects_are_measured_at_the_epoch_that_all_have_reached(runs: list[ComparedRun]) -> None:
    assert common_epoch(runs) == common_epoch([*runs, made_run("failed", [0.5], state="failed")]) == 2
    assert varied_settings([*runs, made_run("not begun", [])]) == ["backbone", "lr", "margin"]
    whole = [dataclasses.replace(run, state="finished") for run in runs]
    effects = {(effect.setting, effect.value): effect for effect in setting_effects(whole)}
    slow = [run.rows[1]["accuracy"] for run in runs if run.settings["lr"] == 1e-3]
    fast = [run.rows[1]["accuracy"] for run in runs if run.settings["lr"] == 3e-4]
    assert effects["lr", "0.001"].accuracy == pytest.approx(np.mean(slow))
    # In a full design all other settings are equal on average, so the gain is half of the means' difference.
    assert effects["lr", "0.0003"].gain == pytest.approx((np.mean(fast) - np.mean(slow)) / 2)
    assert effects["lr", "0.001"].gain == pytest.approx(-(effects["lr", "0.0003"].gain or 0))
    assert effects["backbone", "convnext_tiny"].num_runs == 4


def test_a_gain_does_not_follow_from_what_else_the_runs_had() -> None:
    worth = {"a": 0.0, "b": 0.1}
    drawn = [("a", 1), ("a", 2), ("b", 2), ("b", 2)]  # b mostly with 2, which is worth 0.3
    made = [
        made_run(f"{n}", [0.5 + worth[x] + 0.3 * (y == 2)], settings={"x": x, "y": y}) for n, (x, y) in enumerate(drawn)
    ]
    gains = {(effect.setting, effect.value): effect.gain for effect in setting_effects(made)}
    assert gains["x", "b"] == pytest.approx(0.05)
    assert gains["y", "2"] == pytest.approx(0.15)


def test_settings_that_always_change_together_have_no_gain_of_their_own() -> None:
    made = [made_run(f"{n}", [0.5 + 0.1 * n], settings={"x": n, "y": -n, "z": n % 2}) for n in (0, 1, 2, 3)]
    gains = {effect.setting: effect.gain for effect in setting_effects(made)}
    assert gains == {"x": None, "y": None, "z": None}


def test_the_page_names_settings_failures_and_asks_for_nothing(runs: list[ComparedRun]) -> None:
    text = page("a sweep", runs, [f"one failed {HOSTILE}"]).decode()
    assert "<script" not in text
    assert "FAILED" in text
    assert "stopped early" in text
    assert "28,000,000" in text
    assert "What each setting did on average" in text
    assert "epochs <b>6</b>" in text
    sources = re.findall(r'(?:src|href)="([^"]{1,30})', text)
    assert len(sources) == 6
    assert all(source.startswith("data:image/") for source in sources)


def test_runs_without_figures_make_a_page_too() -> None:
    text = page("new", [made_run("new", []), made_run("other", [])], []).decode()
    assert "No run has a figure yet" in text


def test_a_browser_shows_the_front_and_the_table(runs: list[ComparedRun], tmp_path: Path) -> None:
    pixels = screenshot(page("a sweep é", runs, ["a note"]), tmp_path, height=2600)
    if keep := os.environ.get("KEEP_SCREENSHOTS"):
        (tmp_path / "screen.png").rename(Path(keep) / "comparison.png")
    assert pixels.shape == (2600, 1150, 3)
    assert (np.abs(pixels - STAR).max(axis=2) < 25).sum() > 300
    assert (pixels.max(axis=2) < 60).sum() > 10_000  # text, and the black line of the front
