"""A step's loss: images that cannot be decoded change nothing, and sums go on from a checkpoint."""

from typing import Any

import numpy as np
import pytest
import torch

from lib.training.batches import StoredVectors, TrainingBatch
from lib.training.loading import LoadedBatch
from lib.training.losses import batch_softmax_loss, batch_triplet_loss, triplet_margin_loss
from lib.training.objective import SUM_NAMES, EpochSums, objective
from lib.training.settings import TrainConfig

LABELS = np.repeat(np.arange(6), 4)


def batch(rows: np.ndarray, failed: list[int], stored: StoredVectors | None = None) -> TrainingBatch:
    failed_N = np.isin(np.arange(rows.size), failed)
    return TrainingBatch(
        LoadedBatch(rows=rows, images=np.zeros((rows.size, 1, 1, 3), np.uint8), failed=failed_N), stored
    )


def embeddings(num: int) -> torch.Tensor:
    vectors = torch.randn(num, 5, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.normalize(vectors, dim=1).requires_grad_()


def config(**changes: Any) -> TrainConfig:
    return TrainConfig.of(data="d", **{"loss": "semihard", **changes})


def test_a_failed_image_takes_its_triplet_out_of_the_loss() -> None:
    rows = np.array([[0, 4, 8, 12], [1, 5, 9, 13], [20, 20, 21, 22]])
    vectors = embeddings(12)
    figures = objective(vectors, batch(rows, failed=[5]), LABELS, config(batch="triplets", margin=0.5))
    kept = [0, 2, 3]
    anchors, positives, negatives = (part[kept] for part in vectors.chunk(3))
    wanted = triplet_margin_loss(anchors, positives, negatives, margin=0.5)
    torch.testing.assert_close(figures.loss, wanted.mean)
    assert figures.num_triplets.item() == 3
    figures.loss.backward()
    assert not vectors.grad[[1, 5, 9]].any()


def test_a_failed_image_is_no_part_of_a_batch_of_people() -> None:
    rows = np.arange(12).reshape(3, 4)
    vectors = embeddings(12)
    figures = objective(vectors, batch(rows, failed=[2, 11]), LABELS, config(margin=0.5))
    kept = [n for n in range(12) if n not in (2, 11)]
    wanted = batch_triplet_loss(vectors[kept], torch.from_numpy(LABELS[kept]), margin=0.5)
    torch.testing.assert_close(figures.loss, wanted.mean)
    assert figures.num_triplets == wanted.num_triplets
    torch.testing.assert_close(figures.negative_distance, wanted.mean_negative_distance)


def test_the_softmax_has_the_counts_of_semihard_triplets_and_its_own_gradient() -> None:
    rows, labels = np.arange(12).reshape(3, 4), torch.from_numpy(LABELS[:12])
    vectors, same = embeddings(12), embeddings(12)
    figures = objective(vectors, batch(rows, []), LABELS, config(loss="softmax", temperature=0.2))
    wanted = batch_softmax_loss(same, labels, temperature=0.2)
    torch.testing.assert_close(figures.loss, wanted)
    counts = batch_triplet_loss(vectors.detach(), labels, margin=0.2)
    assert figures.num_active == counts.num_semihard
    assert figures.num_triplets == counts.num_triplets
    figures.loss.backward()
    wanted.backward()
    torch.testing.assert_close(vectors.grad, same.grad)


def test_the_settings_of_a_loss_are_those_it_goes_by() -> None:
    assert config(loss="softmax", temperature=0.2, margin=0.7).loss_settings() == {
        "loss": "softmax",
        "temperature": 0.2,
    }
    assert config(loss="semihard", margin=0.7).loss_settings() == {"loss": "semihard", "margin": 0.7}
    assert config(loss="2*arcface+softmax", scale=30.0, sample_rate=0.1).loss_settings() == {
        "loss": "2*arcface+softmax",
        "temperature": 0.1,
        "center margin": 0.5,
        "scale": 30.0,
        "sub-centers": 1,
        "sample rate": 0.1,
    }
    triplets = config(loss="softmax", batch="triplets", margin=0.7)
    assert triplets.loss_settings() == {"loss": "triplet margin", "margin": 0.7}


def test_a_sum_of_losses_is_weighted_and_a_failed_image_has_no_part_in_it() -> None:
    rows, vectors = np.arange(12).reshape(3, 4), embeddings(12)
    seen: list[torch.Tensor] = []

    def centre_loss(all_ND: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        seen.append(labels_N)
        return all_ND[0].sum()

    settings = config(loss="3*cosface+0.5*softmax")
    figures = objective(vectors, batch(rows, [2]), LABELS, settings, centre_loss)
    alone = objective(vectors, batch(rows, [2]), LABELS, config(loss="softmax"))
    torch.testing.assert_close(figures.loss, 3 * vectors[0].sum() + 0.5 * alone.loss)
    assert seen[0].tolist() == [-1 if row == 2 else LABELS[row] for row in range(12)]
    only = objective(vectors, batch(rows, []), LABELS, config(loss="cosface"), centre_loss)
    only.loss.backward()
    torch.testing.assert_close(vectors.grad, torch.eye(12)[:1].T.expand(12, 5))
    assert only.num_triplets > 0


def test_stored_vectors_are_negatives_but_for_those_that_are_not_there() -> None:
    rows = np.arange(8).reshape(2, 4)
    vectors, extra = embeddings(8), embeddings(4).detach().numpy()[::-1].copy()
    stored = StoredVectors(extra, np.array([5, -1, 0, 3]))
    figures = objective(vectors, batch(rows, [], stored), LABELS, config(margin=0.5))
    wanted = batch_triplet_loss(
        vectors,
        torch.from_numpy(LABELS[:8]),
        margin=0.5,
        extra_negatives_QD=torch.from_numpy(extra[[0, 2, 3]]),
        extra_labels_Q=torch.tensor([5, 0, 3]),
    )
    torch.testing.assert_close(figures.loss, wanted.mean)
    assert figures.num_triplets == wanted.num_triplets


def test_sums_go_on_from_a_checkpoint() -> None:
    figures = objective(embeddings(12), batch(np.arange(12).reshape(3, 4), []), LABELS, config(margin=0.5))
    through = EpochSums(torch.device("cpu"), {})
    through.add(figures, 12)
    first = dict(zip(SUM_NAMES, through.values().tolist(), strict=True))
    through.add(figures, 12)
    resumed = EpochSums(torch.device("cpu"), first)
    resumed.add(figures, 12)
    assert resumed.values().tolist() == pytest.approx(through.values().tolist())
    assert dict(zip(SUM_NAMES, resumed.values(), strict=True))["images"] == 24
