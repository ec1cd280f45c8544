"""Pairs of photos that are too alike for different people: probably wrong labels or duplicates, for people to check."""

import heapq
from collections.abc import Iterable
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

Ints = npt.NDArray[np.integer]

MAX_PAIRS = 100_000
"""Only the most similar pairs are kept, because a collapsed model suspects every pair."""


class SuspectLog:
    """Collects pairs of rows, each once, with the highest similarity seen."""

    def __init__(self) -> None:
        self._similarities: dict[tuple[int, int], float] = {}

    def __len__(self) -> int:
        return len(self._similarities)

    def add(self, anchors_X: Ints, rows_X: Ints, similarities_X: npt.NDArray[np.floating]) -> None:
        """Add some pairs and their cosine similarities."""
        for anchor, row, similarity in zip(anchors_X.tolist(), rows_X.tolist(), similarities_X.tolist(), strict=True):
            self._note((min(anchor, row), max(anchor, row)), similarity)
        self._shrink()

    def merge(self, other: "SuspectLog") -> None:
        """Add the pairs of another worker."""
        for pair, similarity in other._similarities.items():
            self._note(pair, similarity)
        self._shrink()

    @classmethod
    def merged(cls, logs: Iterable["SuspectLog"]) -> Self:
        """Return what several workers have collected."""
        made = cls()
        for log in logs:
            made.merge(log)
        return made

    def copied(self) -> "SuspectLog":
        """Return a copy; another thread may add pairs meanwhile."""
        made = SuspectLog()
        made._similarities = self._similarities.copy()
        return made

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Return the pairs [M, 2] and their similarities [M] for a checkpoint."""
        return {
            "pairs": torch.tensor(list(self._similarities), dtype=torch.int64).reshape(-1, 2),
            "similarities": torch.tensor(list(self._similarities.values()), dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> Self:
        """Return the log saved by `to_tensors`; an empty one for an older checkpoint."""
        made = cls()
        if tensors:
            anchors_X, rows_X = tensors["pairs"].numpy().T
            made.add(anchors_X, rows_X, tensors["similarities"].numpy())
        return made

    def _note(self, pair: tuple[int, int], similarity: float) -> None:
        self._similarities[pair] = max(similarity, self._similarities.get(pair, -1.0))

    def _shrink(self) -> None:
        if len(self._similarities) > 2 * MAX_PAIRS:
            kept = heapq.nlargest(MAX_PAIRS, self._similarities.items(), key=lambda item: item[1])
            self._similarities = dict(kept)

    def table(self, photos: pa.ChunkedArray, identities: list[str], labels_N: Ints) -> pa.Table:
        """Return the pairs by names, most similar first."""
        pairs = heapq.nlargest(MAX_PAIRS, self._similarities.items(), key=lambda item: item[1])
        columns: dict[str, pa.Array | pa.ChunkedArray] = {}
        for place, side in enumerate(("a", "b")):
            rows = np.array([pair[place] for pair, _ in pairs], np.int64)
            columns[f"photo_{side}"] = photos.take(pa.array(rows))
            columns[f"identity_{side}"] = pa.array([identities[label] for label in labels_N[rows]], pa.string())
        return pa.table({**columns, "similarity": pa.array([value for _, value in pairs], pa.float32())})
