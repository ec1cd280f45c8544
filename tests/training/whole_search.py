"""Draws candidates and searches them in one call, as the feature store does over its shards."""

import numpy as np

from lib.training.mining import Bools, Floats, Ints, Negatives, draw_candidates, search, semihard_bounds


def nearest_negatives(
    queries_BD: Floats,
    labels_B: Ints,
    features_ND: Floats,
    labels_N: Ints,
    *,
    num_candidates: int,
    rng: np.random.Generator,
    ceiling: float | None = None,
    filled_N: Bools | None = None,
) -> Negatives:
    """Return for each anchor the nearest of `num_candidates` random photos of other identities, the hard negative."""
    pool = draw_candidates(labels_B, labels_N, num_candidates=num_candidates, rng=rng, filled_N=filled_N)
    return search(queries_BD, features_ND.take(pool.rows, axis=0), pool.rows, pool.blocked, ceiling=ceiling)


def semihard_negatives(
    queries_BD: Floats,
    positives_BD: Floats,
    labels_B: Ints,
    features_ND: Floats,
    labels_N: Ints,
    *,
    num_candidates: int,
    rng: np.random.Generator,
    ceiling: float | None = None,
    filled_N: Bools | None = None,
) -> Negatives:
    """Return the nearest of `num_candidates` random photos of others that is farther from the anchor than its positive.

    Where none is farther, the farthest of them all stands in.
    """
    pool = draw_candidates(labels_B, labels_N, num_candidates=num_candidates, rng=rng, filled_N=filled_N)
    candidates_PD = features_ND.take(pool.rows, axis=0)
    beyond_squared_B = semihard_bounds(queries_BD, positives_BD)
    return search(
        queries_BD, candidates_PD, pool.rows, pool.blocked, beyond_squared_B=beyond_squared_B, ceiling=ceiling
    )
