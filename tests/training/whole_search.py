"""Draws candidates and searches them in one call, as the feature store does over its shards."""

from typing import Any

from lib.training.mining import Floats, Ints, Negatives, draw_candidates, search, semihard_bounds


def mined_negatives(
    queries_BD: Floats,
    labels_B: Ints,
    features_ND: Floats,
    labels_N: Ints,
    *,
    positives_BD: Floats | None = None,
    ceiling: float | None = None,
    **drawing: Any,
) -> Negatives:
    """Return for each anchor the nearest of random photos of other identities: the hard negative.

    With positives it is the semi-hard one: the nearest that is farther from the anchor than its positive, or the
    farthest of all where none is. `drawing` goes to `draw_candidates`.
    """
    pool = draw_candidates(labels_B, labels_N, **drawing)
    bounds_B = None if positives_BD is None else semihard_bounds(queries_BD, positives_BD)
    candidates_PD = features_ND.take(pool.rows, axis=0)
    return search(queries_BD, candidates_PD, pool.rows, pool.blocked, beyond_squared_B=bounds_B, ceiling=ceiling)
