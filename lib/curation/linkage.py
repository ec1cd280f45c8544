"""Average-linkage clustering of embeddings, for millions of faces: no matrix of all pairs, and few searches.

Two clusters A and B are as far apart as the mean squared distance of their pairs (UPGMA over squared Euclidean
distances). With centres c and spreads s, the mean squared distance of a cluster's members to its centre, that is
|c_A - c_B|^2 + s_A + s_B. So a cluster is a point, and its nearest cluster is found by a search among points.

In each round, all pairs of clusters that are each other's nearest merge. Average linkage is reducible, so this yields
the same tree as merging the nearest pair of all, one at a time (Murtagh, "A survey of recent advances in hierarchical
clustering algorithms", 1983).

A search finds the nearest few of each cluster, and how far it saw (`reach`). Reducible also means that a cluster made
of A and B is never nearer to another than the nearer of A and B was. So the pairs of A and B are those of the new
cluster, complete up to the smaller reach of both. A cluster is searched again only when its nearest may be beyond that.

Shapes: N faces, M clusters, E merges, P pairs, D dimension.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lib.curation.neighbour_graph import Pairs, near_clusters, near_faces, squared_distances, unique_pairs

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

_HUNGRY_SHARE = 8
"""A round with fewer merges than one in so many of the clusters that wait for a search is followed by the search."""


@dataclass(frozen=True)
class Tree:
    """The merges of a clustering, in rounds.

    Attributes:
        merges_E2: a face of either cluster.
        distances_E: root of the mean squared distance of their pairs.
    """

    num_faces: int
    merges_E2: Ints
    distances_E: Floats

    def clusters(self, threshold: float) -> Ints:
        """Return the cluster of each face [N], 0 to M - 1, when clusters up to `threshold` apart merge."""
        edges_E2 = self.merges_E2[self.distances_E <= threshold]
        graph = coo_array(
            (np.ones(len(edges_E2), bool), (edges_E2[:, 0], edges_E2[:, 1])), shape=(self.num_faces, self.num_faces)
        )
        return np.asarray(connected_components(graph, directed=False)[1], np.int64)


@dataclass
class Clusters:
    """Clusters as points.

    Attributes:
        centres_MD: mean of the members.
        spreads_M: mean squared distance of the members to the centre.
        sizes_M: number of members.
    """

    centres_MD: Floats
    spreads_M: Floats
    sizes_M: Floats

    @classmethod
    def of_groups(cls, vectors_ND: Floats, group_N: Ints, num_groups: int) -> "Clusters":
        """Return the clusters of faces with equal numbers, 0 to `num_groups` - 1. An empty cluster has size 0."""
        sizes_M = np.bincount(group_N, minlength=num_groups).astype(np.float64)
        places_NM = coo_array((np.ones(len(group_N)), (group_N, np.arange(len(group_N)))), (num_groups, len(group_N)))
        shares_M = 1 / np.maximum(sizes_M, 1)
        centres_MD = (places_NM @ vectors_ND.astype(np.float64)) * shares_M[:, None]
        squares_M = (places_NM @ np.einsum("nd,nd->n", vectors_ND, vectors_ND).astype(np.float64)) * shares_M
        spreads_M = np.maximum(squares_M - np.einsum("md,md->m", centres_MD, centres_MD), 0)
        return cls(centres_MD, spreads_M, sizes_M)


def average_linkage(vectors_ND: Floats, limit: float, near: Pairs | None = None) -> Tree:
    """Return the tree of the faces up to merges of clusters `limit` apart.

    Args:
        near: pairs of faces up to `limit` apart, as `near_faces` returns them, if they are known.
    """
    merging = _Merging(vectors_ND, limit, near or near_faces(vectors_ND, limit))
    merging.merge_equal()
    while True:
        hungry_H, num_merges = merging.merge_mutual()
        if num_merges * _HUNGRY_SHARE < len(hungry_H):
            merging.search(hungry_H)
        elif not num_merges:
            return merging.tree()


class _Merging:
    """The clusters of an unfinished tree. A cluster has the number of one of its faces."""

    def __init__(self, vectors_ND: Floats, limit: float, near: Pairs) -> None:
        num = len(vectors_ND)
        self.squared_limit = np.float32(limit**2)
        self.limit = limit
        self.centres_MD = np.array(vectors_ND, np.float32)
        self.spreads_M = np.zeros(num, np.float32)
        self.sizes_M = np.ones(num, np.float32)
        self.is_live_M = np.ones(num, bool)
        self.near = Pairs(near.pairs_P2, near.squared_P, near.reach_M.copy())
        self._merges: list[Ints] = []
        self._squared: list[Floats] = []

    def tree(self) -> Tree:
        """Return the merges of all rounds."""
        if not self._merges:
            return Tree(len(self.sizes_M), np.empty((0, 2), np.int64), np.empty(0, np.float32))
        return Tree(len(self.sizes_M), np.concatenate(self._merges), np.sqrt(np.concatenate(self._squared)))

    def merge_equal(self) -> None:
        """Merge equal vectors at once: in rounds, a picture that is there n times would take up to n of them."""
        equal_P2 = self.near.pairs_P2[self.near.squared_P == 0]
        if not len(equal_P2):
            return
        num = len(self.sizes_M)
        graph = coo_array((np.ones(len(equal_P2), bool), (equal_P2[:, 0], equal_P2[:, 1])), shape=(num, num))
        group_N = connected_components(graph, directed=False)[1]
        _, first_G = np.unique(group_N, return_index=True)
        into_M = first_G[group_N]
        gone_E = np.flatnonzero(into_M != np.arange(num))
        self._note(into_M[gone_E], gone_E, np.zeros(len(gone_E), np.float32))
        np.add.at(self.sizes_M, into_M[gone_E], 1)
        self._rename(into_M)

    def merge_mutual(self) -> tuple[Ints, int]:
        """Merge each other's nearest; return the clusters whose nearest may be unknown, and the number of merges."""
        near, num = self.near, len(self.sizes_M)
        nearest_M = np.full(num, np.inf, np.float32)
        for side in (0, 1):
            np.minimum.at(nearest_M, near.pairs_P2[:, side], near.squared_P)
        is_known_M = nearest_M <= near.reach_M
        hungry_H = np.flatnonzero(self.is_live_M & ~is_known_M & (near.reach_M < self.squared_limit))
        # A cluster without any other within the limit stays so after any merge of others.
        self.is_live_M &= is_known_M & np.isfinite(nearest_M) | (near.reach_M < self.squared_limit)
        nearest_M[~is_known_M] = -1
        is_mutual_P = (nearest_M[near.pairs_P2] == near.squared_P[:, None]).all(axis=1)
        pairs_E2, squared_E = _disjoint(near.pairs_P2[is_mutual_P], near.squared_P[is_mutual_P], num)
        if len(pairs_E2):
            self._merge(pairs_E2[:, 0], pairs_E2[:, 1], squared_E)
        return hungry_H[self.is_live_M[hungry_H]], len(pairs_E2)

    def search(self, hungry_H: Ints) -> None:
        """Find the neighbours of these clusters among all that can still merge."""
        found = near_clusters(self.centres_MD, self.spreads_M, np.flatnonzero(self.is_live_M), hungry_H, self.limit)
        pairs_P2 = np.concatenate([self.near.pairs_P2, found.pairs_P2])
        squared_P = np.concatenate([self.near.squared_P, found.squared_P])
        self.near.pairs_P2, first_P = unique_pairs(pairs_P2, len(self.sizes_M))
        self.near.squared_P = squared_P[first_P]
        self.near.reach_M[hungry_H] = found.reach_M[hungry_H]

    def _merge(self, a_E: Ints, b_E: Ints, squared_E: Floats) -> None:
        """Let each a absorb its b, `squared_E` apart."""
        sizes_E = self.sizes_M[a_E] + self.sizes_M[b_E]
        share_E = self.sizes_M[a_E] / sizes_E
        spread_a_E, spread_b_E = self.spreads_M[a_E], self.spreads_M[b_E]
        between_E = np.maximum(squared_E - spread_a_E - spread_b_E, 0)
        self.centres_MD[a_E] = share_E[:, None] * self.centres_MD[a_E] + (1 - share_E)[:, None] * self.centres_MD[b_E]
        self.spreads_M[a_E] = share_E * spread_a_E + (1 - share_E) * spread_b_E + share_E * (1 - share_E) * between_E
        self.sizes_M[a_E] = sizes_E
        self._note(a_E, b_E, squared_E)
        into_M = np.arange(len(self.sizes_M))
        into_M[b_E] = a_E
        self._rename(into_M)

    def _note(self, a_E: Ints, b_E: Ints, squared_E: Floats) -> None:
        self._merges.append(np.stack([a_E, b_E], axis=1))
        self._squared.append(squared_E)

    def _rename(self, into_M: Ints) -> None:
        """Give the pairs of clusters that were absorbed to those that did."""
        near, num = self.near, len(into_M)
        gone_M = into_M != np.arange(num)
        is_new_M = gone_M.copy()
        is_new_M[into_M[gone_M]] = True
        np.minimum.at(near.reach_M, into_M[gone_M], near.reach_M[gone_M])
        self.is_live_M[gone_M] = False
        is_touched_P = is_new_M[near.pairs_P2].any(axis=1)
        pairs_P2 = np.sort(into_M[near.pairs_P2[is_touched_P]], axis=1)
        pairs_P2, _ = unique_pairs(pairs_P2[pairs_P2[:, 0] != pairs_P2[:, 1]], num)
        squared_P = squared_distances(self.centres_MD, self.spreads_M, pairs_P2)
        kept_P = squared_P <= self.squared_limit
        near.pairs_P2 = np.concatenate([near.pairs_P2[~is_touched_P], pairs_P2[kept_P]])
        near.squared_P = np.concatenate([near.squared_P[~is_touched_P], squared_P[kept_P]])


def _disjoint(pairs_P2: Ints, squared_P: Floats, num: int) -> tuple[Ints, Floats]:
    """Return pairs of which no two share a cluster. Of equally near ones, some are drawn."""
    rank_P = np.random.default_rng(0).permutation(len(pairs_P2))
    first_M = np.full(num, len(pairs_P2))
    for side in (0, 1):
        np.minimum.at(first_M, pairs_P2[:, side], rank_P)
    taken_P = (first_M[pairs_P2] == rank_P[:, None]).all(axis=1)
    return pairs_P2[taken_P], squared_P[taken_P]
