"""The nearest vector of one's own person and of another, against all distances."""

import numpy as np
import pytest

from lib import nearest


@pytest.mark.parametrize("chunk_elements", [1, 500, 1 << 22])
def test_own_and_other_are_those_of_all_distances(monkeypatch, chunk_elements):
    monkeypatch.setattr(nearest, "CHUNK_ELEMENTS", chunk_elements)
    rng = np.random.default_rng(0)
    vectors_ND, people_N = rng.standard_normal((120, 8)).astype(np.float32), rng.integers(30, size=120)
    people_N[0] = 99  # somebody with one photo
    own_N, other_N, other_at_N = nearest.nearest_own_and_other(vectors_ND, people_N)
    distances_NN = np.linalg.norm(vectors_ND[:, None].astype(float) - vectors_ND, axis=2)
    np.fill_diagonal(distances_NN, np.inf)
    is_own_NN = people_N[:, None] == people_N
    np.testing.assert_allclose(own_N, np.where(is_own_NN, distances_NN, np.inf).min(axis=1), rtol=1e-5)
    np.testing.assert_allclose(other_N, np.where(is_own_NN, np.inf, distances_NN).min(axis=1), rtol=1e-5)
    assert own_N[0] == np.inf
    assert (other_at_N == np.where(is_own_NN, np.inf, distances_NN).argmin(axis=1)).all()


def test_one_person_alone_has_no_other():
    own_N, other_N, _ = nearest.nearest_own_and_other(np.eye(3, dtype=np.float32), np.zeros(3, np.int64))
    np.testing.assert_allclose(own_N, np.sqrt(2), rtol=1e-6)
    assert (other_N == np.inf).all()
