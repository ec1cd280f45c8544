"""The nearest faces, against sorting all distances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import UserError
from lib.recognition import gallery
from lib.recognition.gallery import nearest


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
    index_BK, distance_BK = nearest(probes_BD, gallery_GD, num)
    np.testing.assert_allclose(distance_BK, by_sorting(probes_BD, gallery_GD, num), atol=1e-4)
    found_BKD = gallery_GD[index_BK]
    np.testing.assert_allclose(np.linalg.norm(probes_BD[:, None] - found_BKD, axis=2), distance_BK, atol=1e-6)
    assert all(len(set(row)) == len(row) == min(num, num_gallery) for row in index_BK.tolist())


def test_a_gallery_of_many_blocks_gives_what_sorting_gives() -> None:
    rng = np.random.default_rng(0)
    probes_BD, gallery_GD = (rng.standard_normal((n, 16)).astype(np.float32) for n in (50, 20_000))
    index_BK, distance_BK = nearest(probes_BD, gallery_GD, 7)
    np.testing.assert_allclose(distance_BK, by_sorting(probes_BD, gallery_GD, 7), rtol=1e-5)
    found_BKD = gallery_GD[index_BK]
    np.testing.assert_allclose(np.linalg.norm(probes_BD[:, None] - found_BKD, axis=2), distance_BK, rtol=1e-5)


def test_a_copy_has_distance_0() -> None:
    vectors_GD = np.random.default_rng(0).standard_normal((40, 128)).astype(np.float32) * 10
    index_BK, distance_BK = nearest(vectors_GD, vectors_GD, 1)
    assert index_BK[:, 0].tolist() == list(range(40))
    assert (distance_BK == 0).all()


def test_no_probes_have_no_matches() -> None:
    index_BK, distance_BK = nearest(np.empty((0, 4), np.float32), np.ones((3, 4), np.float32), 2)
    assert index_BK.shape == distance_BK.shape == (0, 2)


def test_what_cannot_be_searched_is_told() -> None:
    with pytest.raises(UserError, match="the gallery is empty"):
        nearest(np.ones((1, 4), np.float32), np.empty((0, 4), np.float32), 1)
    with pytest.raises(UserError, match="probes have 4 dimensions and the gallery 5"):
        nearest(np.ones((1, 4), np.float32), np.ones((1, 5), np.float32), 1)


def test_the_graph_finds_nearly_all_with_exact_distances() -> None:
    rng = np.random.default_rng(0)
    gallery_GD = rng.standard_normal((3000, 32)).astype(np.float32)
    probes_BD = gallery_GD[::60] + 0.1 * rng.standard_normal((50, 32)).astype(np.float32)
    index_BK, distance_BK = nearest(probes_BD, gallery_GD, 5, "approximate")
    exact_BK, _ = nearest(probes_BD, gallery_GD, 5)
    assert np.mean([len(set(a) & set(b)) / 5 for a, b in zip(index_BK, exact_BK, strict=True)]) > 0.95
    np.testing.assert_allclose(
        distance_BK, np.linalg.norm(probes_BD[:, None] - gallery_GD[index_BK], axis=2), rtol=1e-5
    )


def test_the_graph_is_built_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "_graph_search", lambda probes, _, num: np.zeros((len(probes), num), np.int64))
    vectors_GD = np.eye(8, dtype=np.float32)
    assert nearest(vectors_GD, vectors_GD, 1, "auto")[0].any()
    monkeypatch.setattr(gallery, "APPROXIMATE_GALLERY", 8)
    monkeypatch.setattr(gallery, "APPROXIMATE_PROBES", 8)
    assert not nearest(vectors_GD, vectors_GD, 1, "auto")[0].any()
