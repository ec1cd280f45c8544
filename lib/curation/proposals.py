"""Compares clusters of faces with their identities, and proposes changes, the most certain of each kind first.

Clusters and identities are matched one to one, by the number of faces they share. If both agree there is no proposal.
If a face lies in the cluster of another identity, its label is wrong. If all faces of an identity lie in the cluster of
another one, both are one person. If some of its faces form a cluster of their own, they show somebody else.

Shapes: N faces, M clusters, K cells (the faces of one identity in one cluster), D dimension.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lib.curation.linkage import Clusters

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

RELABEL, MERGE, SPLIT, OUTLIER, ASSIGN, NEW, DUPLICATE = KINDS = (
    "relabel",
    "merge",
    "split",
    "outlier",
    "assign",
    "new",
    "duplicate",
)
MEANINGS = {
    RELABEL: "photos of this identity show another person, who has an identity",
    MERGE: "two identities are one person",
    SPLIT: "some photos of this identity show another person, who has no identity",
    OUTLIER: "one photo of this identity shows nobody else who is here, or a bad face",
    ASSIGN: "photos without an identity show a person who has one",
    NEW: "photos without an identity show one person",
    DUPLICATE: "two photos are the same picture",
}

NOBODY = -1


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A change to review.

    Attributes:
        kind: one of `KINDS`.
        certainty: 0 to 1, comparable within a kind.
        faces: whose identity changes.
        identity: which they have now, or `NOBODY`.
        to: the identity they would get. `NOBODY` takes it away, None stands for a new identity.
        evidence: faces to look at beside them.
        distance: between the faces and the evidence (root of the mean squared distance); NaN without evidence.
    """

    kind: str
    certainty: float
    faces: Ints
    identity: int
    to: int | None
    evidence: Ints
    distance: float


def proposals(vectors_ND: Floats, identity_N: Ints, cluster_N: Ints, threshold: float) -> list[Proposal]:
    """Return the proposals that follow from the clusters.

    Args:
        identity_N: 0 and up, or `NOBODY`.
        cluster_N: of clusters whose faces are within `threshold` of each other, as `lib.curation.linkage` makes them.
    """
    cells = _Cells.of(vectors_ND, identity_N, cluster_N)
    found = [
        proposal
        for cell in np.flatnonzero(cells.differs_K)
        if (proposal := _proposal(cells, int(cell), threshold)) is not None
    ]
    return surest_first(found)


def surest_first(found: list[Proposal]) -> list[Proposal]:
    """Return the proposals by kind, the surest of each kind first."""
    return sorted(found, key=lambda each: (KINDS.index(each.kind), -each.certainty, int(each.faces[0])))


@dataclass(frozen=True)
class _Cells:
    """The faces of one identity in one cluster, for each such pair.

    Attributes:
        faces_N: all faces, cell by cell; those of cell k are `faces_N[starts_K[k] : starts_K[k + 1]]`.
        owner_M: the identity that a cluster is matched with, or `NOBODY`.
        home_K: the cell where the cell's identity is matched; where it is matched nowhere, its largest cell; else -1.
        host_K: the cell of the identity that the cell's cluster is matched with, or -1; for a cluster without an
            identity, and for unlabelled faces among themselves, it is -1.
        totals_K: faces of the cell's identity.
        differs_K: cells that lead to a proposal.
    """

    identity_K: Ints
    cluster_K: Ints
    sizes_K: Ints
    starts_K: Ints
    faces_N: Ints
    groups: Clusters
    owner_M: Ints
    home_K: Ints
    host_K: Ints
    totals_K: Ints
    differs_K: NDArray[np.bool_]

    @classmethod
    def of(cls, vectors_ND: Floats, identity_N: Ints, cluster_N: Ints) -> "_Cells":
        order_N = np.lexsort((identity_N, cluster_N))
        pairs = pd.DataFrame({"cluster": cluster_N[order_N], "identity": identity_N[order_N]})
        cells = pairs.groupby(["cluster", "identity"], sort=True).size()
        cluster_K = cells.index.get_level_values(0).to_numpy(np.int64)
        identity_K = cells.index.get_level_values(1).to_numpy(np.int64)
        sizes_K = cells.to_numpy(np.int64)
        cell_N = np.empty(len(identity_N), np.int64)
        cell_N[order_N] = np.repeat(np.arange(len(cells)), sizes_K)

        num_clusters, num_identities = int(cluster_N.max()) + 1, int(identity_N.max(initial=NOBODY)) + 1
        home_of, owner_M = np.full(num_identities, -1), np.full(num_clusters, NOBODY)
        host_M, largest_of = np.full(num_clusters, -1), np.full(num_identities, -1)
        order_K = np.lexsort((identity_K, -sizes_K))
        order_K = order_K[identity_K[order_K] != NOBODY]
        for k, identity, cluster in np.stack([order_K, identity_K[order_K], cluster_K[order_K]], axis=1).tolist():
            if largest_of[identity] < 0:
                largest_of[identity] = k
            if home_of[identity] < 0 and owner_M[cluster] == NOBODY:
                home_of[identity], owner_M[cluster], host_M[cluster] = k, identity, k
        is_named_K = identity_K != NOBODY
        has_home_K = is_named_K & ((home_of[identity_K] if num_identities else -1) >= 0)
        at_home_K = has_home_K & ((home_of[identity_K] if num_identities else -1) == np.arange(len(cells)))
        home_of = np.where(home_of >= 0, home_of, largest_of)
        home_K = np.where(is_named_K, home_of[identity_K] if num_identities else -1, -1)
        # A single unlabelled face leads to no proposal.
        alone_K = ~is_named_K & (host_M[cluster_K] < 0) & (sizes_K < 2)
        return cls(
            identity_K=identity_K,
            cluster_K=cluster_K,
            sizes_K=sizes_K,
            starts_K=np.concatenate([[0], np.cumsum(sizes_K)]),
            faces_N=order_N,
            groups=Clusters.of_groups(vectors_ND, cell_N, len(cells)),
            owner_M=owner_M,
            home_K=home_K,
            host_K=host_M[cluster_K],
            totals_K=np.bincount(identity_K + 1, sizes_K).astype(np.int64)[identity_K + 1],
            differs_K=~at_home_K & ~alone_K,
        )

    def faces(self, cell: int) -> Ints:
        """Return the faces of a cell, ascending."""
        return np.sort(self.faces_N[self.starts_K[cell] : self.starts_K[cell + 1]])

    def distance(self, a: int, b: int) -> float:
        """Return the root of the mean squared distance of two cells."""
        apart_D = self.groups.centres_MD[a] - self.groups.centres_MD[b]
        return float(np.sqrt(apart_D @ apart_D + self.groups.spreads_M[a] + self.groups.spreads_M[b]))

    def apart(self, a: int, b: int) -> float:
        """Return how far apart the people of two cells are, without the variety of each one's photos.

        The squared distance of two means is too large by the variance of each mean, which is subtracted. Of a single
        face the variance is unknown, and that of the other cell stands for it.
        """
        variances = [
            self.groups.spreads_M[cell] * size / (size - 1) if (size := self.sizes_K[cell]) > 1 else None
            for cell in (a, b)
        ]
        known = [each for each in variances if each is not None] or [0.0]
        of_means = sum(
            (known[0] if each is None else each) / self.sizes_K[cell]
            for each, cell in zip(variances, (a, b), strict=True)
        )
        apart_D = self.groups.centres_MD[a] - self.groups.centres_MD[b]
        return float(np.sqrt(max(0.0, apart_D @ apart_D - of_means)))

    def width(self, cell: int) -> float:
        """Return the root of the mean squared distance of the faces of a cell of two or more."""
        size = self.sizes_K[cell]
        return float(np.sqrt(2 * self.groups.spreads_M[cell] * size / (size - 1)))


