"""Centres: the same loss, gradients and steps however many workers own them; sampled, saved, within their memory."""

import multiprocessing
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, normalize

from lib.training import centre_store
from lib.training.centre_store import CentreStore, owned
from lib.training.flag_groups import LossSettings
from lib.training.losses import gather_batch
from tests.training.processes import run_workers

CPU = torch.device("cpu")
NUM, DIM = 37, 8


def store(num: int = NUM, rank: int = 0, num_workers: int = 1, dim: int = DIM, **settings: object) -> CentreStore:
    objective = LossSettings(**{"loss": "cosface", "scale": 8.0, **settings})  # type: ignore[arg-type]
    return CentreStore(objective, num_identities=num, dim=dim, device=CPU, seed=5, rank=rank, num_workers=num_workers)


def batch(num: int = 24, num_identities: int = NUM, dim: int = DIM) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(num_identities, size=num))
    labels[3] = -1
    return torch.from_numpy(rng.normal(size=(num, dim)).astype(np.float32)), labels


def whole_matrix(centres: torch.Tensor, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss of one process by torch's cross-entropy over all centres: cosface with one centre each."""
    logits = normalize(embeddings, dim=1) @ normalize(centres[:, 0], dim=1).T
    logits = logits - 0.35 * torch.nn.functional.one_hot(labels.clamp(min=0), len(centres))
    return cross_entropy(8.0 * logits, labels, ignore_index=-1)


def test_every_identity_has_one_owner() -> None:
    for num_workers in (1, 2, 3, 5):
        ranges = [owned(11, rank, num_workers) for rank in range(num_workers)]
        assert [identity for each in ranges for identity in each] == list(range(11))


def test_centres_begin_the_same_however_many_workers_own_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(centre_store, "DRAWN_AT_ONCE", 5)
    parts = [store(rank=rank, num_workers=3).centres_RSD for rank in range(3)]
    torch.testing.assert_close(torch.cat(parts), store().centres_RSD, rtol=0, atol=0)
    torch.testing.assert_close(store().centres_RSD.norm(dim=2), torch.ones(NUM, 1))


@pytest.mark.parametrize("chunk", [2**18, 60])
def test_loss_gradient_and_steps_are_those_of_one_matrix_and_torchs_adam(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(centre_store, "SMALLEST_CHUNK", chunk)
    centres = store()
    assert len(centres._chunks(batch()[1], 0)) == (1 if chunk > NUM * 24 else 19)
    whole = centres.centres_RSD.clone().requires_grad_()
    adam = torch.optim.Adam([whole], lr=0.05)
    for step in range(4):
        embeddings, labels = batch()
        ours, twin = embeddings.requires_grad_(), embeddings.detach().clone().requires_grad_()
        value, expected = centres.loss(ours, labels, step=step, lr=0.05), whole_matrix(whole, twin, labels)
        value.backward()
        adam.zero_grad()
        expected.backward()
        adam.step()
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.grad, twin.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(centres.centres_RSD, whole.detach(), rtol=1e-4, atol=1e-5)


def _work(rank: int, num_workers: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=num_workers)
    embeddings, labels = batch()
    share = len(labels) // num_workers
    mine = slice(share * rank, share * (rank + 1))
    local = embeddings[mine].requires_grad_()
    all_embeddings, all_labels = gather_batch(local, labels[mine])
    centres = store(rank=rank, num_workers=num_workers)
    gradients: list[torch.Tensor] = []
    centres._move = lambda _, __, gradient, ___: gradients.append(gradient)  # type: ignore[method-assign]
    value = centres.loss(all_embeddings, all_labels, step=0, lr=0.1)
    value.backward()
    # DDP takes the mean over the workers of what each of them computes for its part.
    torch.save((value.detach(), local.grad / num_workers, torch.cat(gradients)), folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo was seen to abort while it is taken down


@pytest.mark.parametrize("num_workers", [2, 4])
def test_workers_have_loss_and_gradients_of_one_process_with_the_whole_matrix(num_workers: int, tmp_path: Path) -> None:
    run_workers(_work, num_workers, num_workers, tmp_path)
    embeddings, labels = batch()
    embeddings.requires_grad_()
    whole = store().centres_RSD.requires_grad_()
    expected = whole_matrix(whole, embeddings, labels)
    expected.backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(num_workers)]
    for value, _, _ in parts:
        torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), embeddings.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), whole.grad, rtol=1e-5, atol=1e-5)


