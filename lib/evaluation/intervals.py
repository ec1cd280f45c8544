"""Confidence intervals of metrics by a bootstrap over identities: how much would other people change the result?

Shapes: N photos, P pairs, F folds, I identities, T thresholds (points of the curve), R resamples.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lib.evaluation.curves import (
    FARS,
    BoolArray,
    FloatArray,
    auc,
    curve_cuts,
    eer,
    far_and_tar,
    far_key,
    runs_of,
    supported_fars,
    tar_at_far,
)
from lib.evaluation.pairs import Pairs
from lib.progress import progress_over
from lib.resampling import CONFIDENCE, percentiles

STEP_ELEMENTS = 1 << 20
"""Pairs x resamples per chunk: several arrays of 8 MB."""


def bootstrap_intervals(
    distances_P: FloatArray,
    right_P: BoolArray,
    pairs: Pairs,
    identity_N: ArrayLike,
    *,
    num_resamples: int,
    seed: int,
    point: int | None = None,
) -> dict[str, Any]:
    """Return 95 % percentile intervals of accuracy, AUC, EER and TAR@FAR, from resampling people.

    With `point`, a corner of the curve, the result has `point_far` and `point_tar` at its threshold, too.

    Pairs of one person are not independent, so people are resampled, not pairs. If a person is drawn m times, its same
    pairs count m times. If two people are drawn m and n times, their different pairs count m * n times (the vertex
    bootstrap of Snijders and Borgatti 1999, Non-parametric standard errors and tests for network statistics). The folds
    keep their thresholds: `right_P` says which pairs they judge correctly. Resamples without one of the two kinds are
    left out. The result is None if all are.
    """
    assert num_resamples > 0
    order_P = np.argsort(distances_P)
    same_P = pairs.same_P[order_P]
    runs = runs_of(same_P, curve_cuts(distances_P[order_P], same_P))
    codes_N = np.unique(np.asarray(identity_N), return_inverse=True)[1]
    num_people, person_2P = _renumbered(codes_N[np.stack([pairs.a_P[order_P], pairs.b_P[order_P]])])
    person_2P[1] = np.where(person_2P[0] == person_2P[1], num_people, person_2P[1])  # this factor is always one
    # Folds have equal weight, as in the mean over folds.
    _, index_P, size_F = np.unique(pairs.fold_P[order_P], return_inverse=True, return_counts=True)
    share_P = 1 / size_F[index_P]
    share_2P = np.stack([share_P * right_P[order_P], share_P])
    fars = supported_fars(int(np.count_nonzero(~same_P)))

    rng = np.random.default_rng(seed)
    step = max(1, STEP_ELEMENTS // len(order_P))
    # Reused for each chunk: allocating this much memory takes longer than the computation.
    buffer_2RP = np.empty((2, min(step, num_resamples), len(order_P)))
    figures: dict[str, list[FloatArray]] = {}
    for start in progress_over(range(0, num_resamples, step), "computing the intervals", unit="resample"):
        out_2RP = buffer_2RP[:, : num_resamples - start]
        weights_RP = _resampled_weights(rng, num_people, person_2P, out_2RP)
        far_RT, tar_RT = far_and_tar(weights_RP, runs)
        right_R, all_R = np.inner(share_2P, weights_RP)
        with np.errstate(invalid="ignore"):  # a resample without any of the pairs gives NaN
            accuracy_R = right_R / all_R
        for name, values_R in {"accuracy": accuracy_R, **_curve_figures(far_RT, tar_RT, fars, point)}.items():
            figures.setdefault(name, []).append(values_R)
    intervals = {name: percentiles(np.concatenate(parts)) for name, parts in figures.items()}
    tars = {far_key(far): intervals.pop(far_key(far), None) for far in FARS}
    return {"level": CONFIDENCE, "num_resamples": num_resamples, **intervals, "tar_at_far": tars}


def _curve_figures(
    far_RT: FloatArray, tar_RT: FloatArray, fars: Sequence[float], point: int | None
) -> dict[str, FloatArray]:
    """Return the figures of the curve of each resample, by name."""
    figures = {"auc": auc(far_RT, tar_RT), "eer": eer(far_RT, tar_RT)}
    figures |= {far_key(far): tar_at_far(far_RT, tar_RT, far) for far in fars}
    if point is not None:
        figures |= {"point_far": far_RT[:, point], "point_tar": tar_RT[:, point]}
    return figures


def _resampled_weights(
    rng: np.random.Generator, num_people: int, person_2P: NDArray[np.int64], out_2RP: FloatArray
) -> FloatArray:
    """Draw as many people as there are, with replacement, and return how often each pair counts, [R, P].

    The number `num_people` stands for "the same person again" and counts once. The result is a view of `out_2RP`.
    """
    num_resamples = out_2RP.shape[1]
    drawn_RI = (
        rng.integers(num_people, size=(num_resamples, num_people)) + num_people * np.arange(num_resamples)[:, None]
    )
    times_RI = np.bincount(drawn_RI.ravel(), minlength=drawn_RI.size).reshape(drawn_RI.shape).astype(np.float64)
    times_RI = np.pad(times_RI, ((0, 0), (0, 1)), constant_values=1)
    for person_P, factor_RP in zip(person_2P, out_2RP, strict=True):
        # In other modes NumPy would use a buffer of its own.
        np.take(times_RI, person_P, axis=1, out=factor_RP, mode="clip")
    return np.multiply(out_2RP[0], out_2RP[1], out=out_2RP[0])


def _renumbered(codes: NDArray[np.int64]) -> tuple[int, NDArray[np.int64]]:
    """Return the number of different codes, and the codes renumbered without gaps."""
    used = np.bincount(codes.ravel()) > 0
    return int(used.sum()), (np.cumsum(used) - 1)[codes]
