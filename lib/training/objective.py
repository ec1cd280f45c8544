"""The objective: the loss that a step minimises, and the sums of an epoch over its steps.

Shape suffixes: N images of a batch, D dimensions of an embedding.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lib.device import to_device
from lib.training import collective
from lib.training.batches import TrainingBatch
from lib.training.losses import BatchLoss, batch_softmax_loss, batch_triplet_loss, gather_batch, triplet_margin_loss
from lib.training.settings import TrainConfig


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """Figures of one step. They are tensors, so that adding them does not wait for the device."""

    loss: Tensor
    num_active: Tensor
    """Triplets with a loss above zero; of a people x photos batch, the semi-hard ones."""
    num_triplets: Tensor
    positive_distance: Tensor
    negative_distance: Tensor


SUM_NAMES = ("steps", "images", "loss", "active", "triplets", "positive", "negative")


CentreLoss = Callable[[Tensor, Tensor], Tensor]
"""Takes embeddings and labels of all workers, and returns the class-centre loss."""


def objective(
    embeddings_ND: Tensor,
    batch: TrainingBatch,
    labels_of_rows: npt.NDArray[np.integer],
    config: TrainConfig,
    centre_loss: CentreLoss | None = None,
) -> StepFigures:
    """Return the loss of a step, to be differentiated. Images that could not be decoded are left out."""
    terms = config.objective.terms
    is_of_triplets = config.sampling.batch == "triplets"
    all_ND, all_labels_N = embeddings_ND, torch.empty(0)
    if centre_loss is not None or not is_of_triplets:
        rows_N = batch.loaded.rows.ravel()
        labels = np.where(batch.loaded.failed, -1, labels_of_rows[rows_N]).astype(np.int64)
        all_ND, all_labels_N = gather_batch(embeddings_ND, to_device(labels, embeddings_ND.device))
    with torch.set_grad_enabled(terms.batch is not None and torch.is_grad_enabled()):
        if is_of_triplets:
            figures = _triplets(embeddings_ND, batch, config)
        else:
            figures = _people(all_ND, all_labels_N, batch, config)
    loss = torch.zeros((), device=embeddings_ND.device)
    if terms.batch is not None:
        loss = terms.batch.weight * figures.loss
    if terms.centre is not None:
        assert centre_loss is not None
        loss = loss + terms.centre.weight * centre_loss(all_ND, all_labels_N)
    return dataclasses.replace(figures, loss=loss)


def _people(all_ND: Tensor, all_labels_N: Tensor, batch: TrainingBatch, config: TrainConfig) -> StepFigures:
    extra, extra_labels = None, None
    if batch.stored is not None:
        extra = to_device(batch.stored.vectors_QD, all_ND.device)
        extra_labels = to_device(batch.stored.labels_Q.astype(np.int64), all_ND.device)
    loss = people_loss(all_ND, all_labels_N, config, extra, extra_labels)
    return StepFigures(
        loss=loss.mean,
        num_active=loss.num_semihard,
        num_triplets=loss.num_triplets,
        positive_distance=loss.mean_positive_distance.nan_to_num(),
        negative_distance=loss.mean_negative_distance.nan_to_num(),
    )


def people_loss(
    embeddings_ND: Tensor,
    labels_N: Tensor,
    config: TrainConfig,
    extra_negatives_QD: Tensor | None = None,
    extra_labels_Q: Tensor | None = None,
) -> BatchLoss:
    """Return the loss of a people x photos batch; the counts are always those of semi-hard triplets.

    For a loss over centres alone it is the softmax, because validation people have no centres.
    """
    extra: dict[str, Any] = {"extra_negatives_QD": extra_negatives_QD, "extra_labels_Q": extra_labels_Q}
    term = config.objective.terms.batch
    is_semihard = term is not None and term.name == "semihard"
    with torch.set_grad_enabled(is_semihard and torch.is_grad_enabled()):
        loss = batch_triplet_loss(
            embeddings_ND, labels_N, margin=config.objective.margin, squared=config.objective.squared, **extra
        )
    if is_semihard:
        return loss
    return loss._replace(
        mean=batch_softmax_loss(embeddings_ND, labels_N, temperature=config.objective.temperature, **extra)
    )


def _triplets(embeddings_ND: Tensor, batch: TrainingBatch, config: TrainConfig) -> StepFigures:
    anchors, positives, negatives = embeddings_ND.chunk(3)
    result = triplet_margin_loss(
        anchors, positives, negatives, margin=config.objective.margin, squared=config.objective.squared
    )
    failed_T = batch.loaded.failed.reshape(3, -1).any(axis=0)
    whole_T = to_device(np.asarray(~failed_T, np.float32), embeddings_ND.device)
    num_whole = whole_T.sum()
    share = num_whole.clamp(min=1)
    return StepFigures(
        loss=(result.losses * whole_T).sum() / share,
        num_active=((result.losses > 0) * whole_T).sum(),
        num_triplets=num_whole,
        positive_distance=((result.positive_distances * whole_T).sum() / share).detach(),
        negative_distance=((result.negative_distances * whole_T).sum() / share).detach(),
    )


class EpochSums:
    """Sums the figures of an epoch's steps on the device. They are read at its end, or for a checkpoint."""

    def __init__(self, device: torch.device, earlier: dict[str, float]) -> None:
        """Start with the sums of a checkpoint within the epoch."""
        self._sums = torch.tensor([earlier.get(name, 0.0) for name in SUM_NAMES], dtype=torch.float64).to(device)

    def add(self, figures: StepFigures, num_images: int) -> None:
        """Add a step."""
        one = torch.ones((), device=self._sums.device)
        values = [
            one,
            one * num_images,
            figures.loss.detach(),
            figures.num_active,
            figures.num_triplets,
            figures.positive_distance,
            figures.negative_distance,
        ]
        self._sums += torch.stack([value.double() for value in values])

    @property
    def loss(self) -> torch.Tensor:
        """The mean loss of a step so far, on the device."""
        return self._sums[SUM_NAMES.index("loss")] / self._sums[SUM_NAMES.index("steps")]

    def values(self) -> npt.NDArray[np.float64]:
        """Return the sums, in the order of `SUM_NAMES`."""
        return self._sums.cpu().numpy()

    def over_all_workers(self) -> dict[str, float]:
        """Return the sums over all workers, by their names. Every worker has to call this."""
        return dict(zip(SUM_NAMES, collective.summed(self.values()).tolist(), strict=True))
