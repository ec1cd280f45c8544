"""Where shards lie, by what the nodes have free; and features of half the size, which rank photos alike."""

import numpy as np
import pytest
import ray

from lib.errors import UserError
from lib.nearest import nearest
from lib.training import confusable, shard_places
from lib.training.feature_shard import Shard
from lib.training.shard_places import PROCESS_BYTES, StoreSize, node_of_each_shard, place_shards

GB = 10**9
HEAD, SECOND, THIRD = (each * 28 for each in ("0a", "0b", "0c"))
"""Nodes of a cluster, by their ids."""
NODES = {"a": 100.0 * GB, "b": 100.0 * GB, "c": 100.0 * GB, "d": 100.0 * GB}


def size(num_photos: int, *, people: int = 1000, precision: str = "float32") -> StoreSize:
    return StoreSize(num_photos=num_photos, num_people=people, dim=128, precision=precision)


@pytest.mark.parametrize(
    ("num_photos", "num_workers", "num_shards"),
    [(1000, 1, 1), (1_000_000, 4, 1), (1_000_000, 32, 4), (5_000_000, 4, 3), (100_000_000, 4, 4), (1000, 1000, 4)],
)
def test_there_are_as_many_shards_as_features_and_workers_need_at_most_one_a_node(
    num_photos: int, num_workers: int, num_shards: int
) -> None:
    places = node_of_each_shard(size(num_photos), num_workers, NODES)
    assert len(places) == len(set(places)) == num_shards


def test_the_nodes_with_most_memory_come_first() -> None:
    assert node_of_each_shard(size(1000), 9, {"a": 1.0 * GB, "b": 3.0 * GB, "c": 2.0 * GB}) == ["b", "c"]


def test_nodes_that_are_too_small_for_large_shards_get_several_small_ones() -> None:
    free = {"large": 26.0 * GB, "small": 9.0 * GB, "none": 0.1 * GB}
    features = size(60_000_000)
    places = node_of_each_shard(features, 1, free)
    num_bytes = features.bytes_of_shard(len(places))
    assert features.num_bytes > 30 * GB
    assert set(places) == {"large", "small"}
    assert all(places.count(node) * num_bytes <= free[node] for node in free)


def test_features_that_fit_nowhere_have_no_place() -> None:
    assert node_of_each_shard(size(100_000_000), 1, {"a": 20.0 * GB, "b": 20.0 * GB}) == []
    assert node_of_each_shard(size(10), 1, {"a": PROCESS_BYTES / 2}) == []
    half = node_of_each_shard(size(100_000_000, precision="float16"), 1, {"a": 20.0 * GB, "b": 20.0 * GB})
    assert set(half) == {"a", "b"}


def test_the_bytes_of_shards_are_those_of_their_arrays() -> None:
    for precision in ("float32", "float16"):
        shard = Shard(start=0, stop=1000, dim=128, precision=precision)
        arrays = (shard.features_ND, shard.labels_N, shard.stamps_N)
        assert size(1000, precision=precision).num_bytes == sum(array.nbytes for array in arrays)
    assert size(10**8).bytes_of_shard(1) > size(10**8).num_bytes
    assert size(10**8).bytes_of_shard(100) < size(10**8).num_bytes / 100 + 300 * 2**20


def person_vectors(num: int) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors of 128 numbers of people with about 20 photos, as far apart as a trained model has them."""
    rng = np.random.default_rng(0)
    people_ID = rng.standard_normal((num // 20, 128)).astype(np.float32)
    labels_N = rng.integers(len(people_ID), size=num)
    vectors_ND = people_ID[labels_N] + 0.7 * rng.standard_normal((num, 128), np.float32)
    return np.asarray(vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)), labels_N


def test_features_of_half_the_size_rank_photos_alike() -> None:
    vectors_ND, labels_N = person_vectors(20_000)
    queries = np.arange(0, 20_000, 40)
    found, negatives, sums = [], [], []
    for precision in ("float32", "float16"):
        shard = Shard(start=0, stop=len(vectors_ND), dim=128, precision=precision)
        shard.write(np.arange(len(vectors_ND)), vectors_ND, labels_N, 1)
        stored_ND, filled_N = shard.read(np.arange(len(vectors_ND))).value
        assert stored_ND.dtype == np.float32
        assert filled_N.all()
        found.append(nearest(stored_ND[queries], stored_ND, 11)[0])
        negatives.append(shard.search_all(stored_ND[queries], labels_N[queries], None).value.rows)
        sums.append(shard.identity_sums(0, 1000).value[0])
    alike = np.mean([len(np.intersect1d(*both)) / 11 for both in zip(*found, strict=True)])
    assert alike >= 0.99
    assert np.mean(negatives[0] == negatives[1]) >= 0.99
    np.testing.assert_allclose(sums[1], sums[0], atol=0.01)


def test_a_feature_out_of_the_range_of_half_the_size_stays_finite() -> None:
    shard = Shard(start=0, stop=1, dim=2, precision="float16")
    shard.write(np.array([0]), np.array([[1e6, -1e6]], np.float32), np.array([0]), 1)
    assert shard.read(np.array([0])).value[0].tolist() == [[65504, -65504]]


def test_sums_of_people_are_those_of_all_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors_ND, labels_N = person_vectors(2000)
    whole = confusable.identity_sums(vectors_ND, labels_N, first=10, stop=90)
    monkeypatch.setattr(confusable, "ROWS_AT_ONCE", 64)
    in_pieces = confusable.identity_sums(vectors_ND, labels_N, first=10, stop=90)
    np.testing.assert_allclose(in_pieces[0], whole[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(in_pieces[1], whole[1])


def cluster_of(monkeypatch: pytest.MonkeyPatch, free: dict[str, float], *, head: str) -> None:
    nodes = [{"NodeID": node, "Alive": True, "Resources": {"CPU": 1.0}} for node in free]
    nodes[list(free).index(head)]["Resources"][shard_places.HEAD] = 1.0
    nodes.append({"NodeID": "lost", "Alive": False, "Resources": {}})
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(shard_places, "unreserved_by_node", lambda: {node: {"memory": free[node]} for node in free})
    monkeypatch.setattr(shard_places, "SETTLE_S", 0.0)


def test_the_head_has_a_shard_only_where_there_is_no_other_node(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster_of(monkeypatch, {HEAD: 100.0 * GB}, head=HEAD)
    with caplog.at_level("INFO"):
        (place,) = place_shards(size(1_000_000), 4)
    assert place["scheduling_strategy"].node_id == HEAD
    assert place["memory"] == size(1_000_000).bytes_of_shard(1)
    assert "feature store: 1 shard of 0.76 GB (float32) on 1 node, memory that is reserved there" in caplog.text
    cluster_of(monkeypatch, {HEAD: 100.0 * GB, SECOND: 9.0 * GB, THIRD: 9.0 * GB}, head=HEAD)
    places = place_shards(size(1_000_000), 40)
    assert {place["scheduling_strategy"].node_id for place in places} == {SECOND, THIRD}


def test_too_little_memory_is_refused_with_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster_of(monkeypatch, {HEAD: 100.0 * GB, SECOND: 9.0 * GB}, head=HEAD)
    with pytest.raises(UserError, match=r"100,000,000 photos take 52\.0 GB in float32, and 1 nodes have 9\.0 GB"):
        place_shards(size(100_000_000), 4)
