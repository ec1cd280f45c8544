"""Verification and identification metrics of distances between embeddings.

Two photos are called the same person when their Euclidean distance is at most the threshold. FAR is the
share of different pairs called the same, TAR the share of same pairs called the same.

Shapes: N photos, D embedding, P pairs, F folds, I identities, T cuts, C numbers of pairs called the same, B probes,
G gallery photos.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lib.errors import UserError
from lib.evaluation.curves import (
    FARS,
    BoolArray,
    FloatArray,
    RocCurve,
    auc,
    eer,
    far_key,
    point_at,
    roc_curve,
    supported_fars,
    tar_at_far,
)
from lib.evaluation.intervals import bootstrap_intervals
from lib.evaluation.original_table import original_table
from lib.evaluation.pairs import Pairs
from lib.nearest import num_as_near

CHUNK_ELEMENTS = 1 << 22
"""Largest intermediate array: 32 MB in float64."""


def pair_distances(
    embeddings_ND: NDArray[np.floating], a_P: NDArray[np.integer], b_P: NDArray[np.integer]
) -> FloatArray:
    """Return the Euclidean distance of each pair, a chunk at a time.

    Raises:
        UserError: an embedding that is not finite (how many there are).
    """
    embeddings_ND = _sound(embeddings_ND)
    distances_P = np.empty(len(a_P), np.float64)
    step = max(1, CHUNK_ELEMENTS // max(1, embeddings_ND.shape[1]))
    for start in range(0, len(a_P), step):
        chunk = slice(start, start + step)
        difference_PD = embeddings_ND[a_P[chunk]] - embeddings_ND[b_P[chunk]]
        distances_P[chunk] = np.sqrt(np.einsum("pd,pd->p", difference_PD, difference_PD))
    return distances_P


def _sound(embeddings_ND: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the embeddings in float32 or float64.

    Raises:
        UserError: an embedding is not finite.
    """
    num_broken = np.count_nonzero(~np.isfinite(embeddings_ND).all(axis=1))
    if num_broken:
        raise UserError(
            f"{num_broken} of {len(embeddings_ND)} embeddings hold NaN or infinity: the model is broken; "
            "take an earlier checkpoint, or train again with a lower learning rate"
        )
    return embeddings_ND.astype(np.result_type(embeddings_ND, np.float32), copy=False)


def failed_as_errors(distances_P: FloatArray, pairs: Pairs, failed_N: BoolArray) -> FloatArray:
    """Return the distances, changed so that pairs with a failed photo (one without a face) are always errors.

    A same pair with a failed photo gets an infinite distance, a different pair minus infinity.
    """
    failed_P = failed_N[pairs.a_P] | failed_N[pairs.b_P]
    return np.where(failed_P, np.where(pairs.same_P, np.inf, -np.inf), distances_P)


def best_threshold(distances_P: FloatArray, same_P: BoolArray) -> tuple[float, float]:
    """Return the threshold with the most correct pairs, and the share of correct pairs.

    The result is exact: every split of the pairs by a finite threshold is tried. Of equally good thresholds it is the
    lowest, midway between the two distances that it separates.

    Raises:
        UserError: no finite distance.
    """
    order_P = np.argsort(distances_P)
    return _best_threshold(distances_P[order_P], same_P[order_P])


def _best_threshold(sorted_P: FloatArray, same_P: BoolArray) -> tuple[float, float]:
    """Do the work of `best_threshold` on sorted distances."""
    first, last = np.searchsorted(sorted_P, -np.inf, side="right"), np.searchsorted(sorted_P, np.inf)
    if first == last:
        raise UserError("no pair has an embedding on both sides: check that faces were found in the photos")
    # Cut c calls the first c pairs the same. Equal distances cannot be separated.
    cut_T = first + np.concatenate([[0], np.flatnonzero(np.diff(sorted_P[first:last])) + 1, [last - first]])
    num_right_C = np.count_nonzero(~same_P) + np.concatenate([[0], np.cumsum(np.where(same_P, 1, -1))])
    cut = int(cut_T[np.argmax(num_right_C[cut_T])])
    share = float(num_right_C[cut] / len(same_P))
    if cut == first:
        return float(np.nextafter(sorted_P[first], -np.inf)), share
    if cut == last:
        return float(sorted_P[last - 1]), share
    below, above = sorted_P[cut - 1], sorted_P[cut]
    middle = below + (above - below) / 2
    return float(middle if middle < above else below), share


