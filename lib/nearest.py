"""The nearest vectors by Euclidean distance, as plain functions on arrays, in bounded memory.

A matrix product orders candidates as their distance does, for `nearness = q.c - |c|^2 / 2 = (|q|^2 - |q - c|^2) / 2`.
It loses digits where two vectors are nearly alike, so distances are computed from the difference. It needs no index,
and was up to twice as fast as faiss's exact search: docs/measurements.md.

Shapes: B queries (of one chunk where it says so), N candidates, K matches, D dimension.
"""

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]
Vectors = TypeVar("Vectors", bound=NDArray[np.floating])

CHUNK_ELEMENTS = 1 << 22
"""Elements of the largest intermediate array: 16 MB in float32."""
BLOCK_ROWS = 1 << 14
"""Candidates that are compared with a chunk of queries at once."""


def nearest(queries_BD: Floats, candidates_ND: Floats, num: int) -> tuple[Ints, Floats]:
    """Return the indices [B, K] and distances [B, K] of the nearest candidates, the nearest first.

    K is `num`, or the number of candidates where there are fewer. Equally near ones stand in the order of the
    candidates.
    """
    num = min(num, len(candidates_ND))
    found_BK = np.empty((len(queries_BD), num), np.int64)
    for rows in _chunks(len(queries_BD), min(BLOCK_ROWS, len(candidates_ND))):
        best_BK, index_BK = np.empty((len(rows), 0), np.float32), np.empty((len(rows), 0), np.int64)
        for first in range(0, len(candidates_ND), BLOCK_ROWS):
            nearness_BN = _nearness(queries_BD[rows], candidates_ND[first : first + BLOCK_ROWS])
            taken = min(num, nearness_BN.shape[1])
            at_BK = np.argpartition(nearness_BN, -taken, axis=1)[:, -taken:]
            best_BK = np.concatenate([best_BK, np.take_along_axis(nearness_BN, at_BK, axis=1)], axis=1)
            index_BK = np.concatenate([index_BK, at_BK + first], axis=1)
            order_BK = np.lexsort((index_BK, -best_BK), axis=1)[:, :num]
            best_BK = np.take_along_axis(best_BK, order_BK, axis=1)
            index_BK = np.take_along_axis(index_BK, order_BK, axis=1)
        found_BK[rows] = index_BK
    return by_distance(queries_BD, candidates_ND, found_BK)


def by_distance(queries_BD: Floats, candidates_ND: Floats, index_BK: Ints) -> tuple[Ints, Floats]:
    """Return the indices [B, K] in the order of the exact distances [B, K], and these."""
    distance_BK = np.empty(index_BK.shape, np.float32)
    for k in range(index_BK.shape[1]):
        distance_BK[:, k] = np.sqrt(squared_norms(queries_BD - candidates_ND[index_BK[:, k]]))
    order_BK = np.lexsort((index_BK, distance_BK), axis=1)
    return np.take_along_axis(index_BK, order_BK, axis=1), np.take_along_axis(distance_BK, order_BK, axis=1)


def num_as_near(queries_BD: Floats, candidates_ND: Floats, at_B: Ints) -> Ints:
    """Return the number of other candidates that are at least as near to each query as its candidate `at` [B]."""
    num_B = np.empty(len(queries_BD), np.int64)
    for rows in _chunks(len(queries_BD), len(candidates_ND)):
        nearness_BN = _nearness(queries_BD[rows], candidates_ND)
        bound_B = nearness_BN[np.arange(len(rows)), at_B[rows]]
        num_B[rows] = np.count_nonzero(nearness_BN >= bound_B[:, None], axis=1) - 1
    return num_B


def nearest_own_and_other(vectors_ND: Floats, people_N: Ints) -> tuple[Floats, Floats, Ints]:
    """Return each vector's distance to its person's nearest other vector [N], and to the nearest of another person [N].

    The last array [N] says which one that is. A distance is infinite where there is no such vector.
    """
    own_N, other_N = np.full(len(vectors_ND), np.inf), np.full(len(vectors_ND), np.inf)
    other_at_N = np.zeros(len(vectors_ND), np.int64)
    for rows in _chunks(len(vectors_ND), len(vectors_ND)):
        nearness_BN = _nearness(vectors_ND[rows], vectors_ND)
        is_own_BN = people_N[rows, None] == people_N
        own_BN = np.where(is_own_BN, nearness_BN, -np.inf)
        own_BN[np.arange(len(rows)), rows] = -np.inf
        nearness_BN[is_own_BN] = -np.inf
        for scores_BN, distance_N in ((own_BN, own_N), (nearness_BN, other_N)):
            at_B = scores_BN.argmax(axis=1)
            distance_B = np.sqrt(squared_norms(vectors_ND[rows] - vectors_ND[at_B]))
            distance_N[rows] = np.where(scores_BN[np.arange(len(rows)), at_B] > -np.inf, distance_B, np.inf)
        other_at_N[rows] = at_B
    return own_N, other_N, other_at_N


def squared_norms(vectors_BD: Vectors) -> Vectors:
    """Return the squared Euclidean norm of each vector."""
    norms_B: Vectors = np.einsum("bd,bd->b", vectors_BD, vectors_BD)
    return norms_B


def _nearness(queries_BD: Floats, candidates_ND: Floats) -> Floats:
    nearness_BN = queries_BD @ candidates_ND.T
    nearness_BN -= squared_norms(candidates_ND) / 2
    return nearness_BN


def _chunks(num_rows: int, num_columns: int) -> Iterator[Ints]:
    step = max(1, CHUNK_ELEMENTS // max(1, num_columns))
    for start in range(0, num_rows, step):
        yield np.arange(start, min(start + step, num_rows))
