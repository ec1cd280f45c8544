"""The nearest vectors, against all distances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import nearest


def by_sorting(probes_BD: np.ndarray, gallery_GD: np.ndarray, num: int) -> np.ndarray:
    distances_BG = np.linalg.norm(probes_BD[:, None].astype(float) - gallery_GD.astype(float), axis=2)
    return np.sort(distances_BG, axis=1)[:, :num]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 70), st.integers(1, 8), st.integers(1, 90), st.booleans(), st.integers(0, 99))
def test_they_are_those_that_sorting_gives(
    num_probes: int, num_gallery: int, dim: int, num: int, unit: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    probes_BD = rng.standard_normal((num_probes, dim)).astype(np.float32)
    gallery_GD = rng.standard_normal((num_gallery, dim)).astype(np.float32)
    gallery_GD[::3] = gallery_GD[0]  # ties
    if unit:
        gallery_GD /= np.linalg.norm(gallery_GD, axis=1, keepdims=True)
    index_BK, distance_BK = nearest.nearest(probes_BD, gallery_GD, num)
    np.testing.assert_allclose(distance_BK, by_sorting(probes_BD, gallery_GD, num), atol=1e-4)
    found_BKD = gallery_GD[index_BK]
    np.testing.assert_allclose(np.linalg.norm(probes_BD[:, None] - found_BKD, axis=2), distance_BK, atol=1e-6)
    assert all(len(set(row)) == len(row) == min(num, num_gallery) for row in index_BK.tolist())


def test_a_gallery_of_many_blocks_gives_what_sorting_gives() -> None:
    rng = np.random.default_rng(0)
    probes_BD, gallery_GD = (rng.standard_normal((n, 16)).astype(np.float32) for n in (50, 20_000))
    index_BK, distance_BK = nearest.nearest(probes_BD, gallery_GD, 7)
    np.testing.assert_allclose(distance_BK, by_sorting(probes_BD, gallery_GD, 7), rtol=1e-5)
    found_BKD = gallery_GD[index_BK]
    np.testing.assert_allclose(np.linalg.norm(probes_BD[:, None] - found_BKD, axis=2), distance_BK, rtol=1e-5)


def test_a_copy_has_distance_0() -> None:
    vectors_GD = np.random.default_rng(0).standard_normal((40, 128)).astype(np.float32) * 10
    index_BK, distance_BK = nearest.nearest(vectors_GD, vectors_GD, 1)
    assert index_BK[:, 0].tolist() == list(range(40))
    assert (distance_BK == 0).all()


def test_no_probes_have_no_matches() -> None:
    index_BK, distance_BK = nearest.nearest(np.empty((0, 4), np.float32), np.ones((3, 4), np.float32), 2)
    assert index_BK.shape == distance_BK.shape == (0, 2)


@pytest.mark.parametrize(("dim", "num"), [(3, 1), (16, 4), (129, 7)])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_neither_the_order_nor_the_size_of_blocks_changes_a_bit(dim: int, num: int, scale: float) -> None:
    rng = np.random.default_rng(dim)
    candidates_ND = (scale * rng.standard_normal((900, dim))).astype(np.float32)
    candidates_ND[100:140] = candidates_ND[7]  # more equal ones than are wanted
    candidates_ND[500:] = candidates_ND[:400] + scale * np.float32(1e-7) * rng.standard_normal((400, dim))
    queries_BD = np.concatenate([candidates_ND[[7, 120, 600]], scale * rng.standard_normal((20, dim))])
    queries_BD = queries_BD.astype(np.float32)
    whole = nearest.nearest(queries_BD, candidates_ND, num)
    distances_BN = np.sqrt(((queries_BD[:, None] - candidates_ND) ** 2).sum(axis=2, dtype=np.float64))
    np.testing.assert_allclose(whole[1], np.sort(distances_BN, axis=1)[:, :num], rtol=1e-4, atol=1e-6 * scale)
    assert whole[0][0].tolist() == [7, *range(100, 140)][:num]
    for step in (1, 37, 450):
        found = nearest.NearestSoFar(queries_BD, num)
        shards = []
        for first in reversed(range(0, 900, step)):
            places = rng.permutation(np.arange(first, min(first + step, 900)))
            found.add(candidates_ND[places], places)
            shards.append(nearest.NearestSoFar(queries_BD, num))
            shards[-1].add(candidates_ND[places], places)
        apart = shards[0].codes_BK, shards[0].distances_BK
        for shard in shards[1:]:
            apart = nearest.merged(apart, (shard.codes_BK, shard.distances_BK), num)
        for codes_BK, distances_BK in ((found.codes_BK, found.distances_BK), apart):
            assert np.array_equal(codes_BK, whole[0])
            assert np.array_equal(distances_BK, whole[1])


def test_vectors_whose_squares_overflow_are_still_found() -> None:
    candidates_ND = np.array([[1e30, 0], [0, 1], [0, 1e25]], np.float32)
    codes_BK, distances_BK = nearest.nearest(np.array([[0, 1.5], [1e30, 0]], np.float32), candidates_ND, 3)
    assert codes_BK[0].tolist() == [1, 0, 2]
    assert sorted(codes_BK[1].tolist()) == [0, 1, 2]
    assert distances_BK[0, 0] == 0.5


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
