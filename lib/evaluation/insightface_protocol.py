"""The protocol of InsightFace's `eval/verification.py`, by which published figures on verification sets are made.

Shapes: N images, D embedding, P pairs, F folds, T thresholds.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.errors import UserError

NUM_FOLDS = 10
THRESHOLDS_T = np.arange(0, 4, 0.01)
"""Squared distances of vectors of length 1."""


def file_order_folds(num_pairs: int, num_folds: int = NUM_FOLDS) -> NDArray[np.int16]:
    """Return the fold of each pair: equal runs in file order. The first runs take one more each if pairs are left."""
    return np.repeat(
        np.arange(num_folds), [len(fold) for fold in np.array_split(np.arange(num_pairs), num_folds)]
    ).astype(np.int16)


def insightface_accuracy(squared_P: NDArray[np.floating], same_P: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the accuracy over 10 folds in file order, each at the best threshold of the other nine.

    A pair is called the same if its squared distance is below the threshold. Of equally good thresholds the lowest is
    taken. `accuracy_std` is the standard deviation over the folds (`numpy.std`), as papers print it, not the standard
    error. `fold_thresholds` are squared distances.

    Raises:
        UserError: fewer than 10 pairs.
    """
    if len(same_P) < NUM_FOLDS:
        raise UserError(f"there are {len(same_P)} pairs: the protocol of InsightFace needs {NUM_FOLDS}, one a fold")
    fold_P = file_order_folds(len(same_P))
    right_FT = np.stack([_num_right(squared_P[fold_P == fold], same_P[fold_P == fold]) for fold in range(NUM_FOLDS)])
    best_F = np.argmax(right_FT.sum(axis=0) - right_FT, axis=1)
    accuracy_F = right_FT[np.arange(NUM_FOLDS), best_F] / np.bincount(fold_P)
    return {
        "accuracy": float(accuracy_F.mean()),
        "accuracy_std": float(accuracy_F.std()),
        "fold_accuracies": accuracy_F.tolist(),
        "fold_thresholds": THRESHOLDS_T[best_F].tolist(),
    }


def _num_right(squared_P: NDArray[np.floating], same_P: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return how many of the pairs each threshold judges correctly, [T]."""
    below_T, wrongly_T = (np.searchsorted(np.sort(squared_P[kind_P]), THRESHOLDS_T) for kind_P in (same_P, ~same_P))
    return below_T + np.count_nonzero(~same_P) - wrongly_T
