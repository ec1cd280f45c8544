"""Comparing two epochs on the same pairs: the metrics are those of sklearn, the error that of redrawn people."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from lib.evaluation.pairs import Pairs, made_pairs
from lib.training.epoch_choice import Difference, difference, pair_scores

PEOPLE, PHOTOS = 60, 5
LABELS = np.repeat(np.arange(PEOPLE), PHOTOS)


def drawn_pairs() -> Pairs:
    photos = [f"{number}.jpg" for number in range(len(LABELS))]
    return made_pairs(photos, [str(label) for label in LABELS], num_pairs=2000, num_folds=10, seed=0)


def distances(pairs: Pairs, noise: float, seed: int = 0, spoilt: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(PEOPLE, 6))
    features = centres[LABELS] + noise * rng.normal(size=(len(LABELS), 6))
    features[: spoilt * PHOTOS] = 0
    return np.linalg.norm(features[pairs.a_P] - features[pairs.b_P], axis=1)


def test_the_mean_of_auc_scores_is_the_area_under_the_curve() -> None:
    pairs = drawn_pairs()
    distances_P = distances(pairs, 1.0).round(1)  # with ties
    scores_P = pair_scores(distances_P, pairs, "auc")
    expected = roc_auc_score(pairs.same_P, -distances_P)
    assert scores_P[pairs.same_P].mean() == pytest.approx(expected, abs=1e-6)
    assert scores_P[~pairs.same_P].mean() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("by", ["accuracy", "auc"])
def test_a_difference_is_that_of_the_metrics_and_known_better_than_they_are(by: str) -> None:
    pairs = drawn_pairs()
    good_P, bad_P = distances(pairs, 0.8), distances(pairs, 0.8, spoilt=30)
    scores_P, others_P = (pair_scores(each, pairs, by) for each in (good_P, bad_P))  # type: ignore[arg-type]
    found = difference(scores_P, others_P, pairs, LABELS)
    assert found.mean > found.interval > 0
    assert not found.is_worse
    assert difference(others_P, scores_P, pairs, LABELS).is_worse
    assert difference(scores_P, scores_P, pairs, LABELS) == Difference(0.0, 0.0)


def test_the_interval_holds_a_difference_of_nothing_in_most_draws_of_people() -> None:
    num_outside = 0
    for seed in range(20):
        pairs = drawn_pairs()
        one_P, two_P = (distances(pairs, 1.0, seed=2 * seed + which) for which in range(2))
        scores_P, others_P = (pair_scores(each, pairs, "auc") for each in (one_P, two_P))
        found = difference(scores_P, others_P, pairs, LABELS)
        num_outside += abs(found.mean) > found.interval
    assert num_outside <= 5
