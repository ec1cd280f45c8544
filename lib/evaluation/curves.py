"""The exact ROC curve of distances, and the metrics that come from it.

Two photos are called the same person when their distance is at most the threshold; FAR is the share of different pairs
called the same, TAR the share of same pairs called the same.

Shapes: P pairs, T thresholds (points of the curve), U runs of pairs of one kind; `*` stands for any leading dimensions.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lib.errors import UserError

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

FARS = (1e-1, 1e-2, 1e-3, 1e-4)

MIN_FALSE_ACCEPTS = 10
"""A TAR is reported only at a FAR of at least this many false accepts. With 10, the relative standard error of the FAR
is a third. With fewer, single photos decide the result."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RocCurve:
    """The corners of the curve, from (0, 0), where no pair is accepted, to (1, 1), where every pair is.

    The curve is straight between corners.
    """

    threshold_T: FloatArray
    """-inf, which accepts no pair, then the distances that occur, in rising order."""
    far_T: FloatArray
    tar_T: FloatArray
    num_same: int
    num_different: int


def roc_curve(distances_P: FloatArray, same_P: BoolArray) -> RocCurve:
    """Return the exact curve.

    Raises:
        UserError: pairs of one kind only.
    """
    num_same = int(np.count_nonzero(same_P))
    if num_same in (0, len(same_P)):
        raise UserError(f"{num_same} of {len(same_P)} pairs are of the same person: both kinds are needed")
    order_P = np.argsort(distances_P)
    sorted_P, same_P = distances_P[order_P], same_P[order_P]
    cut_T = curve_cuts(sorted_P, same_P)
    far_T, tar_T = far_and_tar(np.ones(len(same_P)), runs_of(same_P, cut_T))
    return RocCurve(
        threshold_T=np.concatenate([[-np.inf], sorted_P[cut_T[1:] - 1]]),
        far_T=far_T,
        tar_T=tar_T,
        num_same=num_same,
        num_different=len(same_P) - num_same,
    )


def curve_cuts(sorted_P: FloatArray, same_P: BoolArray) -> NDArray[np.int64]:
    """Return the number of pairs that are accepted at each corner of the curve, in rising order.

    No threshold separates equal distances. Within a run of pairs of one kind the curve is straight for any weights.
    """
    run_ends = np.append(np.flatnonzero(sorted_P[1:] != sorted_P[:-1]) + 1, len(sorted_P))
    num_pairs = np.diff(run_ends, prepend=0)
    num_same = np.diff(np.cumsum(same_P)[run_ends - 1], prepend=0)
    mixed = (num_same > 0) & (num_same < num_pairs)
    straight_on = ~mixed[:-1] & ~mixed[1:] & ((num_same[:-1] > 0) == (num_same[1:] > 0))
    return np.concatenate([[0], run_ends[:-1][~straight_on], run_ends[-1:]])


class Runs(NamedTuple):
    """Runs of pairs of one kind in rising order of distance, U of them, and the cuts T among their ends."""

    start_U: NDArray[np.int64]
    same_U: BoolArray
    cut_T: NDArray[np.int64]
    """Number of runs before each corner. A run that ends within a tie of both kinds has no corner."""


def runs_of(same_P: BoolArray, cut_T: NDArray[np.int64]) -> Runs:
    start_U = np.union1d(cut_T[:-1], np.flatnonzero(same_P[1:] != same_P[:-1]) + 1)
    return Runs(start_U, same_P[start_U], np.searchsorted(start_U, cut_T))


def far_and_tar(weights_XP: FloatArray, runs: Runs) -> tuple[FloatArray, FloatArray]:
    """Return FAR and TAR, [*, T], at the cuts; weights [*, P] in rising order of distance."""
    sum_XU = np.add.reduceat(weights_XP, runs.start_U, axis=-1)
    rates = []
    for kind_U in (~runs.same_U, runs.same_U):
        called_same_XU = np.zeros((*weights_XP.shape[:-1], len(kind_U) + 1))
        np.cumsum(sum_XU * kind_U, axis=-1, out=called_same_XU[..., 1:])
        with np.errstate(invalid="ignore"):  # a resample without one kind gives NaN and is left out of the interval
            rates.append(called_same_XU[..., runs.cut_T] / called_same_XU[..., -1:])
    return rates[0], rates[1]


def auc(far_T: FloatArray, tar_T: FloatArray) -> FloatArray:
    """Return the area [*] under curves [*, T].

    It is the probability that a same pair is nearer than a different one, with ties counted half (Fawcett 2006, An
    introduction to ROC analysis, section 7).
    """
    return np.asarray(np.trapezoid(tar_T, far_T, axis=-1))


def eer(far_T: FloatArray, tar_T: FloatArray) -> FloatArray:
    """Return the error rate [*] at which FAR and 1 - TAR are equal, interpolated linearly between points of [*, T]."""
    excess_T = far_T - (1 - tar_T)  # rises from -1 to 1
    after = np.argmax(excess_T >= 0, axis=-1)[..., None]
    (excess_0, far_0), (excess_1, far_1) = (
        (np.take_along_axis(excess_T, at, axis=-1), np.take_along_axis(far_T, at, axis=-1)) for at in (after - 1, after)
    )
    return np.asarray((far_0 - excess_0 / (excess_1 - excess_0) * (far_1 - far_0))[..., 0])


def tar_at_far(far_T: FloatArray, tar_T: FloatArray, far: float) -> FloatArray:
    """Return the highest TAR [*] on curves [*, T] at which FAR is at most `far`, without interpolation."""
    last = np.count_nonzero(far_T <= far, axis=-1)[..., None] - 1
    return np.asarray(np.take_along_axis(tar_T, last, axis=-1)[..., 0])


def point_at(curve: RocCurve, far: float) -> int:
    """Return the corner of a curve with the highest TAR whose FAR is at most `far`.

    Raises:
        UserError: there are too few different pairs for this FAR, or no pair is accepted at it.
    """
    needed = math.ceil(MIN_FALSE_ACCEPTS / far * (1 - 1e-9))
    if curve.num_different < needed:
        raise UserError(
            f"--at-far {far:g} takes {needed:,} pairs of different people ({MIN_FALSE_ACCEPTS} false accepts), and "
            f"there are {curve.num_different:,}: give more pairs, by --num-pairs or --pairs, or a larger --at-far"
        )
    point = int(np.count_nonzero(curve.far_T <= far)) - 1
    if not np.isfinite(curve.threshold_T[point]):
        raise UserError(
            f"at a FAR of {far:g} this model calls no two photos the same: give a larger --at-far, or train it further"
        )
    return point


def supported_fars(num_different: int) -> list[float]:
    """Return the values of `FARS` at which this many different pairs allow `MIN_FALSE_ACCEPTS` false accepts."""
    return [far for far in FARS if far * num_different >= MIN_FALSE_ACCEPTS * (1 - 1e-9)]


def far_key(far: float) -> str:
    """Return how a FAR is written as a key in a report, such as "0.001"."""
    return f"{far:g}"
