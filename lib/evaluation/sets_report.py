"""The table of verification sets that papers print, for the log and as a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.evaluation import plots
from lib.evaluation.curves import FARS, RocCurve, far_key
from lib.evaluation.published_sets import about_table
from lib.evaluation.report import DASH, Plot, Table, percent, render

PROTOCOLS = {
    "ours": "the exact best threshold of the other folds; \N{PLUS-MINUS SIGN} one standard error; in brackets 95 % "
    "intervals by resampling people, as far as the set tells who is who",
    "insightface": "10 folds in file order, thresholds on squared distances in steps of 0.01; "
    "\N{PLUS-MINUS SIGN} the standard deviation over the folds",
}


def set_rows(model: Mapping[str, Any], *, intervals: bool = False) -> list[list[str]]:
    """Return a line for each set and one for their mean: accuracy, AUC, EER and TAR@FAR, in percent."""
    rows = []
    for one in model["sets"]:
        accuracy = f"{100 * one['accuracy']:.2f} \N{PLUS-MINUS SIGN} {100 * one['accuracy_std']:.2f}"
        if intervals and one["intervals"] and (found := one["intervals"]["accuracy"]):
            accuracy += f" ({100 * found[0]:.2f} to {100 * found[1]:.2f})"
        rows.append([one["name"], f"{one['num_pairs']:,}", accuracy, *_others(one)])
    if len(rows) > 1:
        mean = model["mean"]
        rows.append(["mean", f"{mean['num_pairs']:,}", f"{100 * mean['accuracy']:.2f}", *_others(mean)])
    return rows


def _others(figures: Mapping[str, Any]) -> list[str]:
    values = [figures["auc"], figures["eer"], *(figures["tar_at_far"][far_key(far)] for far in FARS)]
    return [DASH if value is None else f"{100 * value:.2f}" for value in values]


HEADER = ("Set", "Pairs", "Accuracy, %", "AUC", "EER", *(f"TAR@FAR {far_key(far)}" for far in FARS))


def text_table(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the table for a terminal."""
    lines = []
    for model in models:
        rows = [list(HEADER), *set_rows(model)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines.append(f"{model['name']}:")
        lines += [
            "  ".join(
                cell.ljust(width) if n == 0 else cell.rjust(width)
                for n, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
    return lines


def sets_page(metrics: Mapping[str, Any], curves: Mapping[str, Mapping[str, RocCurve]]) -> bytes:
    """Return the report as HTML. `curves` holds the curve of each model for each set."""
    models = metrics["models"]
    text = f"Protocol {metrics['protocol']}: {PROTOCOLS[metrics['protocol']]}. A dash: too few pairs to tell."
    folds = [
        Table(
            title=f"Folds: {model['name']}",
            text="Accuracy of each fold, and the threshold that the other folds chose for it"
            + (" (squared distance)." if metrics["protocol"] == "insightface" else " (Euclidean distance)."),
            header=["Set", *(str(n) for n in range(1, 1 + max(len(one["fold_accuracies"]) for one in model["sets"])))],
            rows=[
                [
                    one["name"],
                    *(
                        f"{100 * a:.2f} ({t:.2f})"
                        for a, t in zip(one["fold_accuracies"], one["fold_thresholds"], strict=True)
                    ),
                ]
                for one in model["sets"]
            ],
        )
        for model in models
    ]
    shown = [
        Table(title=model["name"], text="", header=HEADER, rows=set_rows(model, intervals=True)) for model in models
    ]
    about = about_table(metrics, {"Sets": ", ".join(metrics["pairs"])})
    return render(
        Path(__file__).parent / "sets.html.j2",
        title=" and ".join(model["name"] for model in models),
        big=[(model["name"], percent(model["mean"]["accuracy"]), len(model["sets"])) for model in models],
        text=text,
        notes=metrics["notes"],
        figures=shown,
        about=about,
        plots=[_roc(name, of_set) for name, of_set in curves.items()],
        tables=folds,
    )


def _roc(name: str, of_set: Mapping[str, RocCurve]) -> Plot:
    content = plots.roc_plot({f"{name}: {model}": curve for model, curve in of_set.items()})
    return Plot(name=f"ROC: {name}", content=content)