@dataclass(frozen=True, kw_only=True, eq=False)
class KFoldAccuracy:
    """Accuracy, with the threshold of each fold chosen on the other folds."""

    accuracy: float
    """Mean over the folds."""
    accuracy_std: float
    """Standard error of that mean, as LFW reports it: standard deviation over the folds / sqrt(F)."""
    accuracy_F: FloatArray
    threshold_F: FloatArray
    right_P: BoolArray
    """Whether the threshold of its fold judges each pair correctly."""


def check_folds(same_P: BoolArray, fold_P: NDArray[np.integer]) -> None:
    """Check that a threshold can be chosen for every fold. Jobs do so before they embed anything.

    Raises:
        UserError: fewer than two folds, a fold with pairs of one kind only.
    """
    labels_F, index_P = np.unique(fold_P, return_inverse=True)
    num_folds = len(labels_F)
    if num_folds < 2:
        raise UserError(
            f"the pairs have {num_folds} fold: each fold's threshold is chosen on the others, so two are needed"
        )
    num_same_F = np.bincount(index_P, weights=same_P, minlength=num_folds)
    one_kind = labels_F[(num_same_F == 0) | (num_same_F == np.bincount(index_P))]
    if len(one_kind):
        named = ", ".join(map(str, one_kind))
        raise UserError(f"fold {named} has pairs of one kind only: every fold needs both same and different pairs")


def kfold_accuracy(distances_P: FloatArray, same_P: BoolArray, fold_P: NDArray[np.integer]) -> KFoldAccuracy:
    """Return the accuracy of LFW's protocol (Huang et al. 2007, Labeled Faces in the Wild, section on View 2).

    Raises:
        UserError: as `check_folds` does.
    """
    check_folds(same_P, fold_P)
    labels_F, index_P = np.unique(fold_P, return_inverse=True)
    num_folds = len(labels_F)
    order_P = np.argsort(distances_P)
    sorted_P, same_sorted_P, index_sorted_P = distances_P[order_P], same_P[order_P], index_P[order_P]
    threshold_F = np.empty(num_folds)
    for fold in range(num_folds):
        others_P = index_sorted_P != fold
        threshold_F[fold], _ = _best_threshold(sorted_P[others_P], same_sorted_P[others_P])
    right_P = (distances_P <= threshold_F[index_P]) == same_P
    accuracy_F = np.bincount(index_P, weights=right_P) / np.bincount(index_P)
    return KFoldAccuracy(
        accuracy=float(accuracy_F.mean()),
        accuracy_std=float(accuracy_F.std(ddof=1) / np.sqrt(num_folds)),
        accuracy_F=accuracy_F,
        threshold_F=threshold_F,
        right_P=right_P,
    )


def identification(
    embeddings_ND: NDArray[np.floating], identity_N: ArrayLike, *, failed_N: BoolArray | None = None, seed: int = 0
) -> dict[str, Any]:
    """Return how often the right person is the nearest (rank 1) or among the five nearest (rank 5) of the gallery.

    Closed set: the gallery has one photo of every person, drawn by `seed` from those that did not fail. People with
    one photo are distractors. Every other photo of a person with two or more is a probe. A failed probe, or one whose
    person has no gallery photo, is a miss. At equal distances the wrong person ranks first.
    """
    person_N, count_I = np.unique(np.asarray(identity_N), return_inverse=True, return_counts=True)[1:]
    failed_N = np.zeros(len(person_N), bool) if failed_N is None else failed_N
    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(~failed_N))
    people_G, first_G = np.unique(person_N[drawn], return_index=True)
    gallery_G = drawn[first_G]
    place_I = np.full(len(count_I), -1)
    place_I[people_G] = np.arange(len(people_G))
    is_probe_N = count_I[person_N] >= 2
    is_probe_N[gallery_G] = False
    # The person of such a photo is in the gallery, if only by this photo.
    probes = np.flatnonzero(is_probe_N & ~failed_N)

    embeddings_ND = _sound(embeddings_ND)
    num_before_B = num_as_near(embeddings_ND[probes], embeddings_ND[gallery_G], place_I[person_N[probes]])
    num_rank_1, num_rank_5 = (int(np.count_nonzero(num_before_B < rank)) for rank in (1, 5))
    num_probes = int(np.count_nonzero(is_probe_N))
    return {
        "rank_1": num_rank_1 / num_probes if num_probes else None,
        "rank_5": num_rank_5 / num_probes if num_probes else None,
        "num_gallery": len(gallery_G),
        "num_probes": num_probes,
    }


