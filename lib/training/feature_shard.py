"""One part of the feature store: the features of a range of rows, and the search among them.

Shape suffixes as in lib/training/mining.py.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from lib.training import confusable, mining
from lib.training.mining import Bools, Floats, Ints, Negatives, Pairs

NEVER = -1
"""Stamp of a row without a feature."""

BYTES_OF_LABEL_AND_STAMP = 8
"""Beside the feature of a row, both int32."""

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Answer(Generic[Value]):
    """The answer of a shard, with its signature. A new signature means that the shard died and came back empty."""

    signature: str
    value: Value


class Shard:
    """The features of rows `start` to `stop`. This is a plain object, which Ray wraps as an actor."""

    def __init__(self, *, start: int, stop: int, dim: int, precision: str = "float32") -> None:
        self.start = start
        self.signature = uuid.uuid4().hex
        self.features_ND = np.zeros((stop - start, dim), precision)
        self.labels_N = np.full(stop - start, NEVER, np.int32)
        self.stamps_N = np.full(stop - start, NEVER, np.int32)
        self._largest = np.float32(np.finfo(precision).max)
        self._epoch_of_means = NEVER
        self._means: dict[int, list[Any]] = {}

    def write(self, rows_B: Ints, features_BD: Floats, labels_B: Ints, step: int) -> None:
        """Keep the features, computed at `step`, of the photos `rows_B`."""
        local_B = rows_B - self.start
        # Of a range that float16 has too; only raw outputs of a model that diverges are larger.
        self.features_ND[local_B] = np.clip(features_BD, -self._largest, self._largest)
        self.labels_N[local_B] = labels_B
        self.stamps_N[local_B] = step

    def read(self, rows_B: Ints) -> Answer[tuple[Floats, Bools]]:
        """Return the features of the photos `rows_B`, and which of them have one."""
        local_B = rows_B - self.start
        return self._signed((self.features_ND[local_B].astype(np.float32, copy=False), self.stamps_N[local_B] != NEVER))

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
            self.features_ND.take(local_P, axis=0).astype(np.float32, copy=False),
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

    def identity_sums(self, first: int, stop: int) -> Answer[tuple[Floats, Ints]]:
        """Return the sums and numbers of the features of some identities, as `confusable.identity_sums`."""
        filled_N = self.stamps_N != NEVER
        sums = confusable.identity_sums(self.features_ND, self.labels_N, first=first, stop=stop, filled_N=filled_N)
        return self._signed(sums)

    def keep_means(self, epoch: int, first: int, reference: list[Any]) -> None:
        """Keep where the mean features of the identities from `first` on lie, until a later epoch has others."""
        if epoch != self._epoch_of_means:
            self._epoch_of_means, self._means = epoch, {}
        self._means[first] = reference

    def means(self, epoch: int) -> Answer[dict[int, list[Any]]]:
        """Return where the mean features of this epoch lie that this shard was told of, by their first identity."""
        return self._signed(self._means if epoch == self._epoch_of_means else {})

    def stamps(self) -> Answer[Ints]:
        """Return the step at which each row was computed, `NEVER` for those without a feature."""
        return self._signed(self.stamps_N)

    def features(self) -> Answer[Floats]:
        """Return all features, zeros where there is none."""
        return self._signed(self.features_ND.astype(np.float32, copy=False))

    def _signed(self, value: Value) -> Answer[Value]:
        return Answer(signature=self.signature, value=value)
