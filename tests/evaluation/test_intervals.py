"""Bootstrap intervals, against repeating the pairs of whoever is drawn."""

import numpy as np
from sklearn import metrics as reference

from lib.evaluation import intervals, metrics
from tests.evaluation.drawn_pairs import random_pairs


def bootstrap_one_by_one(distances_P, right_P, pairs, identity_N, num_resamples, seed):
    """Repeat every pair as often as its people are drawn, and ask scikit-learn about each such list."""
    people = np.unique(identity_N[np.concatenate([pairs.a_P, pairs.b_P])])
    rng = np.random.default_rng(seed)
    figures = []
    for _ in range(num_resamples):
        times = dict(
            zip(people, np.bincount(rng.integers(len(people), size=len(people)), minlength=len(people)), strict=True)
        )
        repeated = []
        for pair in range(len(pairs)):
            a, b = identity_N[pairs.a_P[pair]], identity_N[pairs.b_P[pair]]
            repeated += [pair] * int(times[a] if a == b else times[a] * times[b])
        far_T, tar_T, _ = reference.roc_curve(pairs.same_P[repeated], -distances_P[repeated])
        folds = [right_P[repeated][pairs.fold_P[repeated] == fold] for fold in np.unique(pairs.fold_P)]
        accuracy = sum(fold.sum() for fold in folds) / len(repeated)  # the folds of this test are equally large
        figures.append(
            (
                accuracy,
                reference.roc_auc_score(pairs.same_P[repeated], -distances_P[repeated]),
                tar_T[far_T <= 0.1].max(),
            )
        )
    return np.quantile(figures, [0.025, 0.975], axis=0).T


def test_bootstrap_intervals_agree_with_repeating_the_pairs(monkeypatch):
    embeddings_ND, identity_N, pairs = random_pairs(num_pairs=400)
    distances_P = metrics.pair_distances(embeddings_ND, pairs.a_P, pairs.b_P)
    right_P = metrics.kfold_accuracy(distances_P, pairs.same_P, pairs.fold_P).right_P
    expected = bootstrap_one_by_one(distances_P, right_P, pairs, identity_N, num_resamples=25, seed=3)
    monkeypatch.setattr(intervals, "STEP_ELEMENTS", 400 * 10)  # three chunks
    found = intervals.bootstrap_intervals(distances_P, right_P, pairs, identity_N, num_resamples=25, seed=3)
    np.testing.assert_allclose([found["accuracy"], found["auc"], found["tar_at_far"]["0.1"]], expected)
    assert found["tar_at_far"]["0.001"] is None
