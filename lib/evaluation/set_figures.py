"""All figures of one model on one verification set.

Shapes: N images, D embedding, P pairs.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lib.errors import UserError
from lib.evaluation.curves import FARS, auc, eer, far_key, roc_curve, supported_fars, tar_at_far
from lib.evaluation.insightface_protocol import file_order_folds, insightface_accuracy
from lib.evaluation.intervals import bootstrap_intervals
from lib.evaluation.metrics import check_folds, failed_as_errors, kfold_accuracy, pair_distances
from lib.evaluation.pair_files import dealt_folds
from lib.evaluation.pairs import Pairs
from lib.evaluation.verification_sets import VerificationSet
from lib.recognition.encoded_crops import unit_vectors

Protocol = Literal["ours", "insightface"]

NUM_RESAMPLES = 500

TABLE_FIGURES = ("accuracy", "auc", "eer")


def set_pairs(one: VerificationSet, *, seed: int = 0) -> Pairs:
    """Return the pairs of a set, as indices into its images, in 10 folds in file order.

    If such a fold has pairs of one kind only, the pairs are dealt into folds by `seed` instead, and a note says so.
    """
    first_P = np.arange(0, 2 * len(one), 2)
    fold_P, note = file_order_folds(len(one)), ""
    try:
        check_folds(one.same_P, fold_P)
    except UserError:
        fold_P = dealt_folds(one.same_P, seed).astype(np.int16)
        note = f"{one.name}: folds in file order would have pairs of one kind only; its pairs are dealt into folds"
    return Pairs(a_P=first_P, b_P=first_P + 1, same_P=one.same_P, fold_P=fold_P, note=note)


def check_set(one: VerificationSet, protocol: Protocol) -> None:
    """Check that a set can be measured. Jobs do so before they embed anything.

    Raises:
        UserError: pairs of one kind only, or too few.
    """
    check_pairs(one.name, set_pairs(one), protocol)


def check_pairs(name: str, pairs: Pairs, protocol: Protocol) -> None:
    """Check that pairs can be measured, as `check_set` does for a set."""
    try:
        roc_curve(np.zeros(len(pairs)), pairs.same_P)
        if protocol == "ours":
            check_folds(pairs.same_P, pairs.fold_P)
        else:
            insightface_accuracy(np.zeros(len(pairs)), pairs.same_P)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def set_distances(vectors_ND: NDArray[np.floating], failed_N: NDArray[np.bool_], pairs: Pairs) -> NDArray[np.float64]:
    """Return the Euclidean distance of each pair. A pair with an image that cannot be read is always an error."""
    return failed_as_errors(pair_distances(vectors_ND, pairs.a_P, pairs.b_P), pairs, failed_N)


def set_figures(
    vectors_ND: NDArray[np.floating],
    failed_N: NDArray[np.bool_],
    one: VerificationSet,
    protocol: Protocol,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Return accuracy, AUC, EER and TAR@FAR of a set, ready for JSON.

    Our protocol takes the exact best threshold of the other folds, and gives a standard error and intervals over
    people. `insightface_accuracy` describes the other protocol.

    Raises:
        UserError: as `check_set` does; embeddings that are not finite.
    """
    pairs = set_pairs(one, seed=seed)
    if protocol == "insightface":
        pairs = replace(pairs, fold_P=file_order_folds(len(one)))
    return pair_figures(one.name, vectors_ND, failed_N, pairs, people_of(one), protocol, seed=seed)


def pair_figures(
    name: str,
    vectors_ND: NDArray[np.floating],
    failed_N: NDArray[np.bool_],
    pairs: Pairs,
    people_N: NDArray[np.int64],
    protocol: Protocol,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the figures of pairs of photos, as `set_figures` does for a set.

    For InsightFace's protocol the pairs are ordered by their own folds, and in file order within a fold.
    """
    if protocol == "insightface":
        vectors_ND = unit_vectors(vectors_ND.astype(np.float64))
    distances_P = set_distances(vectors_ND, failed_N, pairs)
    intervals = None
    if protocol == "insightface":
        order_P = np.argsort(pairs.fold_P, kind="stable")
        squared_P = np.where(np.isfinite(distances_P), np.square(distances_P), distances_P)
        accuracy = insightface_accuracy(squared_P[order_P], pairs.same_P[order_P])
    else:
        kfold = kfold_accuracy(distances_P, pairs.same_P, pairs.fold_P)
        accuracy = {
            "accuracy": kfold.accuracy,
            "accuracy_std": kfold.accuracy_std,
            "fold_accuracies": kfold.accuracy_F.tolist(),
            "fold_thresholds": kfold.threshold_F.tolist(),
        }
        intervals = bootstrap_intervals(
            distances_P, kfold.right_P, pairs, people_N, num_resamples=NUM_RESAMPLES, seed=seed
        )
    curve = roc_curve(distances_P, pairs.same_P)
    supported = supported_fars(curve.num_different)
    return {
        "name": name,
        "num_pairs": len(pairs),
        "num_failed_images": int(failed_N.sum()),
        "num_failed_pairs": int(np.count_nonzero(~np.isfinite(distances_P))),
        **accuracy,
        "auc": float(auc(curve.far_T, curve.tar_T)),
        "eer": float(eer(curve.far_T, curve.tar_T)),
        "tar_at_far": {
            far_key(far): float(tar_at_far(curve.far_T, curve.tar_T, far)) if far in supported else None for far in FARS
        },
        "intervals": intervals,
    }


def mean_figures(sets: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the plain mean of the figures of several sets, as papers print it. None if a set lacks the figure."""

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if len(known) == len(values) else None

    return {
        "num_pairs": sum(one["num_pairs"] for one in sets),
        **{name: mean([one[name] for one in sets]) for name in TABLE_FIGURES},
        "tar_at_far": {far_key(far): mean([one["tar_at_far"][far_key(far)] for one in sets]) for far in FARS},
    }


def people_of(one: VerificationSet) -> NDArray[np.int64]:
    """Return a number for the person on each image, [N], as far as the set tells.

    A set has no names. Two images show one person if their files are equal or they are a same pair.
    """
    place: dict[bytes, int] = {}
    file_N = np.array([place.setdefault(image, len(place)) for image in one.images])
    return linked_people(file_N[0::2][one.same_P], file_N[1::2][one.same_P], len(place))[file_N]


def linked_people(a_S: NDArray[np.integer], b_S: NDArray[np.integer], num: int) -> NDArray[np.int64]:
    """Return a number for the person of each of `num` items, [num]. Items that pairs join are one person."""
    links = coo_array((np.ones(len(a_S), bool), (a_S, b_S)), shape=(num, num))
    people: NDArray[np.int64] = connected_components(links, directed=False)[1].astype(np.int64)
    return people
