"""The latest feature of every training photo. Ray actors on the nodes hold shards of them, and search there.

Shape suffixes as in lib/training/mining.py. Each shard owns a range of rows. So the answers of all shards, one after
the other, are in the order of the rows, and another number of shards only means other ranges.

Queries go to the shards; the workers do not search in copies. A query of 256 anchors among 200,000 photos of 128
dimensions, sent one step ahead, costs the training process 3.0 ms. A search in a copy in shared memory costs 2.9 ms,
but making the copy takes 80 to 140 ms each time (0.4 to 1.8 s for 1,000,000 photos), and it is out of date at once
(`bench/negative_search.py`). `lib.training.shard_places` spreads them over nodes: four on one node take 5.4 ms.

A shard that dies comes back empty. Its rows then are no negatives and count as the stalest. The refresh, which embeds
the stalest photos, fills them again. Meanwhile the other shards answer.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError

from lib.errors import JobError
from lib.training import confusable, mining
from lib.training.feature_shard import NEVER
from lib.training.mining import Bools, Floats, Ints, Negatives, Pairs
from lib.training.shard_places import ANYWHERE, NAMESPACE, actor_name, start_shards

logger = logging.getLogger(__name__)

Policy = Literal["hard", "semihard", "exact"]

MAX_WRITES_IN_FLIGHT = 16
"""Unfinished writes of a client before it waits for one. This bounds the memory that waits for a slow shard."""

RETURN_LIMIT_S = 120.0
"""How long all shards may be away. Ray restarts them after it has found their node dead, which takes 10 s or more."""

ANSWER_TIMEOUT_S = 60.0
"""How long a client waits for a shard before it continues without it. A dead shard gives an error at once."""


class Search:
    """A query that the shards work on. It is sent before a training step and read after it, so they work meanwhile."""

    def __init__(
        self, store: FeatureStore, num_queries: int, answers: list[Any], beyond_squared_B: Floats | None
    ) -> None:
        self._store = store
        self._num_queries = num_queries
        self._answers = answers
        self._beyond_squared_B = beyond_squared_B

    def result(self) -> Negatives:
        """Return the negatives of the shards that answered; none if no shard did."""
        parts = [part for part in self._store.collect(self._answers) if part is not None]
        if not parts:
            return mining.no_negatives(self._num_queries)
        return mining.merge(parts, beyond_squared_B=self._beyond_squared_B)


class FeatureStore:
    """The access of one process to the shards of a run."""

    def __init__(self, shards: list[Any], labels_N: Ints, dim: int) -> None:
        """Use `create` or `connect`."""
        self.labels_N = labels_N
        self.dim = dim
        self.num_restarts = 0
        """How many times this client saw a shard come back empty."""
        self._shards = shards
        self._bounds = _bounds(len(labels_N), len(shards))
        self._signatures: dict[int, str] = {}
        self._writes: list[Any] = []

    @classmethod
    def create(
        cls,
        run: str,
        labels_N: Ints,
        *,
        dim: int,
        precision: str = "float32",
        places: Sequence[Mapping[str, Any]] = ANYWHERE,
    ) -> FeatureStore:
        """Start empty shards with these options of Ray, one for each. They end with the process that created them.

        Raises:
            UserError: a run of this name has a store already.
        """
        shards = start_shards(
            run, _bounds(len(labels_N), len(places)).tolist(), dim=dim, precision=precision, places=places
        )
        return cls(shards, labels_N, dim)

    @classmethod
    def connect(cls, run: str, labels_N: Ints, *, dim: int, num_shards: int) -> FeatureStore:
        """Return a worker's access to the shards that the driver has created with the same arguments."""
        shards = [ray.get_actor(actor_name(run, index), namespace=NAMESPACE) for index in range(num_shards)]
        return cls(shards, labels_N, dim)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self._shards)

    def write(self, rows_B: Ints, features_BD: Floats, *, step: int) -> None:
        """Send features computed at `step` to their shards, without waiting. What a dying shard loses stays stale."""
        for index, mine_B in self._split(rows_B):
            if len(self._writes) >= MAX_WRITES_IN_FLIGHT:
                _, self._writes = ray.wait(self._writes, num_returns=1, timeout=ANSWER_TIMEOUT_S)
            rows = rows_B[mine_B]
            features = np.asarray(features_BD[mine_B], np.float32)
            self._writes.append(self._shards[index].write.remote(rows, features, self.labels_N[rows], step))

    def flush(self) -> None:
        """Wait until the writes of this client have arrived or are lost."""
        if self._writes:
            ray.wait(self._writes, num_returns=len(self._writes), timeout=ANSWER_TIMEOUT_S)
        self._writes = []

    def read(self, rows_B: Ints) -> tuple[Floats, Bools]:
        """Return the features of some photos [B, D], with zeros for those without one, and which have one [B]."""
        features_BD = np.zeros((len(rows_B), self.dim), np.float32)
        found_B = np.zeros(len(rows_B), bool)
        answers: list[Any] = [None] * len(self._shards)
        positions: dict[int, Ints] = dict(self._split(rows_B))
        for index, mine_B in positions.items():
            answers[index] = self._shards[index].read.remote(rows_B[mine_B])
        for index, part in enumerate(self.collect(answers)):
            if part is not None:
                features_BD[positions[index]], found_B[positions[index]] = part
        return features_BD, found_B

    def search(
        self,
        queries_BD: Floats,
        labels_B: Ints,
        *,
        policy: Policy,
        num_candidates: int,
        seed: int,
        positives_BD: Floats | None = None,
        ceiling: float | None = None,
        among_N: Bools | None = None,
    ) -> Search:
        """Ask for negatives, as the functions of `lib.training.mining` find them; `semihard` needs the positives.

        The candidates depend on the seed alone, not on the number of shards. With `among_N` they are of these photos.
        """
        if policy == "exact":
            asked = [shard.search_all.remote(queries_BD, labels_B, ceiling) for shard in self._shards]
            return Search(self, len(queries_BD), asked, None)
        assert (positives_BD is not None) == (policy == "semihard")
        beyond_squared_B = None if positives_BD is None else mining.semihard_bounds(queries_BD, positives_BD)
        pool = mining.draw_candidates(
            labels_B,
            self.labels_N,
            num_candidates=num_candidates,
            rng=np.random.default_rng(seed),
            filled_N=among_N,
        )
        answers: list[Any] = [None] * len(self._shards)
        queries = ray.put(queries_BD)
        for index, mine_P in self._split(pool.rows):
            blocked_X = (pool.blocked.candidates >= mine_P[0]) & (pool.blocked.candidates <= mine_P[-1])
            blocked = Pairs(
                anchors=pool.blocked.anchors[blocked_X], candidates=pool.blocked.candidates[blocked_X] - mine_P[0]
            )
            answers[index] = self._shards[index].search.remote(
                queries, pool.rows[mine_P], blocked, beyond_squared_B, ceiling
            )
        return Search(self, len(queries_BD), answers, beyond_squared_B)

    def stamps(self) -> Ints:
        """Return the step at which each photo's feature was computed; `NEVER` without a feature or an answer."""
        parts = self.collect([shard.stamps.remote() for shard in self._shards])
        sizes = np.diff(self._bounds)
        return np.concatenate(
            [np.full(size, NEVER) if part is None else part for size, part in zip(sizes, parts, strict=True)]
        )

    def staleness(self, step: int) -> dict[str, float]:
        """Return the share of photos with a feature, and the mean and the largest age of their features in steps."""
        stamps_N = self.stamps()
        ages = np.maximum(step - stamps_N[stamps_N != NEVER], 0)
        return {
            "filled_share": len(ages) / len(stamps_N),
            "mean_age_steps": float(ages.mean()) if len(ages) else 0.0,
            "max_age_steps": float(ages.max(initial=0)),
        }

    def stalest(self, num: int) -> Ints:
        """Return the `num` stalest rows: first those without a feature, then those with the oldest."""
        return np.argsort(self.stamps(), kind="stable")[:num]

    def await_shards(self, limit_s: float = RETURN_LIMIT_S) -> None:
        """Wait until a shard answers.

        Raises:
            JobError: none did.
        """
        deadline = time.monotonic() + limit_s
        while all(part is None for part in self.collect([shard.stamps.remote() for shard in self._shards])):
            if time.monotonic() > deadline:
                raise JobError(
                    "no shard of the feature store answers: the cluster has lost the nodes that held it, and no other "
                    "node has the memory for it"
                )
            time.sleep(1)

    def missing(self) -> Ints:
        """Return the rows without a feature, such as those of a shard that came back."""
        return np.flatnonzero(self.stamps() == NEVER)

    def snapshot(self) -> tuple[Floats, Ints]:
        """Return a copy of all features [N, D] and of their stamps [N].

        Raises:
            JobError: a shard does not answer.
        """
        stamps_N = self.stamps()
        parts = self.collect([shard.features.remote() for shard in self._shards])
        if any(part is None for part in parts):
            raise JobError("a shard of the feature store does not answer: no snapshot can be taken")
        return np.concatenate(parts), stamps_N

    def share_means(self, epoch: int, num_identities: int, *, rank: int = 0, num_workers: int = 1) -> None:
        """Reduce this worker's range of the identities to mean features, and tell the shards where they lie.

        All workers have to do so before any of them asks for `means`.
        """
        begin, end = _bounds(num_identities, num_workers)[rank : rank + 2].tolist()
        told = []
        for first in range(begin, end, confusable.BLOCK_PEOPLE):
            stop = min(end, first + confusable.BLOCK_PEOPLE)
            sums_ID = np.zeros((stop - first, self.dim), np.float32)
            counts_I = np.zeros(stop - first, np.int64)
            for part in self.collect([shard.identity_sums.remote(first, stop) for shard in self._shards]):
                if part is not None:
                    sums_ID += part[0]
                    counts_I += part[1]
            means = ray.put(confusable.identity_means(sums_ID, counts_I))
            keeper = self._shards[first // confusable.BLOCK_PEOPLE % len(self._shards)]
            told.append(keeper.keep_means.remote(epoch, first, [means]))  # in a list Ray sends the reference alone
        if told:
            ray.wait(told, num_returns=len(told), timeout=ANSWER_TIMEOUT_S)

    def means(self, epoch: int) -> list[confusable.Block]:
        """Return the blocks of mean features that the workers have shared; those a dead shard knew of are left out."""
        references: dict[int, list[Any]] = {}
        for part in self.collect([shard.means.remote(epoch) for shard in self._shards]):
            references |= part or {}
        return [
            (first, functools.partial(ray.get, reference, timeout=ANSWER_TIMEOUT_S))
            for first, (reference,) in sorted(references.items())
        ]

    def close(self) -> None:
        """End the shards."""
        for shard in self._shards:
            ray.kill(shard)

    def collect(self, answers: list[Any]) -> list[Any]:
        """Return the value of each shard's answer; None for one not asked, dead, or silent for `ANSWER_TIMEOUT_S`."""
        asked = [answer for answer in answers if answer is not None]
        ray.wait(asked, num_returns=len(asked), timeout=ANSWER_TIMEOUT_S)
        return [None if answer is None else self._value(index, answer) for index, answer in enumerate(answers)]

    def _value(self, index: int, reference: Any) -> Any:
        try:
            answer = ray.get(reference, timeout=0)
        except (RayActorError, ObjectLostError, GetTimeoutError) as error:
            logger.warning(
                "shard %d of the feature store does not answer (%s); continuing without it", index, type(error).__name__
            )
            return None
        if self._signatures.setdefault(index, answer.signature) != answer.signature:
            self._signatures[index] = answer.signature
            self.num_restarts += 1
            logger.warning("shard %d of the feature store came back empty; its photos are embedded again first", index)
        return answer.value

    def _split(self, rows_B: Ints) -> Iterator[tuple[int, Ints]]:
        """Yield each shard that owns some of the rows, with the positions of those among `rows_B`."""
        owners_B = np.searchsorted(self._bounds, rows_B, side="right") - 1
        for index in range(len(self._shards)):
            mine = np.flatnonzero(owners_B == index)
            if len(mine):
                yield index, mine


def _bounds(num_rows: int, num_shards: int) -> Ints:
    return np.linspace(0, num_rows, num_shards + 1).astype(np.int64)
