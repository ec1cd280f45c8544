"""The report of an evaluation: one HTML file with its pictures inside, which needs no network and runs no script."""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np

from lib.evaluation.curves import FARS, far_key
from lib.faces.images import to_jpeg

_TEMPLATES = Path(__file__).parent
_THUMBNAIL, _THUMBNAIL_QUALITY = 120, 85

DASH = "\N{EN DASH}"


@dataclass(frozen=True, kw_only=True)
class ShownPhoto:
    """A photo in the report. `crop` is its aligned face as an encoded picture, None if it has no face."""

    name: str
    identity: str
    crop: bytes | None


@dataclass(frozen=True, kw_only=True)
class ShownPair:
    """Two photos side by side."""

    a: ShownPhoto
    b: ShownPhoto
    distance: float


@dataclass(frozen=True, kw_only=True)
class PairSection:
    """A section of pairs."""

    title: str
    text: str
    pairs: Sequence[ShownPair]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A figure, as PNG."""

    name: str
    content: bytes


@dataclass(frozen=True, kw_only=True)
class Table:
    """A section with a table of text."""

    title: str
    text: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the page shows. `models` are entries of `metrics.json`."""

    title: str
    models: Sequence[Mapping[str, Any]]
    about: Table
    notes: Sequence[str] = ()
    difference: str = ""
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()
    pair_sections: Sequence[PairSection] = field(default_factory=tuple)


def html(report: Report) -> bytes:
    """Return the page."""
    shown = {part.name: getattr(report, part.name) for part in dataclasses.fields(report)}
    return render(_TEMPLATES / "report.html.j2", **shown, figures=_figures(report.models))


def render(template: Path, **shown: Any) -> bytes:
    """Return a page from its template, which may extend the templates of this folder.

    Every text in it is escaped, because names of photos and people can hold anything.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.globals.update(png=_png, jpeg=_jpeg, percent=percent)
    page = environment.get_template(template.name).render(shown)
    # Names can hold lone surrogates, which stand for bytes that are not UTF-8.
    return page.encode("utf-8", "backslashreplace")


def percent(value: float | None) -> str:
    """Return a share as text, in percent."""
    return DASH if value is None else f"{100 * value:.2f} %"


def number(value: float | None) -> str:
    """Return a figure as text: a count in full, anything else with four digits."""
    if value is None:
        return DASH
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _figures(models: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of figures: a label, and one text per model."""

    def with_interval(value: float | None, interval: Sequence[float] | None) -> str:
        return percent(value) + (f" ({percent(interval[0])} to {percent(interval[1])})" if interval else "")

    rows: list[list[str]] = []
    for label, name in (("Accuracy", "accuracy"), ("ROC AUC", "auc"), ("Equal error rate", "eer")):
        rows.append([label, *(with_interval(model[name], model["intervals"][name]) for model in models)])
    rows.insert(1, ["Accuracy of the folds (how many)", *(_folds(model["fold_accuracies"]) for model in models)])
    for key in map(far_key, FARS):
        cells = [with_interval(model["tar_at_far"][key], model["intervals"]["tar_at_far"][key]) for model in models]
        rows.append([f"TAR at FAR {key}", *cells])
    for label, name in (("Rank-1 identification", "rank_1"), ("Rank-5 identification", "rank_5")):
        rows.append([label, *(percent(model["identification"][name]) for model in models)])
    points = [model.get("operating_point") for model in models]
    if any(points):
        for label, name in (("FAR", "far"), ("TAR", "tar")):
            cells = [with_interval(point[name], point[f"{name}_interval"]) if point else DASH for point in points]
            rows.append([f"{label} at the threshold chosen by --at-far", *cells])
        chosen = [number(point["threshold"]) if point else DASH for point in points]
        rows.append(["Threshold chosen by --at-far (Euclidean distance)", *chosen])
    for label, name in (
        ("Best threshold (Euclidean distance)", "threshold"),
        ("Threshold kept in the model", "model_threshold"),
        ("Pairs", "num_pairs"),
        ("Pairs with a photo without a face (counted as errors)", "num_failed_pairs"),
        ("Pairs that name missing photos (left out)", "num_missing_pairs"),
    ):
        rows.append([label, *(number(model[name]) for model in models)])
    text = "In brackets: 95 % intervals by resampling people. A dash: too few pairs to tell, or nothing kept."
    return Table(title="Figures", text=text, header=["", *(str(model["name"]) for model in models)], rows=rows)


def _folds(accuracies: Sequence[float]) -> str:
    return f"{percent(min(accuracies))} to {percent(max(accuracies))} ({len(accuracies)})"


def _png(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _jpeg(crop: bytes) -> str:
    """Return a small copy of a crop, so that the page stays small."""
    pixels = cv2.imdecode(np.frombuffer(crop, np.uint8), cv2.IMREAD_COLOR)
    small = cv2.resize(pixels, (_THUMBNAIL, _THUMBNAIL), interpolation=cv2.INTER_AREA)
    return "data:image/jpeg;base64," + base64.b64encode(to_jpeg(small, _THUMBNAIL_QUALITY)).decode()
