"""What clusters say about identities: each planted fault is found, and right labels stay alone."""

import numpy as np
import pytest
from sklearn.metrics import pair_confusion_matrix

from bench.curation import bcubed_f
from lib.curation.linkage import average_linkage
from lib.curation.proposals import NOBODY, Proposal, best_threshold, pairwise_f, proposals
from tests.curation.test_linkage import people

THRESHOLD = 0.8


def proposed(vectors_ND: np.ndarray, identity_N: np.ndarray) -> list[Proposal]:
    """Return the proposals at the threshold."""
    cluster_N = average_linkage(vectors_ND, THRESHOLD).clusters(THRESHOLD)
    return proposals(vectors_ND, identity_N, cluster_N, THRESHOLD)


@pytest.fixture
def faces() -> tuple[np.ndarray, np.ndarray]:
    """Return the faces of 20 people, six each, and their right labels."""
    return people(20, 6, noise=0.25)


def test_right_labels_are_left_alone(faces: tuple[np.ndarray, np.ndarray]) -> None:
    assert proposed(*faces) == []


def test_swapped_labels_go_back(faces: tuple[np.ndarray, np.ndarray]) -> None:
    vectors_ND, person_N = faces
    identity_N = person_N.copy()
    identity_N[[0, 30]] = person_N[[30, 0]]
    found = proposed(vectors_ND, identity_N)
    assert [each.kind for each in found] == ["relabel", "relabel"]
    assert {(int(each.faces[0]), each.identity, each.to) for each in found} == {(0, 5, 0), (30, 0, 5)}
    assert all(each.certainty > 0.5 for each in found)
    assert set(found[0].evidence) <= set(np.flatnonzero(person_N == found[0].to))


@pytest.mark.parametrize("stray", [False, True])
def test_an_identity_split_in_two_is_merged_whole(faces: tuple[np.ndarray, np.ndarray], stray: bool) -> None:
    vectors_ND, person_N = faces
    identity_N = person_N.copy()
    identity_N[:3] = 20
    if stray:
        vectors_ND = vectors_ND.copy()
        vectors_ND[0] = -vectors_ND[0]  # one photo is unlike the person, so the half has a cluster of its own
    (found,) = proposed(vectors_ND, identity_N)
    assert found.kind == "merge"
    assert sorted((found.identity, found.to)) == [0, 20]
    assert found.faces.tolist() == [0, 1, 2]


def test_a_person_of_varied_photos_is_surer_to_be_one_than_two_alike_people_of_similar_photos() -> None:
    rng = np.random.default_rng(3)
    varied_ND = rng.normal(scale=0.05, size=(12, 128)) + np.eye(128)[0]
    alike_ND = rng.normal(scale=0.01, size=(12, 128)) + np.eye(128)[1] + 0.6 * np.eye(128)[np.repeat([2, 3], 6)]
    identity_N = np.repeat([0, 1, 2, 3], 6)
    vectors_ND = np.concatenate([varied_ND, alike_ND]).astype(np.float32)
    apart = [
        np.linalg.norm(vectors_ND[n : n + 6, None] - vectors_ND[None, n + 6 : n + 12], axis=2).mean() for n in (0, 12)
    ]
    assert 0.7 < apart[1] - 0.1 < apart[0] < 0.9  # their photos are about as far apart
    found = proposals(vectors_ND, identity_N, np.repeat([0, 1], 12), 1.0)
    assert [{each.identity, each.to} for each in found] == [{0, 1}, {2, 3}]
    assert found[0].certainty > 0.8 > 0.3 > found[1].certainty


def test_a_wrong_face_under_a_split_identity_goes_to_its_person_and_the_identity_does_not(
    faces: tuple[np.ndarray, np.ndarray],
) -> None:
    vectors_ND, person_N = faces
    identity_N = person_N.copy()
    identity_N[:2] = 20  # the smaller part of person 0, whose cluster is that of the larger part
    identity_N[6] = 20  # and a face of person 1
    found = {each.kind: each for each in proposed(vectors_ND, identity_N)}
    assert found.keys() == {"merge", "relabel"}
    assert (found["merge"].faces.tolist(), found["merge"].identity, found["merge"].to) == ([0, 1], 20, 0)
    assert (found["relabel"].faces.tolist(), found["relabel"].identity, found["relabel"].to) == ([6], 20, 1)
    assert found["relabel"].certainty > 0.5


