"""Figures of the report as PNG files, drawn without a screen and without global state.

Shapes: P pairs, T points of a curve.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray
from scipy.special import ndtri

from lib.evaluation.curves import RocCurve, auc, eer

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
"""Colours of a few things, such as the models of a report."""
MANY_COLORS = tuple(matplotlib.colormaps["tab20"](n) for n in range(20))
"""Colours of the runs of a comparison."""
SAME_COLOR, DIFFERENT_COLOR = "#0072b2", "#e69f00"
"""Colours of same and different pairs, which colour-blind readers can tell apart."""
DPI = 110
RATE_TICKS = (0.0001, 0.001, 0.01, 0.05, 0.2, 0.5, 0.8)
NUM_BINS = 60
MAX_NAMES = 20
"""Largest number of lines or points with a name in a figure."""
MAX_NAME = 28
"""Largest number of letters of a name in a figure."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A run as a point in a figure."""

    x: float
    y: float
    y_error: float
    """Half of the interval that is drawn."""
    name: str
    is_marked: bool = False


def roc_plot(curves: Mapping[str, RocCurve]) -> bytes:
    """Return the ROC curves: true accept rate over false accept rate, the latter on a logarithmic axis."""
    figure, axes = _figure("False accept rate", "True accept rate", "ROC")
    lowest = min(1 / curve.num_different for curve in curves.values())
    for color, (name, curve) in zip(COLORS, curves.items(), strict=False):
        label = f"{name} (AUC {float(auc(curve.far_T, curve.tar_T)):.4f})"
        axes.step(np.maximum(curve.far_T, lowest / 2), curve.tar_T, where="post", label=label, color=color)
    axes.set(xscale="log", xlim=(lowest / 2, 1), ylim=(0, 1.01))
    axes.legend(loc="lower right")
    return _png(figure)


def det_plot(curves: Mapping[str, RocCurve]) -> bytes:
    """Return the DET curves (Martin et al. 1997): both error rates on normal-deviate axes."""
    figure, axes = _figure("False accept rate", "False reject rate", "DET")
    for color, (name, curve) in zip(COLORS, curves.items(), strict=False):
        edges = (0.5 / curve.num_different, 0.5 / curve.num_same)
        far_T, frr_T = (
            ndtri(np.clip(rate_T, edge, 1 - edge))
            for rate_T, edge in zip((curve.far_T, 1 - curve.tar_T), edges, strict=True)
        )
        label = f"{name} (EER {100 * float(eer(curve.far_T, curve.tar_T)):.2f} %)"
        axes.plot(far_T, frr_T, label=label, color=color)
    # No lower than there are pairs to tell of: one error among them all is the last thing that is seen.
    lowest = min(1 / max(curve.num_different, curve.num_same) for curve in curves.values())
    ticks = RATE_TICKS[max(0, int(np.searchsorted(RATE_TICKS, lowest, side="right")) - 1) :]
    places, labels = ndtri(ticks), [f"{100 * tick:g} %" for tick in ticks]
    axes.set_xticks(places, labels)
    axes.set_yticks(places, labels)
    axes.set(xlim=(places[0], places[-1]), ylim=(places[0], places[-1]))
    axes.plot(places, places, color="grey", linestyle=":", linewidth=1)  # where both rates are equal
    axes.legend(loc="upper right")
    return _png(figure)


def histogram_plot(name: str, distances_P: NDArray, same_P: NDArray[np.bool_], threshold: float) -> bytes:
    """Return the histograms of the distances of same and of different pairs, with the threshold."""
    figure, axes = _figure("Euclidean distance", "Density", f"Distances: {name}")
    finite_P = np.isfinite(distances_P)
    bins = np.histogram_bin_edges(distances_P[finite_P], NUM_BINS)
    for kind_P, label, color in ((same_P, "same person", SAME_COLOR), (~same_P, "different people", DIFFERENT_COLOR)):
        values = distances_P[finite_P & kind_P]
        if len(values):
            axes.hist(values, list(bins), density=True, alpha=0.55, label=label, color=color)
    axes.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.3f}")
    axes.legend(loc="upper right")
    return _png(figure)


