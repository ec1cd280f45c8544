"""The tables of papers on IJB, for the log and as a page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.evaluation import plots
from lib.evaluation.curves import RocCurve, far_key
from lib.evaluation.ijb_identification import FPIRS, RANKS, tpir_key
from lib.evaluation.ijb_verification import IJB_FARS
from lib.evaluation.published_sets import about_table
from lib.evaluation.report import DASH, Plot, Table, percent, render

PROTOCOLS = {
    "ours": "every image of a media counts the same; in brackets 95 % intervals by resampling people. A dash: too few "
    "pairs or probes to tell, fewer than ten false accepts",
    "insightface": "every image counts as much as the score of its detector, as published figures are made. A dash: "
    "not one false accept",
}
SEARCHES = (
    "Rank: of the probes whose subject is in the gallery. FPIR: share of the other probes that find somebody above the "
    "threshold; TPIR: share of the first that find their own subject above it. Together: one gallery of all subjects, "
    "with the threshold that as many wrong subjects pass as FPIR times the number of probes."
)
VERIFICATION = ("Model", "AUC", "EER", *(f"TAR@FAR {far_key(far)}" for far in IJB_FARS))
IDENTIFICATION = ("Gallery", *(f"Rank {rank}" for rank in RANKS), *(f"TPIR@FPIR {fpir:g}" for fpir in FPIRS))
_NAMES = (*(f"rank_{rank}" for rank in RANKS), *(tpir_key(fpir) for fpir in FPIRS))


def verification_rows(models: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return a line for each model: AUC, EER and TAR@FAR in percent, with intervals if there are any."""
    rows = []
    for model in models:
        figures = model["verification"]
        tars = [
            _cell(figures["tar_at_far"][key], figures["intervals"] and figures["intervals"]["tar_at_far"][key])
            for key in map(far_key, IJB_FARS)
        ]
        rows.append([model["name"], _cell(figures["auc"]), _cell(figures["eer"]), *tars])
    return rows


def identification_rows(model: Mapping[str, Any]) -> list[list[str]]:
    """Return a line for each gallery, for their mean and for the joint gallery, in percent."""
    found = model["identification"]
    rows = [
        [name, *(_cell(each[figure], each["intervals"] and each["intervals"][figure]) for figure in _NAMES)]
        for name, each in found["galleries"].items()
    ]
    rows.append(["mean", *(_cell(found["mean"][figure]) for figure in _NAMES)])
    rows.append(["together", *(_cell(found["together"][figure]) for figure in _NAMES)])
    return rows


def _cell(value: float | None, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return DASH
    return f"{100 * value:.2f}" + (f" ({100 * interval[0]:.2f} to {100 * interval[1]:.2f})" if interval else "")


def text_tables(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the tables for a terminal, without intervals."""
    lines = _aligned([VERIFICATION, *verification_rows(models)])
    for model in models:
        if model["identification"]:
            lines += [f"{model['name']}, identification:", *_aligned([IDENTIFICATION, *identification_rows(model)])]
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    short = [[cell.partition(" (")[0] if n else cell for n, cell in enumerate(row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*short, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in short
    ]


def ijb_page(metrics: Mapping[str, Any], curves: Mapping[str, RocCurve]) -> bytes:
    """Return the report as HTML; `curves` holds the curve of each model."""
    models = metrics["models"]
    verified = models[0]["verification"]
    text = (
        f"{verified['num_same_pairs']:,} pairs of templates of one person, {verified['num_different_pairs']:,} of two. "
        f"Protocol {metrics['protocol']}: {PROTOCOLS[metrics['protocol']]}."
    )
    figures = [Table(title="Verification, %", text="", header=VERIFICATION, rows=verification_rows(models))]
    figures += [
        Table(
            title=f"Identification, %: {model['name']}",
            text=SEARCHES,
            header=IDENTIFICATION,
            rows=identification_rows(model),
        )
        for model in models
        if model["identification"]
    ]
    return render(
        Path(__file__).parent / "ijb.html.j2",
        title=f"{metrics['set']}: {' and '.join(model['name'] for model in models)}",
        big=[(model["name"], percent(model["verification"]["tar_at_far"][far_key(1e-4)])) for model in models],
        text=text,
        notes=metrics["notes"],
        figures=figures,
        about=_about(metrics),
        plots=[Plot(name="ROC", content=plots.roc_plot(curves))],
        tables=[],
    )


def _about(metrics: Mapping[str, Any]) -> Table:
    images = f"{metrics['num_images']:,} in {metrics['images']}"
    return about_table(metrics, {"Images": images, "Templates": f"{metrics['num_templates']:,}"})
