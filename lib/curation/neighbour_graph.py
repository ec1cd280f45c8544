"""Which clusters of faces are near each other: a search for the nearest few of each, as pairs with exact distances.

A cluster is a point: its centre c, and its spread s, the mean squared distance of its members to the centre. The mean
squared distance of the pairs of two clusters is |c_A - c_B|^2 + s_A + s_B. A face alone is a cluster without spread.

Shapes: M clusters, Q of them that ask, P pairs, K neighbours, D dimension.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lib.neighbour_index import neighbour_index, widen

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

NEIGHBOURS = 16
"""Clusters that a search finds for each."""
MIN_RECALL = 0.95
"""Share of the neighbours within the limit that the search of many clusters finds, measured on some of them. A pair is
found from either side, so fewer than one in twenty are missed; and a cluster has the pairs of all its faces."""
_CHUNK = 1 << 16
"""Rows that are searched, and pairs that are compared, at once."""


@dataclass
class Pairs:
    """Pairs of clusters up to a limit apart.

    Attributes:
        pairs_P2: the two of each pair, the lower number first. Each pair is there once.
        squared_P: mean squared distance of their faces.
        reach_M: up to this squared distance, all clusters near one of those that asked are in its pairs; infinite if
            all others are.
    """

    pairs_P2: Ints
    squared_P: Floats
    reach_M: Floats

    def within(self, limit: float) -> tuple[Ints, Floats]:
        """Return the pairs up to `limit` apart, and their distances."""
        taken_P = self.squared_P <= limit**2
        return self.pairs_P2[taken_P], np.sqrt(self.squared_P[taken_P])


def near_faces(vectors_ND: Floats, limit: float) -> Pairs:
    """Return the pairs of faces up to `limit` apart, of each face with its nearest `NEIGHBOURS`."""
    num = len(vectors_ND)
    return near_clusters(vectors_ND, np.zeros(num, np.float32), np.arange(num), np.arange(num), limit)


def near_clusters(centres_MD: Floats, spreads_M: Floats, among_L: Ints, asked_Q: Ints, limit: float) -> Pairs:
    """Return the pairs of some clusters with the nearest others.

    Args:
        among_L: the clusters to find.
        asked_Q: those whose neighbours are looked for.
    """
    reach_M = np.full(len(centres_MD), np.inf, np.float32)
    if len(among_L) < 2 or not len(asked_Q):
        return Pairs(np.empty((0, 2), np.int64), np.empty(0, np.float32), reach_M)
    # A candidate has one more coordinate, the root of its spread. It is zero in a query.
    points_LD = np.concatenate([centres_MD[among_L], np.sqrt(spreads_M[among_L])[:, None]], axis=1, dtype=np.float32)
    queries_QD = np.concatenate([centres_MD[asked_Q], np.zeros((len(asked_Q), 1))], axis=1, dtype=np.float32)
    num = min(NEIGHBOURS + 1, len(among_L))  # a cluster finds itself, too
    index = neighbour_index(points_LD, many_queries=True)
    widen(index, points_LD, queries_QD, num, MIN_RECALL, within=limit)
    found: list[Ints] = []
    squared: list[Floats] = []
    for start in range(0, len(asked_Q), _CHUNK):
        rows_B = asked_Q[start : start + _CHUNK]
        at_BK = index.search(queries_QD[start : start + _CHUNK], num)[1]
        pairs_X2 = np.stack([np.repeat(rows_B, num), among_L[at_BK.ravel()]], axis=1)
        is_other_X = (at_BK.ravel() >= 0) & (pairs_X2[:, 0] != pairs_X2[:, 1])
        squared_X = np.full(len(pairs_X2), -np.inf, np.float32)
        squared_X[is_other_X] = squared_distances(centres_MD, spreads_M, pairs_X2[is_other_X])
        if num < len(among_L):
            is_full_B = (at_BK >= 0).all(axis=1)
            reach_M[rows_B] = np.where(is_full_B, squared_X.reshape(at_BK.shape).max(axis=1), np.inf)
        is_near_X = is_other_X & (squared_X <= limit**2)
        found.append(np.sort(pairs_X2[is_near_X], axis=1))
        squared.append(squared_X[is_near_X])
    pairs_P2, first_P = unique_pairs(np.concatenate(found), len(centres_MD))
    return Pairs(pairs_P2, np.concatenate(squared)[first_P], reach_M)


def unique_pairs(pairs_P2: Ints, num: int) -> tuple[Ints, Ints]:
    """Return each pair of numbers below `num` once, in their order, and where it stands first."""
    _, first_P = np.unique(pairs_P2[:, 0] * num + pairs_P2[:, 1], return_index=True)
    return pairs_P2[first_P], first_P


def squared_distances(centres_MD: Floats, spreads_M: Floats, pairs_P2: Ints) -> Floats:
    """Return the mean squared distance [P] of the faces of two clusters, for pairs with the lower number anywhere."""
    squared_P = np.empty(len(pairs_P2), np.float32)
    for start in range(0, len(pairs_P2), _CHUNK):
        a_B, b_B = pairs_P2[start : start + _CHUNK].T
        apart_BD = centres_MD[a_B] - centres_MD[b_B]
        squared_P[start : start + _CHUNK] = np.einsum("bd,bd->b", apart_BD, apart_BD) + (
            spreads_M[a_B] + spreads_M[b_B]
        )
    return squared_P
