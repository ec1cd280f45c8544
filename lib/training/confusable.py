"""Which people the model confuses: the identities whose mean features are nearest to each other.

Shape suffixes: N photos (rows of the features), D dimensions of a feature, I identities, J seeds, T neighbours of a
seed.
"""

import numpy as np
from scipy import sparse

from lib.nearest import squared_norms
from lib.training.mining import NO_ROW, Bools, Floats, Ints


def identity_sums(
    features_ND: Floats, labels_N: Ints, *, num_identities: int, filled_N: Bools | None = None
) -> tuple[Floats, Ints]:
    """Return the sum [I, D] and the number [I] of the filled features of each identity 0 … `num_identities` - 1.

    Sums and numbers of several shards add up to those of all photos.
    """
    weights_N = np.ones(len(labels_N), np.float32) if filled_N is None else filled_N.astype(np.float32)
    shape = (num_identities, len(labels_N))
    sums_ID = sparse.csr_array((weights_N, (labels_N, np.arange(len(labels_N)))), shape=shape) @ features_ND
    return sums_ID, np.bincount(labels_N, weights_N, minlength=num_identities).astype(np.int64)


def identity_means(sums_ID: Floats, counts_I: Ints) -> Floats:
    """Return the mean feature of each identity [I, D]; NaN for one without features."""
    return np.where(counts_I[:, None] > 0, sums_ID / np.maximum(counts_I, 1).astype(np.float32)[:, None], np.nan)


def confusable_identities(means_ID: Floats, seeds_J: Ints, *, num_neighbours: int) -> Ints:
    """Return for each seed identity the `num_neighbours` others with the nearest mean features, nearest first [J, T].

    A batch of them shows the model the people whom it confuses. `NO_ROW` fills the places if too few identities have
    features, and all places of a seed without features.
    """
    scores_JI = means_ID[seeds_J] @ means_ID.T - 0.5 * squared_norms(means_ID)
    scores_JI[np.isnan(scores_JI)] = -np.inf
    scores_JI[np.arange(len(seeds_J)), seeds_J] = -np.inf
    nearest_JT = np.argpartition(-scores_JI, min(num_neighbours, len(means_ID) - 1), axis=1)[:, :num_neighbours]
    scores_JT = np.take_along_axis(scores_JI, nearest_JT, axis=1)
    nearest_JT = np.where(scores_JT > -np.inf, nearest_JT, NO_ROW)
    nearest_JT = np.take_along_axis(nearest_JT, np.lexsort((nearest_JT, -scores_JT), axis=1), axis=1)
    return np.pad(nearest_JT, ((0, 0), (0, num_neighbours - nearest_JT.shape[1])), constant_values=NO_ROW)