def verification_figures(distances_P: FloatArray, pairs: Pairs, kfold: KFoldAccuracy | None = None) -> dict[str, Any]:
    """Return accuracy, AUC, EER and TAR@FAR of these distances, ready for JSON, as a training epoch reports them.

    `KFoldAccuracy` describes `accuracy` and `accuracy_std` (a standard error). `threshold` is the best for all pairs,
    the one to keep in the model. A TAR that needs more different pairs than there are is None.

    Raises:
        UserError: as `kfold_accuracy` does.
    """
    kfold = kfold or kfold_accuracy(distances_P, pairs.same_P, pairs.fold_P)
    curve = roc_curve(distances_P, pairs.same_P)
    supported = supported_fars(curve.num_different)
    return {
        "num_pairs": len(pairs),
        "num_same_pairs": curve.num_same,
        "num_different_pairs": curve.num_different,
        "accuracy": kfold.accuracy,
        "accuracy_std": kfold.accuracy_std,
        "fold_accuracies": kfold.accuracy_F.tolist(),
        "fold_thresholds": kfold.threshold_F.tolist(),
        "threshold": best_threshold(distances_P, pairs.same_P)[0],
        "auc": float(auc(curve.far_T, curve.tar_T)),
        "eer": float(eer(curve.far_T, curve.tar_T)),
        "tar_at_far": {
            far_key(far): float(tar_at_far(curve.far_T, curve.tar_T, far)) if far in supported else None for far in FARS
        },
    }


def verification_report(
    embeddings_ND: NDArray[np.floating],
    identity_N: ArrayLike,
    pairs: Pairs,
    *,
    failed_N: BoolArray | None = None,
    tolerance: float | None = None,
    num_resamples: int = 500,
    seed: int = 0,
    at_far: float | None = None,
) -> dict[str, Any]:
    """Return every metric of the model on these pairs, ready for JSON.

    Args:
        embeddings_ND: one per photo that the pairs index; rows of failed photos are ignored.
        identity_N: of the same photos, strings or numbers.
        failed_N: photos without an embedding, such as those without a face; their pairs and probes count as errors.
        tolerance: threshold of the original's table; None means the best one for these pairs.
        at_far: FAR of the operating point to choose, if one is wanted.

    Raises:
        UserError: embeddings that are not finite; too few folds, or a fold of one kind; a FAR that these pairs cannot
            tell.
    """
    if failed_N is None:
        failed_N = np.zeros(len(embeddings_ND), bool)
    if failed_N.any():
        embeddings_ND = np.where(failed_N[:, None], embeddings_ND.dtype.type(0), embeddings_ND)
    distances_P = failed_as_errors(pair_distances(embeddings_ND, pairs.a_P, pairs.b_P), pairs, failed_N)
    kfold = kfold_accuracy(distances_P, pairs.same_P, pairs.fold_P)
    figures = verification_figures(distances_P, pairs, kfold)
    curve = roc_curve(distances_P, pairs.same_P)
    point = None if at_far is None else point_at(curve, at_far)
    intervals = bootstrap_intervals(
        distances_P, kfold.right_P, pairs, identity_N, num_resamples=num_resamples, seed=seed, point=point
    )
    return figures | {
        "operating_point": None if point is None else _operating_point(at_far, curve, point, intervals),
        "num_failed_pairs": int(np.count_nonzero(~np.isfinite(distances_P))),
        "num_missing_pairs": pairs.num_missing_pairs,
        "intervals": intervals,
        "identification": identification(embeddings_ND, identity_N, failed_N=failed_N, seed=seed),
        "original_table": original_table(
            distances_P, pairs.same_P, figures["threshold"] if tolerance is None else tolerance
        ),
    }


def _operating_point(at_far: float | None, curve: RocCurve, point: int, intervals: dict[str, Any]) -> dict[str, Any]:
    return {
        "at_far": at_far,
        "threshold": float(curve.threshold_T[point]),
        "far": float(curve.far_T[point]),
        "far_interval": intervals.pop("point_far"),
        "tar": float(curve.tar_T[point]),
        "tar_interval": intervals.pop("point_tar"),
    }