def test_a_sample_holds_the_identities_of_the_photos_and_only_the_sample_moves() -> None:
    centres = store(num=1000, sample_rate=0.1)
    before = centres.centres_RSD.clone()
    embeddings, labels = batch(num_identities=1000)
    (rows,) = centres._chunks(labels, step=7)
    assert len(rows) == 100
    assert set(labels[labels >= 0].tolist()) <= set(rows.tolist())
    assert (rows.diff() > 0).all()
    assert not torch.equal(rows, centres._chunks(labels, step=8)[0]), "each step draws again"
    centres.loss(embeddings, labels, step=7, lr=0.1)
    moved = (centres.centres_RSD != before).any(dim=2).any(dim=1).nonzero().ravel()
    assert torch.equal(moved, rows)


def test_centres_stay_where_they_are_when_the_loss_is_not_finite_and_the_broken_one_is_named() -> None:
    centres = store()
    embeddings, labels = batch()
    centres.loss(embeddings, labels, step=0, lr=0.1)
    assert centres.broken_identity() is None
    centres.centres_RSD[11, 0, 2] = torch.nan
    before = centres.centres_RSD.clone()
    centres.loss(embeddings, labels, step=1, lr=0.1)
    assert torch.equal(centres.centres_RSD.nan_to_num(), before.nan_to_num())
    assert centres.broken_identity() == 11


def test_blocks_go_from_any_number_of_workers_to_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(centre_store, "SAVED_AT_ONCE", 5 * DIM)
    olds = [store(rank=rank, num_workers=2) for rank in range(2)]
    whole = store()
    for number, old in enumerate([*olds, whole]):
        for name, tensor in old._tensors().items():
            generator = torch.Generator().manual_seed(number)
            tensor.copy_(
                torch.rand(tensor.shape, generator=generator)
                if name != "steps"
                else torch.full_like(tensor, number + 3)
            )
    expected = {name: torch.cat([old._tensors()[name] for old in olds]) for name in whole._tensors()}
    blocks = [block for old in olds for block in old.blocks()]
    assert all(len(block.tensors["steps"]) <= 5 for block in blocks)
    news = [store(rank=rank, num_workers=3) for rank in range(3)]
    for new in news:
        for block in blocks:
            new.load(block)
    for name, tensor in expected.items():
        assert torch.equal(torch.cat([new._tensors()[name] for new in news]), tensor)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _measure(folder: Path) -> None:
    torch.set_num_threads(1)
    num, dim = 400_000, 64
    embeddings, labels = batch(num_identities=num, dim=dim)
    store(num=40_000, dim=dim).loss(embeddings, labels % 40_000, step=0, lr=0.1)  # torch's own start
    before, peak, done = resident_mb(), [0.0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident_mb())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    centres = store(num=num, dim=dim)
    for step in range(2):
        centres.loss(embeddings, labels, step=step, lr=0.1)
    done.set()
    watcher.join()
    (folder / "mb").write_text(str((peak[0] - before) / (num * dim * 12 / 2**20)))
    os._exit(0)


def test_a_worker_takes_12_bytes_a_number_of_its_centres_and_a_tenth(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("spawn").Process(target=_measure, args=(tmp_path,))
    worker.start()
    worker.join(timeout=200)
    assert worker.exitcode == 0
    assert float((tmp_path / "mb").read_text()) <= 1.10
