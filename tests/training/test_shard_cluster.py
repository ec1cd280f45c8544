"""Shards on a real cluster of a head and two nodes: where they lie, what they reserve, and what a lost node costs."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ray
import ray.cluster_utils

from lib.ray_internals import unreserved_by_node
from lib.training.feature_store import FeatureStore
from lib.training.shard_places import StoreSize, place_shards
from tests.job_runner import wait_until

pytestmark = pytest.mark.slow

SIZE = StoreSize(num_photos=1000, num_people=50, dim=16, precision="float16")
NUM_BYTES = SIZE.bytes_of_shard(2)
LABELS = np.random.default_rng(0).integers(0, 50, SIZE.num_photos)
FEATURES = np.random.default_rng(1).standard_normal((SIZE.num_photos, SIZE.dim)).astype(np.float32)

Start = Callable[[int], tuple[Any, list[Any]]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Return what starts a head and two nodes with the memory of some shards each."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    clusters = []

    def started(shards_of_a_node: int) -> tuple[Any, list[Any]]:
        memory = round((shards_of_a_node + 0.5) * NUM_BYTES)
        cluster = ray.cluster_utils.Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "memory": memory, "include_dashboard": False}
        )
        clusters.append(cluster)
        nodes = [cluster.add_node(num_cpus=1, memory=memory) for _ in range(2)]
        ray.init(address=cluster.address, log_to_driver=False)
        return cluster, nodes

    yield started
    ray.shutdown()
    for cluster in clusters:
        cluster.shutdown()


def filled() -> FeatureStore:
    places = place_shards(SIZE, num_workers=16)
    assert len(places) == 2
    store = FeatureStore.create("a run", LABELS, dim=SIZE.dim, precision=SIZE.precision, places=places)
    store.write(np.arange(SIZE.num_photos), FEATURES, step=1)
    store.flush()
    return store


def node_of(shard: Any) -> str:
    return ray.get(shard.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()), timeout=60)


def test_shards_reserve_their_memory_off_the_head_and_come_back_elsewhere(start: Start) -> None:
    cluster, nodes = start(2)
    store = filled()
    of_shard = [node_of(shard) for shard in store._shards]
    assert sorted(of_shard) == sorted(node.node_id for node in nodes)
    memory = round(2.5 * NUM_BYTES)
    wait_until(
        lambda: all(unreserved_by_node()[node.node_id]["memory"] <= memory - NUM_BYTES for node in nodes), timeout_s=30
    )
    assert len(store.missing()) == 0

    (lost,) = (node for node in nodes if node.node_id == of_shard[1])
    cluster.remove_node(lost, allow_graceful=False)
    wait_until(lambda: len(store.missing()) == 500 and store.num_restarts == 1, timeout_s=90)
    assert node_of(store._shards[1]) != lost.node_id
    assert store.missing().tolist() == list(range(500, 1000))
    store.write(np.arange(500, 1000), FEATURES[500:], step=2)
    store.flush()
    assert len(store.missing()) == 0


def test_a_shard_that_no_node_has_memory_for_is_done_without(start: Start) -> None:
    cluster, nodes = start(1)
    on_head = ray.remote(num_cpus=0, memory=NUM_BYTES)(lambda: time.sleep(600))
    store = filled()
    of_shard = [node_of(shard) for shard in store._shards]
    taken = on_head.remote()  # the head's, the only memory left
    (lost,) = (node for node in nodes if node.node_id == of_shard[1])
    cluster.remove_node(lost, allow_graceful=False)
    wait_until(lambda: store.missing().tolist() == list(range(500, 1000)), timeout_s=90)
    for _ in range(3):
        began = time.monotonic()
        found = store.search(FEATURES[:8], LABELS[:8], policy="exact", num_candidates=0, seed=0).result()
        assert ((found.rows >= 0) & (found.rows < 500)).all()
        assert time.monotonic() - began < 20
    del taken
