"""Average linkage in rounds: the tree that SciPy makes from all pairs, ties and empty input, and many faces."""

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import cdist, pdist

from lib import neighbour_index
from lib.curation import neighbour_graph
from lib.curation.linkage import Clusters, average_linkage
from lib.curation.proposals import pairwise_f


def people(num: int, faces: int, *, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors [num * faces, 32] around one direction for each person, and the person of each."""
    rng = np.random.default_rng(seed)
    person_N = np.repeat(np.arange(num), faces)
    vectors_ND = rng.normal(size=(num, 32))[person_N] + noise * rng.normal(size=(len(person_N), 32))
    return (vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)).astype(np.float32), person_N


@pytest.mark.parametrize(
    ("num", "faces", "noise"),
    [(30, 8, 0.7), (3, 120, 0.5), (200, 3, 0.9)],  # few faces, more than a search finds of each, people that overlap
)
@pytest.mark.parametrize("seed", range(3))
def test_the_clusters_are_those_of_scipy_at_every_threshold(num: int, faces: int, noise: float, seed: int) -> None:
    vectors_ND, _ = people(num, faces, noise=noise, seed=seed)
    tree = average_linkage(vectors_ND, 1.3)
    theirs = linkage(pdist(vectors_ND, "sqeuclidean"), "average")
    assert len(tree.merges_E2) == (theirs[:, 2] <= 1.3**2).sum()
    for threshold in (0.5, 0.7, 0.9, 1.1, 1.29):
        cluster_N, expected_N = tree.clusters(threshold), fcluster(theirs, threshold**2, "distance")
        assert len(set(zip(cluster_N, expected_N, strict=True))) == cluster_N.max() + 1 == expected_N.max()


def test_the_clusters_are_those_of_scipy_whatever_the_search_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors_ND, _ = people(20, 12, noise=0.7)
    theirs = linkage(pdist(vectors_ND, "sqeuclidean"), "average")
    for num in (1, 2, 5, 500):
        monkeypatch.setattr(neighbour_graph, "NEIGHBOURS", num)
        distances_E = np.sort(average_linkage(vectors_ND, 2.0).distances_E)
        assert distances_E == pytest.approx(np.sqrt(theirs[:, 2]), rel=1e-4)


def test_the_same_picture_many_times_is_one_cluster() -> None:
    vectors_ND = np.repeat(np.eye(3, 8, dtype=np.float32), 7, axis=0)
    cluster_N = average_linkage(vectors_ND, 0.5).clusters(0.5)
    assert sorted(np.bincount(cluster_N)) == [7, 7, 7]
    assert len(set(cluster_N[:7])) == 1
    many_ND = np.repeat(people(5, 4, noise=0.5)[0], 50, axis=0)
    assert len(average_linkage(many_ND, 2.0).merges_E2) == len(many_ND) - 1


@pytest.mark.parametrize("num", [0, 1])
def test_too_few_faces_merge_with_nobody(num: int) -> None:
    tree = average_linkage(np.zeros((num, 8), np.float32), 1.0)
    assert len(tree.merges_E2) == 0
    assert tree.clusters(1.0).tolist() == list(range(num))


def test_an_inverted_file_finds_the_people_too(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors_ND, person_N = people(300, 6, noise=0.35)
    monkeypatch.setattr(neighbour_index, "EXACT_UP_TO", 200)
    assert pairwise_f(average_linkage(vectors_ND, 0.8).clusters(0.8), person_N) > 0.97
    exact = average_linkage(vectors_ND, 0.8)
    monkeypatch.setattr(neighbour_graph, "MIN_RECALL", 0.5)
    assert neighbour_graph.near_faces(vectors_ND, 0.8).within(0.8)[0].shape[1] == 2
    assert pairwise_f(average_linkage(vectors_ND, 0.8).clusters(0.8), exact.clusters(0.8)) > 0.9


def test_groups_have_the_mean_squared_distances_of_their_pairs() -> None:
    vectors_ND, _ = people(2, 5, noise=0.5)
    group_N = np.array([0, 0, 0, 2, 2, 2, 2, 0, 2, 2])
    groups = Clusters.of_groups(vectors_ND, group_N, 3)
    squared = cdist(vectors_ND[group_N == 0], vectors_ND[group_N == 2], "sqeuclidean").mean()
    apart_D = groups.centres_MD[0] - groups.centres_MD[2]
    assert apart_D @ apart_D + groups.spreads_M[0] + groups.spreads_M[2] == pytest.approx(squared, rel=1e-5)
    assert groups.sizes_M.tolist() == [4, 0, 6]
