"""The feature store on a real Ray: same answers as the plain functions, and a shard killed for real comes back."""

import os
import signal
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import ray

from lib.errors import JobError, UserError
from lib.training import confusable, feature_store, mining
from lib.training.feature_shard import NEVER, Shard
from lib.training.feature_store import FeatureStore
from lib.training.mining import NO_ROW, Negatives
from lib.training.shard_places import ANYWHERE
from tests.job_runner import RayHead, wait_until
from tests.training.whole_search import mined_negatives

NUM_PHOTOS = 600
DIM = 16
RUN = "a run's name with ünïcode/slash"


pytestmark = pytest.mark.usefixtures("connected_head")


@pytest.fixture
def make_store() -> Iterator[Callable[..., FeatureStore]]:
    stores: list[FeatureStore] = []

    def make(run: str, num_shards: int) -> FeatureStore:
        stores.append(FeatureStore.create(run, labels(), dim=DIM, places=num_shards * ANYWHERE))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture(scope="module")
def shared_store(connected_head: RayHead) -> FeatureStore:
    return FeatureStore.create(RUN, labels(), dim=DIM, places=3 * ANYWHERE)


@pytest.fixture
def store(shared_store: FeatureStore) -> FeatureStore:
    """Three shards, all filled at step 1."""
    fill(shared_store)
    return shared_store


def labels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 40, NUM_PHOTOS)


def features() -> np.ndarray:
    vectors = np.random.default_rng(1).standard_normal((NUM_PHOTOS, DIM)).astype(np.float32)
    vectors[500:550] = vectors[100:150]  # equal distances, in different shards
    return vectors


def fill(store: FeatureStore, *, step: int = 1) -> None:
    store.write(np.arange(NUM_PHOTOS), features(), step=step)
    store.flush()


def assert_equal(found: Negatives, expected: Negatives) -> None:
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.squared_distances, expected.squared_distances)
    for name in ("anchors", "rows"):
        np.testing.assert_array_equal(getattr(found.suspects, name), getattr(expected.suspects, name))


def kill_and_wait_until_back(store: FeatureStore, index: int, *, by_signal: bool) -> None:
    shard = store._shards[index]
    pid = ray.get(shard.__ray_call__.remote(lambda _: os.getpid()))
    if by_signal:
        os.kill(pid, signal.SIGKILL)
    else:
        ray.kill(shard, no_restart=False)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if ray.get(shard.__ray_call__.remote(lambda _: os.getpid()), timeout=10) != pid:
                return
        except ray.exceptions.RayActorError:
            time.sleep(0.1)
    pytest.fail("the shard did not come back")


@pytest.mark.parametrize("ceiling", [None, 0.6])
def test_answers_of_three_shards_are_those_of_the_plain_functions(store: FeatureStore, ceiling: float | None) -> None:
    queries, own, positives = features()[:32], labels()[:32], features()[32:64]
    common = {"num_candidates": 100, "ceiling": ceiling}

    hard = store.search(queries, own, policy="hard", seed=7, **common)
    semihard = store.search(queries, own, policy="semihard", seed=8, positives_BD=positives, **common)
    exact = store.search(queries, own, policy="exact", seed=9, **common)

    arrays = (features(), labels())
    assert_equal(hard.result(), mined_negatives(queries, own, *arrays, rng=np.random.default_rng(7), **common))
    assert_equal(
        semihard.result(),
        mined_negatives(queries, own, *arrays, positives_BD=positives, rng=np.random.default_rng(8), **common),
    )
    assert_equal(exact.result(), mining.exact_negatives(queries, own, *arrays, ceiling=ceiling))
    if ceiling is not None:
        assert len(exact.result().suspects.rows) > 0


def test_an_empty_store_has_no_negatives_and_fills_row_by_row(make_store: Callable[..., FeatureStore]) -> None:
    store = make_store("empty", 1)
    found = store.search(features()[:4], labels()[:4], policy="hard", num_candidates=50, seed=0).result()
    assert (found.rows == NO_ROW).all()
    assert len(store.missing()) == NUM_PHOTOS
    assert store.staleness(step=5)["filled_share"] == 0
    store.share_means(1, 40)
    ((_, means),) = store.means(1)
    assert np.isnan(means()).all()

    rows = np.arange(NUM_PHOTOS - 10)
    store.write(rows, features()[rows], step=10)
    store.write(rows[5:], features()[rows[5:]], step=30)
    store.flush()
    assert store.staleness(step=40) == {
        "filled_share": pytest.approx(590 / 600),
        "mean_age_steps": pytest.approx((5 * 30 + 585 * 10) / 590),
        "max_age_steps": 30,
    }
    assert store.stalest(13).tolist() == [*range(590, 600), 0, 1, 2]
    stored, stamps = store.snapshot()
    np.testing.assert_array_equal(stored[rows], features()[rows])
    assert (stamps[590:] == NEVER).all()


