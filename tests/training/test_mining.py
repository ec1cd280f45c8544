"""Mining against brute force, and its promises as properties: never the own person, uniform candidates, the ceiling."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from lib.training import mining
from lib.training.mining import (
    NO_ROW,
    Floats,
    Ints,
    draw_candidates,
    exact_negatives,
    own_pairs,
    random_negatives,
)
from tests.training.whole_search import mined_negatives


class World:
    """Random photos; few whole numbers as coordinates, so that distances are exact and ties frequent."""

    def __init__(self, seed: int, num_photos: int = 60, num_identities: int = 6, dim: int = 4, scale: int = 3) -> None:
        self.rng = np.random.default_rng(seed)
        self.features: Floats = self.rng.integers(-scale, scale + 1, (num_photos, dim)).astype(np.float32)
        self.labels: Ints = self.rng.integers(0, num_identities, num_photos)
        self.filled = self.rng.random(num_photos) < 0.8
        self.anchors: Ints = self.rng.integers(0, num_photos, 10)
        self.queries = self.features[self.anchors]
        self.query_labels = self.labels[self.anchors]
        self.positives = self.features[self.rng.integers(0, num_photos, 10)]

    def brute_force(
        self, allowed_BN: np.ndarray, *, positives_BD: Floats | None = None, ceiling: float | None = None
    ) -> list[int]:
        """Go through all photos one by one, in order of rows, so that ties go to the lower row."""
        rows = []
        for anchor, query in enumerate(self.queries):
            best, farthest = (np.inf, NO_ROW), (-np.inf, NO_ROW)
            for row in np.flatnonzero(allowed_BN[anchor]):
                if ceiling is not None and cosine(query, self.features[row]) > ceiling:
                    continue
                squared = ((query.astype(float) - self.features[row]) ** 2).sum()
                farthest = max(farthest, (squared, row), key=lambda found: found[0])
                if positives_BD is not None and squared <= ((query.astype(float) - positives_BD[anchor]) ** 2).sum():
                    continue
                best = min(best, (squared, row), key=lambda found: found[0])
            rows.append(farthest[1] if positives_BD is not None and best[1] == NO_ROW else best[1])
        return [int(row) for row in rows]


def cosine(left: Floats, right: Floats) -> float:
    norms = float(np.linalg.norm(left) * np.linalg.norm(right))
    return float(left.astype(float) @ right) / norms if norms else -np.inf  # a zero vector is like nothing


def candidates_of_each(pool: mining.CandidatePool, num_anchors: int, num_photos: int) -> np.ndarray:
    allowed_BP = np.ones((num_anchors, len(pool.rows)), bool)
    allowed_BP[pool.blocked.anchors, pool.blocked.candidates] = False
    allowed_BN = np.zeros((num_anchors, num_photos), bool)
    allowed_BN[:, pool.rows] = allowed_BP
    return allowed_BN


worlds = st.builds(
    World, st.integers(0, 100_000), num_photos=st.integers(1, 80), num_identities=st.integers(1, 8), scale=st.just(3)
)


@settings(deadline=None)
@given(world=worlds, seed=st.integers(0, 100), num_candidates=st.integers(1, 90), use_filled=st.booleans())
def test_every_anchor_gets_n_distinct_candidates_of_others(
    world: World, seed: int, num_candidates: int, use_filled: bool
) -> None:
    filled = world.filled if use_filled else None
    pool = draw_candidates(
        world.query_labels,
        world.labels,
        num_candidates=num_candidates,
        rng=np.random.default_rng(seed),
        filled_N=filled,
    )
    assert (np.diff(pool.rows) > 0).all()
    allowed_BN = candidates_of_each(pool, len(world.queries), len(world.labels))
    others_BN = (world.query_labels[:, None] != world.labels) & (True if filled is None else filled)
    assert not (allowed_BN & ~others_BN).any()
    assert (allowed_BN.sum(axis=1) == np.minimum(num_candidates, others_BN.sum(axis=1))).all()


@pytest.mark.parametrize("largest_share", [0.02, 0.5])
def test_candidates_are_uniform_over_photos_of_others(largest_share: float) -> None:
    rng = np.random.default_rng(0)
    labels = np.where(rng.random(400) < largest_share, 0, rng.integers(1, 40, 400))
    anchors = np.array([0, 1, 2, 2])
    counts_BN = np.zeros((len(anchors), len(labels)))
    for _ in range(4000):
        pool = draw_candidates(anchors, labels, num_candidates=20, rng=rng)
        counts_BN += candidates_of_each(pool, len(anchors), len(labels))
    for anchor, counts in zip(anchors, counts_BN, strict=True):
        assert not counts[labels == anchor].any()
        # drawn without replacement, counts scatter less than chi-square supposes: by 1 - n / number of others
        others = counts[labels != anchor]
        assert chisquare(others).statistic / (1 - 20 / len(others)) < len(others) + 4 * np.sqrt(2 * len(others))
        assert chisquare(others).statistic > len(others) - 6 * np.sqrt(2 * len(others))


def test_random_negatives_are_uniform_over_photos_of_others() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 200)
    filled = rng.random(200) < 0.7
    rows = random_negatives(np.full(40_000, 3), labels, rng=rng, filled_N=filled)
    counts = np.bincount(rows, minlength=200)
    allowed = filled & (labels != 3)
    assert not counts[~allowed].any()
    assert chisquare(counts[allowed]).pvalue > 0.001


def test_random_negatives_end_where_others_are_rare_or_absent() -> None:
    labels = np.zeros(100_000, np.int64)
    labels[70_000] = 1
    rows = random_negatives(np.array([0, 1]), labels, rng=np.random.default_rng(0))
    assert rows[0] == 70_000
    assert labels[rows[1]] == 0
    assert random_negatives(np.array([0]), np.zeros(5, np.int64), rng=np.random.default_rng(0)).tolist() == [NO_ROW]


@settings(deadline=None)
@given(world=worlds)
def test_own_pairs_are_all_pairs_of_equal_labels(world: World) -> None:
    pairs = own_pairs(world.query_labels, world.labels)
    expected = np.nonzero(world.query_labels[:, None] == world.labels)
    assert set(zip(pairs.anchors, pairs.candidates, strict=True)) == set(zip(*expected, strict=True))


@settings(deadline=None)
@given(
    world=worlds,
    seed=st.integers(0, 100),
    num_candidates=st.integers(1, 40),
    ceiling=st.none() | st.sampled_from([-0.13, 0.33, 0.93]),
    use_filled=st.booleans(),
    semihard=st.booleans(),
)
def test_mined_negatives_agree_with_brute_force_on_the_same_candidates(
    world: World, seed: int, num_candidates: int, ceiling: float | None, use_filled: bool, semihard: bool
) -> None:
    filled = world.filled if use_filled else None
    pool = draw_candidates(
        world.query_labels,
        world.labels,
        num_candidates=num_candidates,
        rng=np.random.default_rng(seed),
        filled_N=filled,
    )
    allowed_BN = candidates_of_each(pool, len(world.queries), len(world.labels))
    common = {
        "num_candidates": num_candidates,
        "rng": np.random.default_rng(seed),
        "ceiling": ceiling,
        "filled_N": filled,
    }
    positives = world.positives if semihard else None
    found = mined_negatives(
        world.queries, world.query_labels, world.features, world.labels, positives_BD=positives, **common
    )
    expected = world.brute_force(allowed_BN, positives_BD=positives, ceiling=ceiling)
    assert found.rows.tolist() == expected
    for anchor, row in enumerate(expected):
        squared = ((world.queries[anchor] - world.features[row]) ** 2).sum() if row != NO_ROW else np.inf
        assert found.squared_distances[anchor] == squared
        assert row == NO_ROW or world.labels[row] != world.query_labels[anchor]


@settings(deadline=None)
@given(world=worlds, ceiling=st.none() | st.sampled_from([0.33, 0.93]), chunk_rows=st.integers(1, 90))
def test_exact_negatives_agree_with_brute_force_whatever_the_chunks(
    world: World, ceiling: float | None, chunk_rows: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mining, "CHUNK_ROWS", chunk_rows)
        found = exact_negatives(
            world.queries, world.query_labels, world.features, world.labels, ceiling=ceiling, filled_N=world.filled
        )
    allowed_BN = (world.query_labels[:, None] != world.labels) & world.filled
    assert found.rows.tolist() == world.brute_force(allowed_BN, ceiling=ceiling)


@pytest.mark.parametrize("normalised", [True, False])
def test_nearest_is_right_for_normalised_and_for_raw_vectors(normalised: bool) -> None:
    rng = np.random.default_rng(1)
    features = rng.standard_normal((3000, 32), np.float32) * rng.uniform(0.5, 20, (3000, 1)).astype(np.float32)
    if normalised:
        features /= np.linalg.norm(features, axis=1, keepdims=True)
    labels = rng.integers(0, 100, 3000)
    found = exact_negatives(features[:50], labels[:50], features, labels)
    distances = np.linalg.norm(features[:50, None].astype(float) - features, axis=2)
    distances[labels[:50, None] == labels] = np.inf
    assert found.rows.tolist() == distances.argmin(axis=1).tolist()
    np.testing.assert_allclose(np.sqrt(found.squared_distances), distances.min(axis=1), rtol=1e-5)


@settings(deadline=None)
@given(world=worlds, ceiling=st.sampled_from([0.33, 0.93]))
def test_every_pair_above_the_ceiling_is_reported(world: World, ceiling: float) -> None:
    found = exact_negatives(world.queries, world.query_labels, world.features, world.labels, ceiling=ceiling).suspects
    expected = {
        (anchor, row)
        for anchor, query in enumerate(world.queries)
        for row in range(len(world.labels))
        if world.labels[row] != world.query_labels[anchor] and cosine(query, world.features[row]) > ceiling
    }
    assert set(zip(found.anchors.tolist(), found.rows.tolist(), strict=True)) == expected
    for anchor, row, similarity in zip(found.anchors, found.rows, found.similarities, strict=True):
        assert similarity == pytest.approx(cosine(world.queries[anchor], world.features[row]), abs=1e-6)


def test_a_collapsed_model_leaves_no_negative_and_a_bounded_report() -> None:
    features = np.ones((20_000, 8), np.float32)
    labels = np.arange(20_000)
    found = exact_negatives(features[:10], labels[:10], features, labels, ceiling=0.99)
    assert (found.rows == NO_ROW).all()
    assert len(found.suspects.rows) == mining.MAX_SUSPECTS