def test_an_identity_of_two_people_who_have_others_is_no_merge(faces: tuple[np.ndarray, np.ndarray]) -> None:
    vectors_ND, person_N = faces
    identity_N = person_N.copy()
    identity_N[[0, 6]] = 20
    found = proposed(vectors_ND, identity_N)
    assert [each.kind for each in found] == ["relabel", "relabel"]
    assert {(int(each.faces[0]), each.to) for each in found} == {(0, 0), (6, 1)}


def test_two_people_under_one_identity_are_split(faces: tuple[np.ndarray, np.ndarray]) -> None:
    vectors_ND, person_N = faces
    kept = np.concatenate([np.arange(6), np.arange(6, 10), np.arange(12, len(person_N))])
    identity_N = np.where(person_N == 1, 0, person_N)[kept]
    (found,) = proposed(vectors_ND[kept], identity_N)
    assert (found.kind, found.identity, found.to) == ("split", 0, None)
    assert found.faces.tolist() == [6, 7, 8, 9]


def test_a_stranger_is_an_outlier(faces: tuple[np.ndarray, np.ndarray]) -> None:
    vectors_ND, person_N = faces
    vectors_ND = vectors_ND.copy()
    vectors_ND[7] = -vectors_ND[7]
    (found,) = proposed(vectors_ND, person_N)
    assert (found.kind, found.identity, found.to, found.faces.tolist()) == ("outlier", 1, NOBODY, [7])


def test_unlabelled_faces_are_named(faces: tuple[np.ndarray, np.ndarray]) -> None:
    vectors_ND, person_N = faces
    identity_N = person_N.copy()
    identity_N[[12, 13]] = NOBODY
    identity_N[18:24] = NOBODY
    assign, new = proposed(vectors_ND, identity_N)
    assert (assign.kind, assign.to, assign.faces.tolist()) == ("assign", 2, [12, 13])
    assert (new.kind, new.to, new.faces.tolist()) == ("new", None, list(range(18, 24)))


def test_faces_without_any_label_are_clustered(faces: tuple[np.ndarray, np.ndarray]) -> None:
    vectors_ND, person_N = faces
    found = proposed(vectors_ND, np.full(len(person_N), NOBODY))
    assert [each.kind for each in found] == ["new"] * 20
    assert sorted(each.faces.tolist() for each in found) == [list(range(n, n + 6)) for n in range(0, 120, 6)]


def test_the_surest_come_first(faces: tuple[np.ndarray, np.ndarray]) -> None:
    vectors_ND, person_N = faces
    rng = np.random.default_rng(1)
    identity_N = person_N.copy()
    wrong = rng.permutation(len(person_N))[:12]
    identity_N[wrong] = (identity_N[wrong] + 1) % 20
    certainties = [each.certainty for each in proposed(vectors_ND, identity_N) if each.kind == "relabel"]
    assert len(certainties) >= 10
    assert certainties == sorted(certainties, reverse=True)


def test_the_threshold_is_the_one_that_agrees_with_the_labels(faces: tuple[np.ndarray, np.ndarray]) -> None:
    vectors_ND, person_N = faces
    tree = average_linkage(vectors_ND, 1.4)
    clusters_at = {threshold: tree.clusters(threshold) for threshold in (0.1, 0.8, 1.39)}
    assert best_threshold(clusters_at, person_N) == 0.8


def test_agreement_of_clusters_is_that_of_scikit_learn_and_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    cluster_N, person_N = rng.integers(0, 9, 80), rng.integers(0, 7, 80)
    (_, only_ours), (only_theirs, both) = pair_confusion_matrix(person_N, cluster_N)
    assert pairwise_f(cluster_N, person_N) == pytest.approx(2 * both / (2 * both + only_ours + only_theirs))
    shared_NN = (cluster_N[:, None] == cluster_N) & (person_N[:, None] == person_N)
    precision = np.mean(shared_NN.sum(1) / (cluster_N[:, None] == cluster_N).sum(1))
    recall = np.mean(shared_NN.sum(1) / (person_N[:, None] == person_N).sum(1))
    assert bcubed_f(cluster_N, person_N) == pytest.approx(2 * precision * recall / (precision + recall))
