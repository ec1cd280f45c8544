"""The use of photos: counted as a plain loop counts it, by any number of workers, and kept whole through kills."""

import collections
import itertools
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import UserError
from lib.training import checkpoints, collective, usage
from lib.training.checkpoints import Checkpoint, Progress
from lib.training.usage import ROLES, UsageCounter, loaded_usage, usage_table
from tests.training.processes import run_workers

NUM_PHOTOS, BLOCK = 23, 4
"""Six blocks, the last with 3 photos."""
PHOTOS = pa.chunked_array([[f"photo {number}" for number in range(NUM_PHOTOS)]])


def drawn(rank: int, start: int) -> np.ndarray:
    """Return the triplets [3, T] that a worker uses after some start; some photos come several times."""
    rows = np.random.default_rng((start, rank)).integers(NUM_PHOTOS, size=(3, 30)) ** 2 % NUM_PHOTOS
    rows[:, :4] = rank
    return rows


def counted(*triplets: np.ndarray) -> np.ndarray:
    rows_3T = np.concatenate(triplets, axis=1)
    return np.stack([np.bincount(rows, minlength=NUM_PHOTOS) for rows in rows_3T])


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 9)] * 3), max_size=40), st.integers(0, 40))
def test_use_is_counted_as_a_plain_loop_counts_it(triplets, split):
    rows_T3 = np.array(triplets, np.int32).reshape(-1, 3)
    counter = UsageCounter(10)
    counter.add(*rows_T3[:split].T)
    counter.settle()
    counter.add(*rows_T3[split:].T)
    statistics = counter.statistics()

    uses = collections.Counter(itertools.chain.from_iterable(triplets))
    assert statistics["num_photos_used"] == len(uses)
    assert statistics["share_never_used"] == pytest.approx(1 - len(uses) / 10)
    assert statistics["mean_uses"] == pytest.approx(np.mean(list(uses.values())) if uses else 0)
    assert statistics["std_uses"] == pytest.approx(np.std(list(uses.values())) if uses else 0)
    table = usage_table(pa.array([f"photo {n}" for n in range(10)]), counter.counts_3M)
    assert table.column_names == ["photo", *ROLES]
    for role, rows_T in zip(ROLES, rows_T3.T, strict=True):
        assert table[role].to_pylist() == np.bincount(rows_T, minlength=10).tolist()


def test_many_uses_between_two_checkpoints_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MOST_PENDING", 100)
    counter = UsageCounter(10)
    for _ in range(200):
        counter.add(*np.tile(np.arange(10), (3, 1)))
        assert sum(len(keys) for keys, _ in counter._pending) <= 130
    counter.settle()
    assert (counter.counts_3M == 200).all()


def _work(rank: int, run: str, folder: Path) -> None:
    """Three workers, then two, then one go on from one another's checkpoints."""
    torch.set_num_threads(1)
    usage.BLOCK_PHOTOS = BLOCK
    checkpoint = Checkpoint(progress=Progress(), tensors={})
    for start, num_workers in enumerate((3, 2, 1)):
        if rank >= num_workers:
            break
        meeting = f"file://{folder}/meeting {start}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_workers)
        counter = loaded_usage(run, checkpoint, NUM_PHOTOS)
        counter.add(*drawn(rank, start))
        statistics = counter.statistics()
        progress = Progress(step=start, num_counted=NUM_PHOTOS)
        counter.save(run, progress)
        collective.wait_for_all()
        if rank == 0:
            np.save(folder / f"statistics {start}.npy", np.array(list(statistics.values())))
        counter.add(*drawn(rank, 10))  # lost with the worker, which is killed before the next checkpoint
        checkpoint = Checkpoint(progress=progress, tensors={})
        if num_workers == 2:
            loaded_usage(run, checkpoint, NUM_PHOTOS).write(str(folder), PHOTOS)
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0)  # gloo was seen to abort while it is taken down


def test_three_workers_then_two_then_one_go_on_to_the_same_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "BLOCK_PHOTOS", BLOCK)
    run = str(tmp_path / "it's a run")
    run_workers(_work, 3, run, tmp_path)
    used: list[np.ndarray] = []
    for start, num_workers in enumerate((3, 2, 1)):
        used += [drawn(rank, start) for rank in range(num_workers)]
        progress = Progress(step=start, num_counted=NUM_PHOTOS)
        found = loaded_usage(run, Checkpoint(progress=progress, tensors={}), NUM_PHOTOS)
        np.testing.assert_array_equal(found.counts_3M, counted(*used))
        told = np.load(tmp_path / f"statistics {start}.npy")
        np.testing.assert_array_equal(told, list(found.statistics().values()))
    table = pq.read_table(tmp_path / "usage.parquet")
    assert table["photo"].to_pylist() == PHOTOS.to_pylist()
    np.testing.assert_array_equal(np.stack([table[role] for role in ROLES]), counted(*used[:-1]))


def owned_by(rank: int, num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective, "rank", lambda: rank)
    monkeypatch.setattr(collective, "num_workers", lambda: num_workers)
    monkeypatch.setattr(usage, "BLOCK_PHOTOS", BLOCK)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 9])
def test_a_checkpoint_with_the_counts_inside_is_read_each_worker_its_part(
    num_workers: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inside = np.arange(3 * NUM_PHOTOS, dtype=np.int32).reshape(3, -1)
    checkpoints.write(str(tmp_path), Progress(epoch=2), {"usage": torch.from_numpy(inside)})
    old = checkpoints.load_newest(str(tmp_path))
    parts = []
    for rank in range(num_workers):
        owned_by(rank, num_workers, monkeypatch)
        parts.append(loaded_usage(str(tmp_path), old, NUM_PHOTOS).counts_3M)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), inside)


def test_a_worker_reads_the_parts_of_its_own_photos_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run, progress = str(tmp_path), Progress(step=1, num_counted=NUM_PHOTOS)
    monkeypatch.setattr(usage, "BLOCK_PHOTOS", BLOCK)
    counter = UsageCounter(NUM_PHOTOS)
    counter.add(*drawn(0, 0))
    counter.save(run, progress)
    (folder,) = (tmp_path / checkpoints.FOLDER).iterdir()
    assert len(list(folder.iterdir())) == 6
    for number in (0, 1, 4, 5):
        (folder / f"usage-00000{number}.safetensors").unlink()
    owned_by(1, 3, monkeypatch)
    found = loaded_usage(run, Checkpoint(progress=progress, tensors={}), NUM_PHOTOS)
    assert found.photos == range(8, 16)
    np.testing.assert_array_equal(found.counts_3M, counter.counts_3M[:, 8:16])


@pytest.mark.parametrize(
    ("damage", "words"),
    [(b"half", "is damaged"), (None, "is gone, which counts the use of photos"), ("short", "counts other photos")],
)
def test_a_part_that_is_damaged_or_missing_is_named_with_the_way_on(
    damage: bytes | str | None, words: str, tmp_path: Path
) -> None:
    run, progress = str(tmp_path), Progress(step=1, num_counted=NUM_PHOTOS)
    UsageCounter(NUM_PHOTOS - 1 if damage == "short" else NUM_PHOTOS).save(run, progress)
    part = next((tmp_path / checkpoints.FOLDER).glob("*/usage-*"))
    if damage is None:
        part.unlink()
    elif isinstance(damage, bytes):
        part.write_bytes(damage)
    with pytest.raises(UserError, match=f"{words}.*and the run goes on from the checkpoint before"):
        loaded_usage(run, Checkpoint(progress=progress, tensors={}), NUM_PHOTOS)