def history_plot(
    title: str,
    y_label: str,
    epochs: Sequence[float],
    lines: Mapping[str, Sequence[float | None]],
    *,
    is_logarithmic: bool = False,
) -> bytes:
    """Return figures of a training run over its epochs, with a gap at epochs without one."""
    figure, axes = _figure("Epoch", y_label, title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for name, values in lines.items():
        axes.plot(epochs, [np.nan if value is None else value for value in values], marker=".", label=name)
    if is_logarithmic:
        axes.set_yscale("log", nonpositive="mask")
    axes.legend(loc="upper right", fontsize="small")
    return _png(figure)


def front_plot(title: str, x_label: str, points: Sequence[Point], front: Sequence[int]) -> bytes:
    """Return accuracy in percent, with its interval, over a cost on a logarithmic axis. A line joins `front`."""
    figure, axes = _figure(x_label, "Validation accuracy, %", title)
    axes.plot(
        [points[n].x for n in front], [points[n].y for n in front], color="black", linewidth=1.2, label="Pareto front"
    )
    for n, point in enumerate(points):
        color = MANY_COLORS[n % len(MANY_COLORS)]
        is_on_front = n in front
        axes.errorbar(
            point.x,
            point.y,
            yerr=point.y_error,
            fmt="*" if point.is_marked else "o",
            markersize=14 if point.is_marked else 7,
            markeredgecolor="black" if is_on_front else color,
            color=color,
            ecolor=color,
            elinewidth=1,
            capsize=3,
            zorder=3 if is_on_front else 2,
        )
        if len(points) <= MAX_NAMES or is_on_front:
            axes.annotate(_short(point.name), (point.x, point.y), xytext=(7, 4), textcoords="offset points", fontsize=7)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.15)
    axes.legend(loc="lower left", fontsize="small")
    return _png(figure)


def curves_plot(title: str, y_label: str, lines: Mapping[str, Sequence[tuple[int, float]]], highlighted: str) -> bytes:
    """Return a figure of many runs over their epochs, given as (epoch, value)."""
    figure, axes = _figure("Epoch", y_label, title)
    for n, (name, values) in enumerate(lines.items()):
        epochs, figures = [epoch for epoch, _ in values], [value for _, value in values]
        is_named = len(lines) <= MAX_NAMES or name == highlighted
        axes.plot(
            epochs,
            figures,
            marker=".",
            color=MANY_COLORS[n % len(MANY_COLORS)],
            linewidth=2.5 if name == highlighted else 1,
            label=_short(name) if is_named and values else None,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper right", fontsize=7)
    return _png(figure)


def settings_plot(title: str, y_label: str, groups: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """Return the value of each run over the values of each setting, with their means."""
    figure, axes = _figure("", y_label, title)
    places: list[int] = []
    labels: list[str] = []
    place = 0
    for n, (setting, values) in enumerate(groups.items()):
        for value, figures in values.items():
            color = COLORS[n % len(COLORS)]
            axes.plot([place] * len(figures), figures, "o", color=color, alpha=0.5, markersize=5)
            axes.plot([place - 0.3, place + 0.3], [np.mean(figures)] * 2, color=color, linewidth=2.5)
            places.append(place)
            labels.append(f"{setting}\n{_short(value)}")
            place += 1
        place += 1
    axes.set_xticks(places, labels, rotation=30 if len(places) <= 6 else 75, ha="right", fontsize=7)
    return _png(figure)


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


def _figure(x_label: str, y_label: str, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.grid(alpha=0.3)
    return figure, axes


def _png(figure: Figure) -> bytes:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=DPI, metadata={"Software": None})
    return sink.getvalue()
