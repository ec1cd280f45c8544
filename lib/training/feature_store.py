"""The latest feature of every training photo, spread over the nodes as Ray actors that search where the features lie.

Shape suffixes as in lib/training/mining.py. Shard s owns one range of rows, so that the shards' answers in order are
the answer in order of rows, and another number of shards means only other bounds.

Queries go to the shards; no snapshot is kept on the nodes to search instead. Asked one step ahead for 256 anchors among
200,000 photos of 128, the answer costs the training process 3.0 ms, a search of a snapshot in shared memory 2.9 ms,
but taking that snapshot costs 80 to 140 ms each time (0.4 to 1.8 s for 1,000,000 photos) and it is old at once
(`bench/negative_search.py`). One shard a node: four on one node take 5.4 ms.

A shard that dies comes back empty. Its rows are then never chosen as negatives, count as the stalest, and are filled
again by whoever embeds the stalest photos; meanwhile the other shards answer.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import ray
from ray.exceptions import ActorAlreadyExistsError, GetTimeoutError, ObjectLostError, RayActorError

from lib.errors import JobError, UserError
from lib.training import mining
from lib.training.mining import Bools, Floats, Ints, Negatives, Pairs

logger = logging.getLogger(__name__)

Policy = Literal["hard", "semihard", "exact"]

NAMESPACE = "conv-facenet"

NEVER = -1
"""Stamp of a row without a feature."""

MAX_WRITES_IN_FLIGHT = 16
"""Writes a client leaves unfinished before it waits for one: bounds the memory that a slow shard can hold up."""

RETURN_LIMIT_S = 120.0
"""How long all shards may be away: Ray starts them anew once it has found their node dead, after 10 s or more."""

ANSWER_TIMEOUT_S = 60.0
"""How long a client waits for a shard before it goes on without it; a shard that died answers with an error at once."""

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Answer(Generic[Value]):
    """What a shard returns, signed: another signature than before means that it died and came back empty."""

    signature: str
    value: Value


class Shard:
    """Features of the rows `start` to `stop`; a plain object, which Ray wraps as an actor."""

    def __init__(self, *, start: int, stop: int, dim: int) -> None:
        self.start = start
        self.signature = uuid.uuid4().hex
        self.features_ND = np.zeros((stop - start, dim), np.float32)
        self.labels_N = np.full(stop - start, NEVER, np.int64)
        self.stamps_N = np.full(stop - start, NEVER, np.int64)

    def write(self, rows_B: Ints, features_BD: Floats, labels_B: Ints, step: int) -> None:
        """Keep the features, computed at `step`, of the photos `rows_B`."""
        local_B = rows_B - self.start
        self.features_ND[local_B] = features_BD
        self.labels_N[local_B] = labels_B
        self.stamps_N[local_B] = step

    def read(self, rows_B: Ints) -> Answer[tuple[Floats, Bools]]:
        """Return the features of the photos `rows_B`, and which of them there are."""
        local_B = rows_B - self.start
        return self._signed((self.features_ND[local_B], self.stamps_N[local_B] != NEVER))

    def search(
        self,
        queries_BD: Floats,
        rows_P: Ints,
        blocked: Pairs,
        beyond_squared_B: Floats | None,
        ceiling: float | None,
    ) -> Answer[Negatives]:
        """Return the negatives among the candidates `rows_P`, as `mining.search`."""
        local_P = rows_P - self.start
        filled_P = self.stamps_N[local_P] != NEVER
        negatives = mining.search(
            queries_BD,
            self.features_ND.take(local_P, axis=0),
            rows_P,
            blocked,
            beyond_squared_B=beyond_squared_B,
            ceiling=ceiling,
            filled_P=None if filled_P.all() else filled_P,
        )
        return self._signed(negatives)

    def search_all(self, queries_BD: Floats, labels_B: Ints, ceiling: float | None) -> Answer[Negatives]:
        """Return the nearest of all rows of other identities, as `mining.exact_negatives`."""
        negatives = mining.exact_negatives(
            queries_BD,
            labels_B,
            self.features_ND,
            self.labels_N,
            ceiling=ceiling,
            filled_N=self.stamps_N != NEVER,
            first_row=self.start,
        )
        return self._signed(negatives)

    def identity_sums(self, num_identities: int) -> Answer[tuple[Floats, Ints]]:
        """Return the sums and numbers of the features of each identity, as `mining.identity_sums`."""
        filled_N = self.stamps_N != NEVER
        labels_N = np.where(filled_N, self.labels_N, 0)
        return self._signed(
            mining.identity_sums(self.features_ND, labels_N, num_identities=num_identities, filled_N=filled_N)
        )

    def stamps(self) -> Answer[Ints]:
        """Return the step at which each row was computed, `NEVER` for those without a feature."""
        return self._signed(self.stamps_N)

    def features(self) -> Answer[Floats]:
        """Return all features, zeros where there is none."""
        return self._signed(self.features_ND)

    def _signed(self, value: Value) -> Answer[Value]:
        return Answer(signature=self.signature, value=value)


class Search:
    """A question under way: asked before a training step and read after it, the shards work while the step computes."""

    def __init__(
        self, store: FeatureStore, num_queries: int, answers: list[Any], beyond_squared_B: Floats | None
    ) -> None:
        self._store = store
        self._num_queries = num_queries
        self._answers = answers
        self._beyond_squared_B = beyond_squared_B

    def result(self) -> Negatives:
        """Return the negatives among what the shards that answered hold: none where no shard did."""
        parts = [part for part in self._store.collect(self._answers) if part is not None]
        if not parts:
            return mining.no_negatives(self._num_queries)
        return mining.merge(parts, beyond_squared_B=self._beyond_squared_B)


class FeatureStore:
    """One process's access to the shards of a run."""

    def __init__(self, shards: list[Any], labels_N: Ints, dim: int) -> None:
        """Use `create` or `connect`."""
        self.labels_N = labels_N
        self.dim = dim
        self.num_restarts = 0
        """How often this client saw a shard come back empty."""
        self._shards = shards
        self._bounds = _bounds(len(labels_N), len(shards))
        self._signatures: dict[int, str] = {}
        self._writes: list[Any] = []

    @classmethod
    def create(cls, run: str, labels_N: Ints, *, dim: int, num_shards: int | None = None) -> FeatureStore:
        """Start the empty shards, by default one a node; they end with the process that created them.

        Raises:
            UserError: a run of this name has a store already.
        """
        num_shards = num_shards or sum(node["Alive"] for node in ray.nodes())
        bounds = _bounds(len(labels_N), num_shards)
        # No CPU is asked for: a shard must come back on a cluster whose every CPU trains. No arguments stand in the
        # object store: Ray cannot restart an actor once those are gone.
        remote = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy="SPREAD")(Shard)
        shards: list[Any] = []
        try:
            for index in range(num_shards):
                actor = remote.options(name=_actor_name(run, index), namespace=NAMESPACE)
                shards.append(actor.remote(start=int(bounds[index]), stop=int(bounds[index + 1]), dim=dim))
        except ActorAlreadyExistsError:
            for shard in shards:
                ray.kill(shard)
            raise UserError(
                f"a run named {run!r} is training on this cluster already: wait for it, or choose another --name"
            ) from None
        return cls(shards, labels_N, dim)

    @classmethod
    def connect(cls, run: str, labels_N: Ints, *, dim: int, num_shards: int) -> FeatureStore:
        """Return a worker's access to the shards that the driver has created; all arguments as there."""
        shards = [ray.get_actor(_actor_name(run, index), namespace=NAMESPACE) for index in range(num_shards)]
        return cls(shards, labels_N, dim)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self._shards)

    def write(self, rows_B: Ints, features_BD: Floats, *, step: int) -> None:
        """Send features computed at `step` to their shards without waiting; what a dying shard loses stays stale."""
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
        """Return the features of some photos [B, D], zeros where there is none, and which of them there are [B]."""
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
    ) -> Search:
        """Ask for negatives as the functions of `lib.training.mining` give them; `semihard` needs the positives.

        The candidates follow from the seed alone, not from the number of shards.
        """
        if policy == "exact":
            asked = [shard.search_all.remote(queries_BD, labels_B, ceiling) for shard in self._shards]
            return Search(self, len(queries_BD), asked, None)
        assert (positives_BD is not None) == (policy == "semihard")
        beyond_squared_B = None if positives_BD is None else mining.semihard_bounds(queries_BD, positives_BD)
        pool = mining.draw_candidates(
            labels_B, self.labels_N, num_candidates=num_candidates, rng=np.random.default_rng(seed)
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
        """Return the step at which each photo's feature was computed, `NEVER` where there is none or no answer."""
        parts = self.collect([shard.stamps.remote() for shard in self._shards])
        sizes = np.diff(self._bounds)
        return np.concatenate(
            [np.full(size, NEVER) if part is None else part for size, part in zip(sizes, parts, strict=True)]
        )

    def staleness(self, step: int) -> dict[str, float]:
        """Return the share of photos with a feature, and the mean and the largest age of those in steps."""
        stamps_N = self.stamps()
        ages = np.maximum(step - stamps_N[stamps_N != NEVER], 0)
        return {
            "filled_share": len(ages) / len(stamps_N),
            "mean_age_steps": float(ages.mean()) if len(ages) else 0.0,
            "max_age_steps": float(ages.max(initial=0)),
        }

    def stalest(self, num: int) -> Ints:
        """Return the `num` rows that wait longest for a new feature: first those without any, then the oldest."""
        return np.argsort(self.stamps(), kind="stable")[:num]

    def await_shards(self, limit_s: float = RETURN_LIMIT_S) -> None:
        """Wait until a shard answers.

        Raises:
            JobError: none did.
        """
        deadline = time.monotonic() + limit_s
        while all(part is None for part in self.collect([shard.stamps.remote() for shard in self._shards])):
            if time.monotonic() > deadline:
                raise JobError("no shard of the feature store answers: the cluster has lost the nodes that hold it")
            time.sleep(1)

    def missing(self) -> Ints:
        """Return the rows without a feature: what a shard that came back needs."""
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

    def identity_means(self, num_identities: int) -> Floats:
        """Return the mean feature of each identity [I, D], NaN for one without any."""
        parts = self.collect([shard.identity_sums.remote(num_identities) for shard in self._shards])
        sums_ID = np.zeros((num_identities, self.dim), np.float32)
        counts_I = np.zeros(num_identities, np.int64)
        for part in parts:
            if part is not None:
                sums_ID += part[0]
                counts_I += part[1]
        return mining.identity_means(sums_ID, counts_I)

    def close(self) -> None:
        """End the shards."""
        for shard in self._shards:
            ray.kill(shard)

    def collect(self, answers: list[Any]) -> list[Any]:
        """Return the value of each shard's answer, None for one not asked, dead or silent for `ANSWER_TIMEOUT_S`."""
        asked = [answer for answer in answers if answer is not None]
        ray.wait(asked, num_returns=len(asked), timeout=ANSWER_TIMEOUT_S)
        return [None if answer is None else self._value(index, answer) for index, answer in enumerate(answers)]

    def _value(self, index: int, reference: Any) -> Any:
        try:
            answer = ray.get(reference, timeout=0)
        except (RayActorError, ObjectLostError, GetTimeoutError) as error:
            logger.warning(
                "shard %d of the feature store does not answer (%s); going on without it", index, type(error).__name__
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


def _actor_name(run: str, index: int) -> str:
    return f"features of {run}: {index}"
