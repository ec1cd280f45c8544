"""1:1 figures of IJB: TAR at FARs down to 1e-6 over millions of pairs of templates, with intervals over people.

Shapes: T templates, P pairs, D embedding dimension, I people, S same pairs, F nearest different pairs, R resamples.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.evaluation.curves import MIN_FALSE_ACCEPTS, RocCurve, auc, eer, far_key, roc_curve, tar_at_far
from lib.evaluation.ijb_files import IjbSet
from lib.evaluation.metrics import pair_distances
from lib.evaluation.set_figures import Protocol, linked_people
from lib.progress import progress_over
from lib.resampling import CONFIDENCE, percentiles

IJB_FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)

NUM_RESAMPLES = 200

_KEPT_FALSE_ACCEPTS = 2.0
"""Resamples look at this many times the largest FAR of the different pairs. One time is not enough, because a resample
can count some people more often than others."""


def reported_fars(num_different: int, protocol: Protocol) -> list[float]:
    """Return the FARs that this many different pairs can measure. Published figures need only one false accept."""
    needed = 1 if protocol == "insightface" else MIN_FALSE_ACCEPTS
    return [far for far in IJB_FARS if far * num_different >= needed * (1 - 1e-9)]


def verification(
    vectors_TD: NDArray[np.float32], failed_T: NDArray[np.bool_], one: IjbSet, protocol: Protocol, *, seed: int = 0
) -> tuple[dict[str, Any], RocCurve]:
    """Return the figures, ready for JSON, and the curve.

    Pairs of a template without a readable image are never called the same.

    Raises:
        UserError: pairs of one kind only, or embeddings that are not finite.
    """
    distances_P = pair_distances(vectors_TD, one.a_P, one.b_P)
    failed_P = failed_T[one.a_P] | failed_T[one.b_P]
    distances_P[failed_P] = np.inf
    curve = roc_curve(distances_P, one.same_P)
    fars = reported_fars(curve.num_different, protocol)
    intervals = None
    if protocol == "ours":
        intervals = tar_intervals(distances_P, one, people_of(one), fars, num_resamples=NUM_RESAMPLES, seed=seed)
    figures = {
        "num_pairs": len(one.same_P),
        "num_same_pairs": curve.num_same,
        "num_different_pairs": curve.num_different,
        "num_failed_pairs": int(failed_P.sum()),
        "auc": float(auc(curve.far_T, curve.tar_T)),
        "eer": float(eer(curve.far_T, curve.tar_T)),
        "tar_at_far": {
            far_key(far): float(tar_at_far(curve.far_T, curve.tar_T, far)) if far in fars else None for far in IJB_FARS
        },
        "intervals": intervals,
    }
    return figures, curve


def people_of(one: IjbSet) -> NDArray[np.int64]:
    """Return the person of each template as a number, [T].

    Two templates show one person if they are a same pair or have one subject.
    """
    links = [(one.a_P[one.same_P], one.b_P[one.same_P])]
    groups = [*one.galleries.values(), *([one.probes] if one.probes else [])]
    if groups:
        template_E, subject_E = (np.concatenate([getattr(each, name) for each in groups]) for name in _ENROLLED)
        order_E = np.argsort(subject_E, kind="stable")
        is_next_E = np.diff(subject_E[order_E]) == 0
        links.append((template_E[order_E][:-1][is_next_E], template_E[order_E][1:][is_next_E]))
    a, b = (np.concatenate(side) for side in zip(*links, strict=True))
    return linked_people(a, b, len(one.templates_T))


_ENROLLED = ("template_E", "subject_E")


def tar_intervals(
    distances_P: NDArray[np.float64],
    one: IjbSet,
    people_T: NDArray[np.int64],
    fars: list[float],
    *,
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Return 95 % percentile intervals of TAR@FAR, from resampling people.

    People are resampled as `bootstrap_intervals` does. Only the different pairs that can become false accepts are
    sorted. The millions of others enter only the total, summed by pairs of people.
    """
    used, people_T = np.unique(people_T, return_inverse=True)
    num_people = len(used)
    different = np.flatnonzero(~one.same_P)
    code = people_T[one.a_P[different]] * num_people + people_T[one.b_P[different]]
    people_pairs, count_U = np.unique(code, return_counts=True)
    first_U, second_U = np.divmod(people_pairs, num_people)
    num_near = min(len(different), int(np.ceil(_KEPT_FALSE_ACCEPTS * max(IJB_FARS) * len(different))))
    near = different[np.argpartition(distances_P[different], num_near - 1)[:num_near]]
    near = near[np.argsort(distances_P[near], kind="stable")]
    near_F, a_F, b_F = distances_P[near], people_T[one.a_P[near]], people_T[one.b_P[near]]
    same = np.flatnonzero(one.same_P)
    same = same[np.argsort(distances_P[same], kind="stable")]
    same_S, person_S = distances_P[same], people_T[one.a_P[same]]

    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {far_key(far): [] for far in fars}
    for _ in progress_over(range(num_resamples), "computing the intervals", unit="resample"):
        times_I = np.bincount(rng.integers(num_people, size=num_people), minlength=num_people).astype(np.float64)
        accepted_F = np.cumsum(times_I[a_F] * times_I[b_F])
        all_different = float(count_U @ (times_I[first_U] * times_I[second_U]))
        accepted_S = np.concatenate([[0.0], np.cumsum(times_I[person_S])])
        for far in fars:
            allowed = int(np.searchsorted(accepted_F, far * all_different * (1 + 1e-12), side="right"))
            # The threshold lies below the first different pair that would be one false accept too many.
            beyond = near_F[allowed] if allowed < num_near else np.inf if num_near == len(different) else np.nan
            num_same = np.searchsorted(same_S, beyond, side="left") if np.isfinite(beyond) else len(same_S)
            share = accepted_S[num_same] / accepted_S[-1] if accepted_S[-1] and not np.isnan(beyond) else np.nan
            found[far_key(far)].append(share)
    tars: dict[str, Any] = {far_key(far): None for far in IJB_FARS}
    tars |= {key: percentiles(values) for key, values in found.items()}
    return {"level": CONFIDENCE, "num_resamples": num_resamples, "tar_at_far": tars}
