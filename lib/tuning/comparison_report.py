"""The page that compares runs: one HTML file with tables and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lib.evaluation import plots
from lib.evaluation.plots import Point
from lib.evaluation.report import DASH, Plot, Table, number, percent, render
from lib.tuning.compared_runs import (
    INTERVAL_ERRORS,
    ComparedRun,
    State,
    common_epoch,
    pareto_front,
    rivals_of,
    setting_effects,
    setting_text,
    varied_settings,
    winner_of,
)

STATE_TEXT: Mapping[State, str] = {
    "finished": "finished",
    "stopped": "stopped early",
    "failed": "FAILED",
    "unfinished": "going on, or interrupted",
}


def page(title: str, runs: Sequence[ComparedRun], notes: Sequence[str]) -> bytes:
    """Return the page that compares the runs."""
    winner = winner_of(runs)
    varied = varied_settings(runs)
    rivals = rivals_of(winner, runs) if winner else []
    if rivals:
        notes = [*notes, f"within its interval lie also {', '.join(run.name for run in rivals)}"]
    first = next((run.settings for run in runs if run.settings), {})
    equal = {name: setting_text(value) for name, value in first.items()}
    return render(
        Path(__file__).with_name("comparison.html.j2"),
        title=title,
        runs=runs,
        winner=winner,
        winner_text=_figures(winner) if winner else "",
        winner_settings={name: setting_text(winner.settings.get(name)) for name in varied} if winner else {},
        notes=notes,
        plots=_plots(runs, winner),
        tables=[_runs_table(runs, varied, winner), *_effects_tables(runs)],
        equal={name: text for name, text in equal.items() if name not in (*varied, "fingerprint")},
    )


def _figures(run: ComparedRun) -> str:
    accuracy = run.best.get("accuracy") if run.best else None
    if not run.best or accuracy is None:
        return f"{run.value:.4f}"
    return f"{percent(accuracy)} ± {percent(INTERVAL_ERRORS * run.best['accuracy_std'])}"


def _runs_table(runs: Sequence[ComparedRun], varied: Sequence[str], winner: ComparedRun | None) -> Table:
    header = ["run", "state", *(name.replace("_", " ") for name in varied), "epochs", "best epoch"]
    header += ["accuracy, 95 %", "AUC", "loss, random", "images/s", "parameters", "minutes", "why it ended"]
    rows = []
    for run in sorted(runs, key=lambda run: (run.value is None, -(run.value or 0.0))):
        best = run.best or {}
        rate = run.images_per_s
        rows.append(
            [
                run.name + (" (winner)" if run is winner else ""),
                STATE_TEXT[run.state],
                *(setting_text(run.settings.get(name)) for name in varied),
                str(len(run.rows)),
                number(best.get("epoch")),
                _figures(run) if best.get("accuracy") is not None else DASH,
                number(best.get("auc")),
                number(best.get("val_loss_random")),
                DASH if rate is None else f"{rate:.1f}",
                number(run.num_parameters),
                f"{sum(float(row.get('time_min') or 0) for row in run.rows):.1f}",
                run.reason,
            ]
        )
    text = "The best first. Images a second while training, with all that ran beside it; minutes of its epochs."
    return Table(title="Runs and settings", text=text, header=header, rows=rows)


def _effects_tables(runs: Sequence[ComparedRun]) -> list[Table]:
    effects = setting_effects(runs)
    if not effects:
        return []
    text = (
        f"Accuracy after epoch {common_epoch(runs)}, the last that all runs have reached. Gain: over the mean of the "
        "setting's values, all other settings equal, in points; a dash where the runs cannot tell them apart."
    )
    rows = [
        [
            effect.setting.replace("_", " "),
            effect.value,
            str(effect.num_runs),
            percent(effect.accuracy),
            DASH if effect.gain is None else f"{100 * effect.gain:+.2f}",
            percent(effect.best_accuracy),
            DASH if effect.images_per_s is None else f"{effect.images_per_s:.1f}",
        ]
        for effect in effects
    ]
    header = ["setting", "value", "runs", "mean accuracy", "gain", "mean of best epochs", "images/s"]
    return [Table(title="What each setting did on average", text=text, header=header, rows=rows)]


def _plots(runs: Sequence[ComparedRun], winner: ComparedRun | None) -> list[Plot]:
    made = []
    measured = [run for run in runs if run.best and run.best.get("accuracy") is not None and run.state != "failed"]
    tags = _tags([run.name for run in runs])
    for title, label, value_of, sign in (
        ("Accuracy against speed", "Images a second while training", lambda run: run.images_per_s, 1),
        ("Accuracy against size", "Parameters", lambda run: run.num_parameters, -1),
    ):
        shown = [run for run in measured if value_of(run)]
        if not shown:
            continue
        points = [_point(run, tags[run.name], float(value_of(run)), run is winner) for run in shown]
        front = pareto_front(np.array([point.y for point in points]), np.array([sign * point.x for point in points]))
        made.append(Plot(name=title, content=plots.front_plot(title, label, points, front.tolist())))
    for title, label, key in (
        ("Curves: accuracy", "Validation accuracy, %", "accuracy"),
        ("Curves: loss", "Validation loss, random negatives", "val_loss_random"),
        ("Curves: training loss", "Training loss", "train_loss"),
    ):
        scale = 100 if key == "accuracy" else 1
        lines = {
            run.name: [(int(row["epoch"]), scale * row[key]) for row in run.rows if row.get(key) is not None]
            for run in runs
        }
        if any(lines.values()):
            highlighted = winner.name if winner else ""
            made.append(Plot(name=title, content=plots.curves_plot(title, label, lines, highlighted)))
    groups: dict[str, dict[str, list[float]]] = {}
    for setting in varied_settings(measured):
        for run in measured:
            value = setting_text(run.settings.get(setting))
            groups.setdefault(setting.replace("_", " "), {}).setdefault(value, []).append(
                100 * float((run.best or {})["accuracy"])
            )
    if groups:
        title = "Best accuracy by setting"
        made.append(Plot(name=title, content=plots.settings_plot(title, "Validation accuracy, %", groups)))
    return made


def _tags(names: Sequence[str]) -> dict[str, str]:
    """Return short names for a figure: the numbers of a sweep's trials, if each run has its own."""
    numbers = [name.partition("-")[0] for name in names]
    if all(number.isdecimal() for number in numbers) and len(set(numbers)) == len(names):
        return dict(zip(names, numbers, strict=True))
    return dict(zip(names, names, strict=True))


def _point(run: ComparedRun, tag: str, x: float, is_winner: bool) -> Point:
    best = run.best or {}
    error = 100 * INTERVAL_ERRORS * float(best.get("accuracy_std") or 0.0)
    return Point(x=x, y=100 * float(best["accuracy"]), y_error=error, name=tag, is_marked=is_winner)
