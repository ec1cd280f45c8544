"""Figures of the report as PNG files, drawn without a screen and without global state.

Shapes: P pairs, T points of a curve.
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy.special import ndtri

from lib.evaluation.curves import RocCurve, auc, eer

COLORS = ("#1f77b4", "#d62728")
"""Of the models."""
SAME_COLOR, DIFFERENT_COLOR = "#0072b2", "#e69f00"
"""Of the kinds of pairs, for colour-blind eyes too."""
DPI = 110
RATE_TICKS = (0.0001, 0.001, 0.01, 0.05, 0.2, 0.5, 0.8)
NUM_BINS = 60


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
    axes.legend()
    return _png(figure)


def history_plot(
    title: str, y_label: str, epochs: Sequence[float], lines: Mapping[str, Sequence[float | None]]
) -> bytes:
    """Return figures of a training run over its epochs; a gap where an epoch has none."""
    figure, axes = _figure("Epoch", y_label, title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for name, values in lines.items():
        axes.plot(epochs, [np.nan if value is None else value for value in values], marker=".", label=name)
    axes.legend(fontsize="small")
    return _png(figure)


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