def _proposal(cells: _Cells, cell: int, threshold: float) -> Proposal | None:
    identity, host, home = int(cells.identity_K[cell]), int(cells.host_K[cell]), int(cells.home_K[cell])
    faces = cells.faces(cell)

    def made(kind: str, certainty: float, to: int | None, beside: int, distance: float) -> Proposal:
        evidence = cells.faces(beside) if beside >= 0 else np.empty(0, np.int64)
        sure = min(1.0, max(0.0, certainty))
        return Proposal(
            kind=kind,
            certainty=sure,
            faces=faces,
            identity=identity,
            to=to,
            evidence=evidence,
            distance=distance,
        )

    if identity == NOBODY:
        if host < 0:
            width = cells.width(cell)
            return made(NEW, 1 - width / threshold, None, -1, width)
        distance = cells.distance(cell, host)
        return made(ASSIGN, 1 - distance / threshold, int(cells.identity_K[host]), host, distance)
    if host >= 0:
        distance, to = cells.distance(cell, host), int(cells.identity_K[host])
        if cell == home or cells.sizes_K[cell] > cells.sizes_K[home]:
            # Most of the identity lies in the cluster of another. Then all of it is that person, except stray faces.
            whole = faces if cell == home else np.sort(np.concatenate([faces, cells.faces(home)]))
            if 2 * len(whole) > cells.totals_K[cell]:
                faces = whole
                return made(MERGE, 1 - cells.apart(cell, host) / threshold, to, host, distance)
            return made(RELABEL, 1 - distance / threshold, to, host, distance)
        return made(RELABEL, (cells.distance(cell, home) - distance) / threshold, to, host, distance)
    # The cluster belongs to nobody, so the identity has its home elsewhere.
    distance = cells.distance(cell, home)
    if cells.sizes_K[cell] > 1:
        return made(SPLIT, distance / threshold - 1, None, home, distance)
    return made(OUTLIER, distance / threshold - 1, NOBODY, home, distance)


def best_threshold(clusters_at: dict[float, Ints], identity_N: Ints) -> float:
    """Return the threshold whose clusters agree most with the identities, by the F-measure of pairs."""
    named_N = identity_N != NOBODY
    return max(clusters_at, key=lambda threshold: pairwise_f(clusters_at[threshold][named_N], identity_N[named_N]))


def pairwise_f(cluster_N: Ints, identity_N: Ints) -> float:
    """Return the F-measure of the pairs that share a cluster, against those that share an identity."""

    def num_pairs(numbers_N: Ints) -> float:
        sizes = np.unique(numbers_N, return_counts=True)[1].astype(np.float64)
        return float((sizes * (sizes - 1)).sum() / 2)

    both_N = cluster_N * (identity_N.max(initial=0) + 1) + identity_N
    both, ours, theirs = num_pairs(both_N), num_pairs(cluster_N), num_pairs(identity_N)
    return 2 * both / (ours + theirs) if ours + theirs else 0.0
