"""Average-linkage clustering of embeddings, for millions of faces: no matrix of all pairs, one search per round.

Two clusters A and B are as far apart as the mean squared distance of their pairs (UPGMA over squared Euclidean
distances). With centres c and spreads s, the mean squared distance of a cluster's members to its centre, that is
|c_A - c_B|^2 + s_A + s_B. So a cluster is a point, and its nearest cluster is found by a search among points.

In each round, all pairs of clusters that are each other's nearest merge. Average linkage is reducible, so this yields
the same tree as merging the nearest pair of all, one at a time (Murtagh, "A survey of recent advances in hierarchical
clustering algorithms", 1983).

Shapes: N faces, M clusters, E merges, D dimension.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lib.neighbour_index import neighbour_index

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]


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
        faces_M: one of the members.
    """

    centres_MD: Floats
    spreads_M: Floats
    sizes_M: Floats
    faces_M: Ints = field(default_factory=lambda: np.empty(0, np.int64))

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

    def __len__(self) -> int:
        return len(self.centres_MD)

    def kept(self, which_M: NDArray[np.bool_]) -> "Clusters":
        """Return these of the clusters."""
        return Clusters(self.centres_MD[which_M], self.spreads_M[which_M], self.sizes_M[which_M], self.faces_M[which_M])

    def merged(self, a_E: Ints, b_E: Ints, squared_E: Floats) -> "Clusters":
        """Return the clusters after each a has absorbed its b, `squared_E` apart. Entries b stay unchanged."""
        sizes_E = self.sizes_M[a_E] + self.sizes_M[b_E]
        share_E = self.sizes_M[a_E] / sizes_E
        between_E = squared_E - self.spreads_M[a_E] - self.spreads_M[b_E]
        centres_MD, spreads_M, sizes_M = self.centres_MD.copy(), self.spreads_M.copy(), self.sizes_M.copy()
        centres_MD[a_E] = share_E[:, None] * self.centres_MD[a_E] + (1 - share_E)[:, None] * self.centres_MD[b_E]
        spreads_M[a_E] = (
            share_E * self.spreads_M[a_E]
            + (1 - share_E) * self.spreads_M[b_E]
            + share_E * (1 - share_E) * np.maximum(between_E, 0)
        )
        sizes_M[a_E] = sizes_E
        return Clusters(centres_MD, spreads_M, sizes_M, self.faces_M)


def average_linkage(vectors_ND: Floats, limit: float) -> Tree:
    """Return the tree of the faces up to merges of clusters `limit` apart."""
    num = len(vectors_ND)
    clusters = Clusters(vectors_ND.astype(np.float32), np.zeros(num, np.float32), np.ones(num), np.arange(num))
    merges: list[Ints] = []
    distances: list[Floats] = []
    while len(clusters) > 1:
        nearest_M, squared_M = _nearest_cluster(clusters)
        # If a cluster is beyond the limit from all others, it stays so after any merge.
        within_M = squared_M <= limit**2
        here_M = np.arange(len(clusters))
        mutual_M = within_M & (nearest_M[nearest_M] == here_M) & (here_M < nearest_M)
        a_E = here_M[mutual_M]
        if not len(a_E):
            if not within_M.any():
                break
            a_E = np.array([np.where(within_M, squared_M, np.inf).argmin()])  # equally near ones may point in a ring
        b_E = nearest_M[a_E]
        merges.append(np.stack([clusters.faces_M[a_E], clusters.faces_M[b_E]], axis=1))
        distances.append(np.sqrt(squared_M[a_E]))
        within_M[b_E] = False
        clusters = clusters.merged(a_E, b_E, squared_M[a_E]).kept(within_M)
    if not merges:
        return Tree(num, np.empty((0, 2), np.int64), np.empty(0, np.float32))
    return Tree(num, np.concatenate(merges), np.concatenate(distances))


def _nearest_cluster(clusters: Clusters) -> tuple[Ints, Floats]:
    """Return each cluster's nearest other one [M] and the mean squared distance of their pairs [M].

    A candidate has one more coordinate, the root of its spread. It is zero in a query.
    """
    points_MD = np.ascontiguousarray(
        np.concatenate([clusters.centres_MD, np.sqrt(clusters.spreads_M)[:, None]], axis=1), np.float32
    )
    queries_MD = points_MD.copy()
    queries_MD[:, -1] = 0
    index = neighbour_index(points_MD)
    _, at_M2 = index.search(queries_MD, 2)
    # A cluster finds itself first, or second if there is an equal one.
    is_self_M = at_M2[:, 0] == np.arange(len(clusters))
    at_M = np.where(is_self_M, at_M2[:, 1], at_M2[:, 0])
    found_M = at_M >= 0
    at_M = np.where(found_M, at_M, 0)
    apart_MD = clusters.centres_MD - clusters.centres_MD[at_M]
    squared_M = np.einsum("md,md->m", apart_MD, apart_MD) + clusters.spreads_M + clusters.spreads_M[at_M]
    return at_M, np.where(found_M, squared_M, np.inf)
