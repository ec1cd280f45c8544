"""Which epoch's model is kept: a later one, unless it is worse than the best so far by more than chance.

Two epochs are compared pair by pair on the same validation people. So their difference is more certain than either
figure. Its error is that of another draw of people.

Shape suffixes: P pairs, I people, R resamples.
"""

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from lib.evaluation.metrics import kfold_accuracy
from lib.evaluation.pairs import Pairs

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.integer]

NUM_RESAMPLES = 200
INTERVAL = 1.96
"""Standard errors on each side of the 95 % interval of a difference."""


class Difference(NamedTuple):
    """How far an epoch is ahead of another one; negative if it is worse."""

    mean: float
    interval: float
    """Half the width of the 95 % interval."""

    @property
    def is_worse(self) -> bool:
        """Whether it is worse by more than chance."""
        return self.mean < -self.interval


def pair_scores(distances_P: npt.NDArray[np.float64], pairs: Pairs, by: Literal["accuracy", "auc"]) -> Floats:
    """Return each pair's part in a metric. The metric is their mean, or the mean of the means of both kinds of pairs.

    Accuracy: whether the pair is judged correctly. AUC: the share of the pairs of the other kind that are on the
    correct side of it (the placements of DeLong et al. 1988, equations 4 and 5).
    """
    if by == "accuracy":
        return kfold_accuracy(distances_P, pairs.same_P, pairs.fold_P).right_P.astype(np.float32)
    same, different = np.sort(distances_P[pairs.same_P]), np.sort(distances_P[~pairs.same_P])
    scores_P = np.empty(len(distances_P), np.float32)
    for kind_P, others, is_nearer in ((pairs.same_P, different, True), (~pairs.same_P, same, False)):
        values = distances_P[kind_P]
        below = (np.searchsorted(others, values, side="left") + np.searchsorted(others, values, side="right")) / 2
        scores_P[kind_P] = 1 - below / len(others) if is_nearer else below / len(others)
    return scores_P


def difference(scores_P: Floats, earlier_P: Floats, pairs: Pairs, people_N: Ints) -> Difference:
    """Return how far the scores are ahead of earlier ones, with the error of another draw of people.

    People are drawn, not pairs, as in `lib.evaluation.intervals`; `people_N` are those of the photos in the pairs. Both
    kinds of pairs have the same weight.
    """
    ahead_P = scores_P - earlier_P
    if not ahead_P.any():
        return Difference(0.0, 0.0)
    a_P, b_P = np.unique(people_N[np.stack([pairs.a_P, pairs.b_P])], return_inverse=True)[1].reshape(2, -1)
    num_people = int(max(a_P.max(), b_P.max())) + 1
    rng = np.random.default_rng(0)
    means = []
    for _ in range(NUM_RESAMPLES):
        times_I = np.bincount(rng.integers(num_people, size=num_people), minlength=num_people).astype(np.float64)
        weights_P = times_I[a_P] * np.where(pairs.same_P, 1.0, times_I[b_P])
        if weights_P[pairs.same_P].any() and weights_P[~pairs.same_P].any():
            means.append(_mean_of_kinds(ahead_P, weights_P, pairs.same_P))
    interval = INTERVAL * float(np.std(means)) if means else float("inf")
    return Difference(_mean_of_kinds(ahead_P, np.ones(len(ahead_P)), pairs.same_P), interval)


def _mean_of_kinds(values_P: Floats, weights_P: npt.NDArray[np.floating], same_P: npt.NDArray[np.bool_]) -> float:
    return float(np.mean([np.average(values_P[kind_P], weights=weights_P[kind_P]) for kind_P in (same_P, ~same_P)]))
