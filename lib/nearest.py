"""The nearest vectors by Euclidean distance, as plain functions on arrays, in bounded memory.

A matrix product orders candidates as their distance does, for `nearness = q.c - |c|^2 / 2 = (|q|^2 - |q - c|^2) / 2`.
It loses digits where two vectors are nearly alike, so it only sorts out what is surely too far. Distances are computed
from the difference. No index is needed, and at a recall of 0.99 none was faster: docs/measurements.md.

Shapes: B queries (of one chunk where it says so), N candidates, K matches, H hits, D dimension.
"""

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]
Vectors = TypeVar("Vectors", bound=NDArray[np.floating])

CHUNK_ELEMENTS = 1 << 21
"""Elements of the largest intermediate array: 8 MB in float32."""
BLOCK_ROWS = 1 << 12
"""Candidates that are compared with a chunk of queries at once."""

NOTHING = np.iinfo(np.int64).max
"""The code of a match that was not found yet. Its distance is infinite."""
_MANY_HITS = 8
"""So many times as many hits as matches wanted make it worth while to look for a bound among them."""


class NearestSoFar:
    """The nearest candidates of some queries, while candidates come in blocks.

    What is found depends on the vectors and their codes alone, not on the order or the size of the blocks: a candidate
    is left out only where the rounding of the matrix product cannot matter. Equally near ones stand in the order of
    their codes.

    Attributes:
        codes_BK: the nearest candidates, the nearest first; `NOTHING` where there were fewer.
        distances_BK: their Euclidean distances, float32.
    """

    def __init__(self, queries_BD: Floats, num: int) -> None:
        self._queries_BD = np.asarray(queries_BD, np.float32)
        self._squares_B = squared_norms(self._queries_BD)
        # A column for -|c|^2 / 2, so that the product is the nearness.
        self._extended_BE = np.concatenate([self._queries_BD, np.ones((len(queries_BD), 1), np.float32)], axis=1)
        self.codes_BK = np.full((len(queries_BD), num), NOTHING)
        self.distances_BK = np.full((len(queries_BD), num), np.inf, np.float32)

    def add(self, candidates_ND: Floats, codes_N: Ints) -> None:
        """Compare all queries with candidates that have these codes, each code once."""
        with np.errstate(over="ignore", invalid="ignore"):
            for first in range(0, len(candidates_ND), BLOCK_ROWS):
                block = slice(first, first + BLOCK_ROWS)
                self._add_block(np.asarray(candidates_ND[block], np.float32), codes_N[block])

    def _add_block(self, candidates_ND: Floats, codes_N: Ints) -> None:
        squares_N = squared_norms(candidates_ND)
        extended_EN = np.concatenate([candidates_ND, -squares_N[:, None] / 2], axis=1).T
        longest = float(np.sqrt(squares_N.max()))
        for rows in _chunks(len(self._queries_BD), len(candidates_ND)):
            nearness_BN = self._extended_BE[rows] @ extended_EN
            # Sums of D products of float32 are right to D roundings (Higham 2002, 3.1), and so are distances.
            roundings = (self._queries_BD.shape[1] + 8) * float(np.finfo(np.float32).eps)
            error_B = roundings * (np.sqrt(self._squares_B[rows]) + longest) ** 2
            bound_B = (self._squares_B[rows] - self.distances_BK[rows, -1] ** 2) / 2 - error_B
            hits_H = _at_least(nearness_BN, bound_B)
            num = self.codes_BK.shape[1]
            if len(hits_H) > _MANY_HITS * num * len(rows) and num < len(candidates_ND):
                there_B = np.partition(nearness_BN, -num, axis=1)[:, -num] - 2 * error_B
                hits_H = _at_least(nearness_BN, np.fmax(bound_B, there_B))
            self._keep(rows, *np.divmod(hits_H, len(candidates_ND)), candidates_ND, codes_N)

    def _keep(self, rows: Ints, at_H: Ints, candidate_H: Ints, candidates_ND: Floats, codes_N: Ints) -> None:
        """Take in the hits: candidates of the queries at these places of `rows`, in rising order."""
        distance_H = np.empty(len(at_H), np.float32)
        step = max(1, CHUNK_ELEMENTS // candidates_ND.shape[1])
        for start in range(0, len(at_H), step):
            some = slice(start, start + step)
            difference_HD = self._queries_BD[rows[at_H[some]]] - candidates_ND[candidate_H[some]]
            distance_H[some] = np.sqrt(squared_norms(difference_HD))
        touched_T, of_H = np.unique(at_H, return_inverse=True)
        touched_T = rows[touched_T]
        num = self.codes_BK.shape[1]
        row_M = np.concatenate([np.repeat(np.arange(len(touched_T)), num), of_H])
        code_M = np.concatenate([self.codes_BK[touched_T].ravel(), codes_N[candidate_H]])
        distance_M = np.concatenate([self.distances_BK[touched_T].ravel(), distance_H])
        order_M = np.lexsort((code_M, distance_M, row_M))
        first_T = np.searchsorted(row_M[order_M], np.arange(len(touched_T)))
        kept_TK = order_M[first_T[:, None] + np.arange(num)]
        self.codes_BK[touched_T], self.distances_BK[touched_T] = code_M[kept_TK], distance_M[kept_TK]


def nearest(queries_BD: Floats, candidates_ND: Floats, num: int) -> tuple[Ints, Floats]:
    """Return the indices [B, K] and distances [B, K] of the nearest candidates, the nearest first.

    K is `num`, or the number of candidates where there are fewer. Equally near ones stand in the order of the
    candidates.
    """
    found = NearestSoFar(queries_BD, min(num, len(candidates_ND)))
    found.add(candidates_ND, np.arange(len(candidates_ND)))
    return found.codes_BK, found.distances_BK


def merged(one: tuple[Ints, Floats], other: tuple[Ints, Floats], num: int) -> tuple[Ints, Floats]:
    """Return the codes [B, K] and distances [B, K] of the `num` nearest of two searches for the same queries."""
    code_BM, distance_BM = (np.concatenate(both, axis=1) for both in zip(one, other, strict=True))
    order_BK = np.lexsort((code_BM, distance_BM), axis=1)[:, :num]
    return np.take_along_axis(code_BM, order_BK, axis=1), np.take_along_axis(distance_BM, order_BK, axis=1)


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


def _at_least(nearness_BN: Floats, bound_B: Floats) -> Ints:
    """Return the flat places of what is not below the bound; what is not a number counts."""
    below_BN = nearness_BN < bound_B[:, None].astype(np.float32)
    return np.flatnonzero(np.logical_not(below_BN, out=below_BN))


def _chunks(num_rows: int, num_columns: int) -> Iterator[Ints]:
    step = max(1, CHUNK_ELEMENTS // max(1, num_columns))
    for start in range(0, num_rows, step):
        yield np.arange(start, min(start + step, num_rows))
