"""Suspect pairs: each once, by names, the most similar first, and never too many."""

import numpy as np
import pyarrow as pa
import pytest

from lib.training import suspects
from lib.training.suspects import SuspectLog

PHOTOS = pa.chunked_array([["a1", "a2"], ["b1", "c1"]])
IDENTITIES = ["a", "b", "c"]
LABELS = np.array([0, 0, 1, 2])


def log(*pairs: tuple[int, int, float]) -> SuspectLog:
    made = SuspectLog()
    anchors, rows, similarities = zip(*pairs, strict=True)
    made.add(np.array(anchors), np.array(rows), np.array(similarities, np.float32))
    return made


def test_a_pair_comes_once_with_its_highest_similarity() -> None:
    table = log((0, 2, 0.9), (2, 0, 0.97), (3, 1, 0.95)).table(PHOTOS, IDENTITIES, LABELS)
    assert table["photo_a"].to_pylist() == ["a1", "a2"]
    assert table["photo_b"].to_pylist() == ["b1", "c1"]
    assert table["identity_b"].to_pylist() == ["b", "c"]
    assert table["similarity"].to_pylist() == pytest.approx([0.97, 0.95])


def test_the_logs_of_several_workers_are_one() -> None:
    merged = log((0, 2, 0.9))
    merged.merge(log((0, 2, 0.92), (1, 3, 0.99)))
    assert merged.table(PHOTOS, IDENTITIES, LABELS)["similarity"].to_pylist() == pytest.approx([0.99, 0.92])


def test_a_log_goes_on_from_a_checkpoint() -> None:
    before = log((0, 2, 0.9), (3, 1, 0.95))
    copied = before.copied()
    before.add(np.array([0]), np.array([3]), np.array([0.99]))
    after = SuspectLog.from_tensors(copied.to_tensors())
    assert after.table(PHOTOS, IDENTITIES, LABELS) == log((0, 2, 0.9), (3, 1, 0.95)).table(PHOTOS, IDENTITIES, LABELS)
    assert len(SuspectLog.from_tensors(SuspectLog().to_tensors())) == 0
    assert len(SuspectLog.from_tensors({})) == 0


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspects, "MAX_PAIRS", 10)
    made = SuspectLog()
    for start in range(0, 1000, 10):
        rows = np.arange(start, start + 10)
        made.add(rows, rows + 5000, rows / 1000)
        assert len(made) <= 20
    kept = sorted(made._similarities.values())
    assert kept[-10:] == pytest.approx(np.arange(990, 1000) / 1000)
