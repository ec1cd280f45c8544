"""Mean features and the people whom a model confuses, against brute force."""

import numpy as np
import pytest
import torch

from lib import neighbour_index
from lib.training.confusable import Block, confusable_people, identity_means, identity_sums, search_on_device
from lib.training.mining import NO_ROW


def blocks_of(means_ID: np.ndarray, *starts: int) -> list[Block]:
    parts = np.split(means_ID, starts)
    return [(first, lambda part=part: part) for first, part in zip((0, *starts), parts, strict=True)]


def test_identity_means_and_confusable_people_agree_with_brute_force() -> None:
    rng = np.random.default_rng(2)
    features = rng.standard_normal((300, 8), np.float32)
    labels = rng.integers(0, 20, 300)
    labels[labels == 7] = 8  # identity 7 has no photo
    filled = rng.random(300) < 0.8
    filled[labels == 11] = False  # identity 11 has no feature
    means = np.concatenate(
        [
            identity_means(*identity_sums(features, labels, first=first, stop=stop, filled_N=filled))
            for first, stop in ((0, 9), (9, 20))
        ]
    )
    known = np.array([identity for identity in range(20) if identity not in (7, 11)])
    expected = np.stack([features[(labels == identity) & filled].mean(axis=0) for identity in known])
    np.testing.assert_allclose(means[known], expected, rtol=1e-4, atol=1e-6)
    assert np.isnan(means[[7, 11]]).all()

    for blocks in (blocks_of(means), blocks_of(means, 4, 12), blocks_of(means, 7, 8)):
        nearest = confusable_people(np.array([3, 0, 7]), blocks, num_neighbours=5)
        distances = np.linalg.norm(means[[3, 0], None].astype(float) - means[known], axis=2)
        assert nearest[0].tolist() == [i for i in known[np.argsort(distances[0])] if i != 3][:5]
        assert nearest[1].tolist() == [i for i in known[np.argsort(distances[1])] if i != 0][:5]
        assert (nearest[2] == NO_ROW).all()


def test_places_are_empty_where_there_are_too_few_people_or_a_block_is_lost() -> None:
    means = np.array([[0.0, 0], [1, 0], [3, 0]], np.float32)
    assert confusable_people(np.array([1]), blocks_of(means), num_neighbours=4).tolist() == [[0, 2, NO_ROW, NO_ROW]]
    assert confusable_people(np.array([0, 2]), blocks_of(means, 2)[1:], num_neighbours=1).tolist() == [[-1], [-1]]
    assert confusable_people(np.array([0, 2]), [], num_neighbours=1).tolist() == [[-1], [-1]]


def test_a_device_finds_what_the_index_finds() -> None:
    rng = np.random.default_rng(3)
    points, queries = (rng.standard_normal((num, 16), np.float32) for num in (500, 40))
    found, squared = search_on_device(queries, points, 6, torch.device("cpu"))
    distances = ((queries[:, None].astype(float) - points) ** 2).sum(axis=2)
    assert (found == np.argsort(distances, axis=1)[:, :6]).all()
    np.testing.assert_allclose(squared, np.sort(distances, axis=1)[:, :6], rtol=1e-4)


def test_among_very_many_people_nearly_all_of_the_nearest_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbour_index, "EXACT_UP_TO", 1000)
    means = np.random.default_rng(4).standard_normal((4000, 32), np.float32)  # no clusters: the hardest case
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    seeds = np.arange(0, 4000, 5)
    found = confusable_people(seeds, blocks_of(means), num_neighbours=3)
    scores = means[seeds] @ means.T
    scores[np.arange(len(seeds)), seeds] = -np.inf
    nearest = np.argsort(-scores, axis=1)[:, :3]
    assert np.mean([np.isin(one, other).mean() for one, other in zip(nearest, found, strict=True)]) > 0.93