def test_identity_means_are_those_of_all_features_and_are_shared_by_ranges(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confusable, "BLOCK_PEOPLE", 7)
    for epoch in (1, 2):
        store.share_means(epoch, 40, rank=0, num_workers=2)
        assert [first for first, _ in store.means(epoch)] == [0, 7, 14]
        store.share_means(epoch, 40, rank=1, num_workers=2)
        blocks = store.means(epoch)
        assert [first for first, _ in blocks] == [0, 7, 14, 20, 27, 34]
        expected = [features()[labels() == identity].mean(axis=0) for identity in range(40)]
        np.testing.assert_allclose(np.concatenate([means() for _, means in blocks]), expected, rtol=1e-4, atol=1e-6)
    assert store.means(1) == []


def test_workers_write_to_and_search_the_same_store(store: FeatureStore) -> None:
    @ray.remote(num_cpus=1)
    def work(num_shards: int) -> Negatives:
        mine = FeatureStore.connect(RUN, labels(), dim=DIM, num_shards=num_shards)
        mine.write(np.arange(NUM_PHOTOS), features(), step=77)
        return mine.search(features()[:8], labels()[:8], policy="exact", num_candidates=0, seed=0).result()

    found = ray.get(work.remote(store.num_shards))
    assert_equal(found, mining.exact_negatives(features()[:8], labels()[:8], features(), labels()))
    assert set(store.stamps()) == {77}


def test_writes_in_flight_are_bounded(store: FeatureStore) -> None:
    for step in range(40):
        store.write(np.arange(NUM_PHOTOS), features(), step=step)
        assert len(store._writes) <= feature_store.MAX_WRITES_IN_FLIGHT
    store.flush()
    assert set(store.stamps()) == {39}


def test_a_second_run_of_one_name_is_refused_and_the_first_goes_on(store: FeatureStore) -> None:
    with pytest.raises(UserError, match="choose another --name"):
        FeatureStore.create(RUN, labels(), dim=DIM, places=3 * ANYWHERE)
    assert len(store.missing()) == 0


@pytest.mark.parametrize("by_signal", [True, False])
def test_a_killed_shard_comes_back_empty_and_is_filled_again(store: FeatureStore, by_signal: bool) -> None:
    num_restarts = store.num_restarts
    queries, own = features()[:16], labels()[:16]
    before = store.search(queries, own, policy="exact", num_candidates=0, seed=0).result()

    kill_and_wait_until_back(store, 1, by_signal=by_signal)

    without = store.search(queries, own, policy="exact", num_candidates=0, seed=0).result()
    assert store.num_restarts == num_restarts + 1
    filled = np.ones(NUM_PHOTOS, bool)
    filled[200:400] = False
    assert_equal(without, mining.exact_negatives(queries, own, features(), labels(), filled_N=filled))
    assert store.missing().tolist() == list(range(200, 400))

    again = store.stalest(200)
    store.write(again, features()[again], step=2)
    store.flush()
    assert_equal(store.search(queries, own, policy="exact", num_candidates=0, seed=0).result(), before)
    assert store.num_restarts == num_restarts + 1


def kill_for_good(store: FeatureStore, index: int) -> None:
    """Kill a shard, and wait until it is dead: it may answer once more until then."""
    ray.kill(store._shards[index])
    rows = np.arange(store._bounds[index], store._bounds[index + 1])
    wait_until(lambda: np.isin(rows, store.missing()).all(), timeout_s=30)


def test_training_goes_on_with_the_others_while_a_shard_is_dead(make_store: Callable[..., FeatureStore]) -> None:
    store = make_store("dying", 2)
    fill(store)
    queries, own = features()[:16], labels()[:16]

    kill_for_good(store, 1)
    store.write(np.arange(NUM_PHOTOS), features(), step=2)
    store.flush()
    found = store.search(queries, own, policy="hard", num_candidates=200, seed=0).result()
    assert ((found.rows >= 0) & (found.rows < 300)).all()
    assert store.missing().tolist() == list(range(300, 600))
    with pytest.raises(JobError, match="does not answer"):
        store.snapshot()

    kill_for_good(store, 0)
    for policy in ("hard", "exact"):
        found = store.search(queries, own, policy=policy, num_candidates=200, seed=0).result()
        assert (found.rows == mining.NO_ROW).all()  # the random negatives stay
        assert not len(found.suspects.anchors)
    with pytest.raises(JobError, match="no shard"):
        store.await_shards(limit_s=2)


def test_shards_start_on_a_cluster_whose_every_cpu_is_taken(make_store: Callable[..., FeatureStore]) -> None:
    @ray.remote(num_cpus=ray.cluster_resources()["CPU"])
    class Worker:
        def ready(self) -> bool:
            return True

    worker = Worker.remote()
    assert ray.get(worker.ready.remote(), timeout=30)
    fill(make_store("crowded", 1))
    ray.kill(worker)


def test_a_shard_is_a_plain_object() -> None:
    shard = Shard(start=100, stop=110, dim=2)
    shard.write(np.array([103]), np.array([[3.0, 4.0]]), np.array([5]), step=1)
    answer = shard.search_all(np.zeros((1, 2), np.float32), np.array([6]), None)
    assert answer.value.rows.tolist() == [103]
    assert answer.value.squared_distances.tolist() == [25]
    assert Shard(start=100, stop=110, dim=2).signature != answer.signature
