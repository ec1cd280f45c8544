"""Where the shards of the feature store lie: how many there are, what memory each reserves, and on which nodes.

A shard is as large as a node may hold, because several shards on one node answer no faster than one. They reserve
memory from Ray, so that no node gets more than fits. A node that holds other nodes' work together, the head, has none
where there are other nodes.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import ActorAlreadyExistsError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lib.errors import UserError
from lib.ray_internals import unreserved_by_node
from lib.training.confusable import BLOCK_PEOPLE, ROWS_AT_ONCE
from lib.training.feature_shard import BYTES_OF_LABEL_AND_STAMP, Shard

logger = logging.getLogger(__name__)

NAMESPACE = "conv-facenet"

ANYWHERE: tuple[Mapping[str, Any], ...] = ({"scheduling_strategy": "SPREAD"},)
"""Options of one shard, which reserves nothing."""

PROCESS_BYTES = 200 * 2**20
"""Of a shard without rows."""
USUAL_BYTES = 2**30
"""Features of one shard where the nodes leave the choice: two million of 128 numbers."""
WORKERS_A_SHARD = 8
"""Workers whose queries one shard answers."""
MOST_SHARDS = 1024
SETTLE_S = 10.0
"""How long the memory of a run that has just ended may take to be free."""
HEAD = "node:__internal_head__"
"""Ray's mark of the head, among the resources of a node."""


@dataclass(frozen=True, kw_only=True)
class StoreSize:
    """What the features of a run need."""

    num_photos: int
    num_people: int
    dim: int
    precision: str

    @property
    def num_bytes(self) -> int:
        """Of all features, with their labels and stamps."""
        return self.num_photos * (self.dim * np.dtype(self.precision).itemsize + BYTES_OF_LABEL_AND_STAMP)

    def bytes_of_shard(self, num_shards: int) -> int:
        """Return what one of so many shards reserves: its rows, its process, and the means of a block of people."""
        sums = min(self.num_people, BLOCK_PEOPLE) * self.dim * 4
        at_once = min(self.num_photos, ROWS_AT_ONCE) * self.dim * 4
        return -(-self.num_bytes // num_shards) + PROCESS_BYTES + 2 * sums + at_once


def node_of_each_shard(size: StoreSize, num_workers: int, free: Mapping[str, float]) -> list[str]:
    """Return the node of each shard, by the bytes that each node has free; empty if they do not fit.

    There are as many shards as features and workers need, at most one a node; more only where the nodes are too small
    for so large ones.
    """
    needed = max(-(-size.num_bytes // USUAL_BYTES), -(-num_workers // WORKERS_A_SHARD))
    for num_shards in range(max(1, min(needed, len(free))), MOST_SHARDS + 1):
        num_bytes = size.bytes_of_shard(num_shards)
        room = {node: int(num // num_bytes) for node, num in free.items()}
        if sum(room.values()) < num_shards:
            continue
        places: list[str] = []
        while len(places) < num_shards:
            open_nodes = [node for node in free if places.count(node) < room[node]]
            places.append(min(open_nodes, key=lambda node: (places.count(node), -free[node], node)))
        return places
    return []


def place_shards(size: StoreSize, num_workers: int) -> list[dict[str, Any]]:
    """Return the options of Ray for the actor of each shard on the connected cluster, and log what they reserve.

    A shard whose node is lost comes back on another one.

    Raises:
        UserError: the nodes have too little memory.
    """
    give_up = time.monotonic() + SETTLE_S
    while True:
        free = _free_memory()
        places = node_of_each_shard(size, num_workers, free)
        if places:
            break
        if time.monotonic() > give_up:
            raise UserError(
                f"the features of {size.num_photos:,} photos take {size.num_bytes / 1e9:.1f} GB in {size.precision}, "
                f"and {len(free)} nodes have {sum(free.values()) / 1e9:.1f} GB of memory left for them: add nodes, "
                "take --feature-precision float16, or --negatives random, which stores none"
            )
        time.sleep(1)
    num_bytes = size.bytes_of_shard(len(places))
    num, num_nodes = len(places), len(set(places))
    logger.info(
        "feature store: %d shard%s of %.2f GB (%s) on %d node%s, memory that is reserved there",
        *(num, "" if num == 1 else "s", num_bytes / 1e9, size.precision, num_nodes, "" if num_nodes == 1 else "s"),
    )
    return [
        {"memory": num_bytes, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)} for node in places
    ]


def _free_memory() -> dict[str, float]:
    """Return the unreserved bytes of each node that may hold a shard: all but the head, or the head alone."""
    is_head = {node["NodeID"]: HEAD in node["Resources"] for node in ray.nodes() if node["Alive"]}
    unreserved = unreserved_by_node()
    may_hold = [node for node in is_head if not is_head[node]] or list(is_head)
    return {node: unreserved.get(node, {}).get("memory", 0.0) for node in may_hold}


def start_shards(
    run: str, bounds: Sequence[int], *, dim: int, precision: str, places: Sequence[Mapping[str, Any]]
) -> list[Any]:
    """Start empty shards between these rows, with these options of Ray. They end with this process.

    Raises:
        UserError: a run of this name has a store already.
    """
    # No CPU is reserved: a shard must come back on a cluster whose every CPU trains. No argument is in the object
    # store: Ray cannot restart an actor after those are gone.
    remote = ray.remote(num_cpus=0, max_restarts=-1)(Shard)
    shards: list[Any] = []
    try:
        for index, place in enumerate(places):
            actor = remote.options(name=actor_name(run, index), namespace=NAMESPACE, **place)
            start, stop = int(bounds[index]), int(bounds[index + 1])
            shards.append(actor.remote(start=start, stop=stop, dim=dim, precision=precision))
    except ActorAlreadyExistsError:
        for shard in shards:
            ray.kill(shard)
        raise UserError(
            f"a run named {run!r} is training on this cluster already: wait for it, or choose another --name"
        ) from None
    return shards


def actor_name(run: str, index: int) -> str:
    """Return the name by which Ray knows a shard."""
    return f"features of {run}: {index}"
