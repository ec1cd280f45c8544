"""Mean features and the people whom a model confuses, against brute force."""

import numpy as np

from lib.training.confusable import confusable_identities, identity_means, identity_sums
from lib.training.mining import NO_ROW


def test_identity_means_and_confusable_identities_agree_with_brute_force() -> None:
    rng = np.random.default_rng(2)
    features = rng.standard_normal((300, 8), np.float32)
    labels = rng.integers(0, 20, 300)
    labels[labels == 7] = 8  # identity 7 has no photo
    filled = rng.random(300) < 0.8
    filled[labels == 11] = False  # identity 11 has no feature
    means = identity_means(*identity_sums(features, labels, num_identities=20, filled_N=filled))
    known = np.array([identity for identity in range(20) if identity not in (7, 11)])
    expected = np.stack([features[(labels == identity) & filled].mean(axis=0) for identity in known])
    np.testing.assert_allclose(means[known], expected, rtol=1e-4, atol=1e-6)
    assert np.isnan(means[[7, 11]]).all()

    nearest = confusable_identities(means, np.array([3, 0, 7]), num_neighbours=5)
    distances = np.linalg.norm(means[[3, 0], None].astype(float) - means[known], axis=2)
    assert nearest[0].tolist() == [i for i in known[np.argsort(distances[0])] if i != 3][:5]
    assert nearest[1].tolist() == [i for i in known[np.argsort(distances[1])] if i != 0][:5]
    assert (nearest[2] == NO_ROW).all()


def test_confusable_identities_are_padded_where_there_are_too_few() -> None:
    means = np.array([[0.0, 0], [1, 0], [3, 0]], np.float32)
    assert confusable_identities(means, np.array([1]), num_neighbours=4).tolist() == [[0, 2, NO_ROW, NO_ROW]]
