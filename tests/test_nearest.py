"""The nearest vectors, against all distances."""

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


def test_chunks_and_blocks_give_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    queries_BD, candidates_ND = (rng.standard_normal((n, 16)).astype(np.float32) for n in (50, 700))
    whole = nearest.nearest(queries_BD, candidates_ND, 7)
    at_B = rng.integers(700, size=50)
    num_B = nearest.num_as_near(queries_BD, candidates_ND, at_B)
    monkeypatch.setattr(nearest, "BLOCK_ROWS", 64)
    monkeypatch.setattr(nearest, "CHUNK_ELEMENTS", 640)
    chunked = nearest.nearest(queries_BD, candidates_ND, 7)
    assert np.array_equal(whole[0], chunked[0])
    np.testing.assert_allclose(whole[1], chunked[1], rtol=1e-6)
    distances_BN = np.linalg.norm(queries_BD[:, None].astype(float) - candidates_ND, axis=2)
    expected_B = np.count_nonzero(distances_BN < distances_BN[np.arange(50), at_B][:, None], axis=1)
    assert np.array_equal(num_B, expected_B)
    assert np.array_equal(num_B, nearest.num_as_near(queries_BD, candidates_ND, at_B))
