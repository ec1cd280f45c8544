"""Losses over given triplets, over the semi-hard triplets of a batch, and the softmax over all its triplets.

Shape suffixes: B triplets, N images of a batch, M all vectors that can be negatives (the batch, then the stored ones),
Q stored vectors, X pairs of an anchor and a positive, D dimensions of an embedding.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional


class TripletLoss(NamedTuple):
    """Loss over given triplets."""

    mean: Tensor
    """Over all triplets, active or not, as `torch.nn.TripletMarginLoss` returns it."""
    losses: Tensor
    """Of each triplet [B]."""
    active_share: Tensor
    """Share of the triplets with a loss above zero."""
    positive_distances: Tensor
    """[B]."""
    negative_distances: Tensor
    """[B]."""


class BatchLoss(NamedTuple):
    """Loss over the semi-hard triplets of a batch."""

    mean: Tensor
    """Over the semi-hard triplets; zero, with a zero gradient, if there is none."""
    num_semihard: Tensor
    num_triplets: Tensor
    """All triplets that the labels allow, semi-hard or not."""
    mean_positive_distance: Tensor
    mean_negative_distance: Tensor
    """Both over the pairs of all triplets, without gradient; NaN if there is no pair."""


def triplet_margin_loss(
    anchor_BD: Tensor, positive_BD: Tensor, negative_BD: Tensor, *, margin: float, squared: bool = False
) -> TripletLoss:
    """Return max(0, d(anchor, positive) - d(anchor, negative) + margin), d the Euclidean distance or its square.

    Formula: Schroff et al. 2015 (FaceNet), equation 2, with squared distances. Two equal vectors have a distance of
    zero with a gradient of zero.
    """
    positive_distances_B = _row_distances(anchor_BD, positive_BD, squared)
    negative_distances_B = _row_distances(anchor_BD, negative_BD, squared)
    losses_B = torch.relu(positive_distances_B - negative_distances_B + margin)
    return TripletLoss(
        mean=losses_B.mean(),
        losses=losses_B,
        active_share=(losses_B > 0).float().mean(),
        positive_distances=positive_distances_B,
        negative_distances=negative_distances_B,
    )


def _row_distances(left_BD: Tensor, right_BD: Tensor, squared: bool) -> Tensor:
    differences_BD = left_BD.float() - right_BD.float()
    if squared:
        return differences_BD.square().sum(dim=1)
    return torch.linalg.vector_norm(differences_BD, dim=1)


def batch_triplet_loss(
    embeddings_ND: Tensor,
    labels_N: Tensor,
    *,
    margin: float,
    squared: bool = False,
    extra_negatives_QD: Tensor | None = None,
    extra_labels_Q: Tensor | None = None,
) -> BatchLoss:
    """Return the mean loss of all triplets with d(a, p) < d(a, n) < d(a, p) + margin (FaceNet's semi-hard ones).

    Every image is an anchor, except those with a label below zero (crops that could not be decoded), which are left
    out. Positives come from the batch, negatives from the batch and the extra vectors. The extra vectors get no
    gradient. Memory grows with N x M, not with the number of triplets: the loss is a sum of distances, each weighted by
    the number of semi-hard triplets that use it, so only these counts are needed.
    """
    pool_MD, pool_labels_M = _with_extra(embeddings_ND, labels_N, extra_negatives_QD, extra_labels_Q)
    distances_NM = torch.cdist(embeddings_ND.float(), pool_MD.float())
    if squared:
        distances_NM = distances_NM.square()
    positive_NM, negative_NM = _pairs(labels_N, pool_labels_M)
    weights_NM, num_semihard = _semihard_weights(distances_NM.detach(), positive_NM, negative_NM, margin)
    total = (weights_NM * distances_NM).sum() + margin * num_semihard
    num_positives_N, num_negatives_N = positive_NM.sum(dim=1), negative_NM.sum(dim=1)
    return BatchLoss(
        mean=total / num_semihard.clamp(min=1),
        num_semihard=num_semihard,
        num_triplets=(num_positives_N * num_negatives_N).sum(),
        mean_positive_distance=_mean_where(positive_NM, distances_NM.detach()),
        mean_negative_distance=_mean_where(negative_NM, distances_NM.detach()),
    )


def _mean_where(mask_NM: Tensor, values_NM: Tensor) -> Tensor:
    """Return `values_NM[mask_NM].mean()`. Indexing itself would wait for the device, to know the number of values."""
    return values_NM.where(mask_NM, 0).sum() / mask_NM.sum()


def _semihard_weights(
    distances_NM: Tensor, positive_NM: Tensor, negative_NM: Tensor, margin: float
) -> tuple[Tensor, Tensor]:
    """Return each distance's weight in the sum over semi-hard triplets, and the number of these triplets.

    The distances of every anchor are sorted. Then two searches count the negatives of a positive, and two the positives
    of a negative. All compare d(a, p) < d(a, n) < far(a, p), so they find the same triplets.
    """
    infinity = float("inf")
    near_NM, far_NM = distances_NM, distances_NM + margin
    negatives_NM = near_NM.masked_fill(~negative_NM, infinity).sort(dim=1).values
    nears_NM = near_NM.masked_fill(~positive_NM, infinity).sort(dim=1).values
    fars_NM = far_NM.masked_fill(~positive_NM, infinity).sort(dim=1).values
    below_far_NM = torch.searchsorted(negatives_NM, far_NM)
    of_positives_NM = (below_far_NM - torch.searchsorted(negatives_NM, near_NM, right=True)).where(positive_NM, 0)
    beyond_near_NM = torch.searchsorted(nears_NM, near_NM)
    of_negatives_NM = (beyond_near_NM - torch.searchsorted(fars_NM, near_NM, right=True)).where(negative_NM, 0)
    return (of_positives_NM - of_negatives_NM).to(distances_NM.dtype), of_positives_NM.sum()


def batch_softmax_loss(
    embeddings_ND: Tensor,
    labels_N: Tensor,
    *,
    temperature: float,
    extra_negatives_QD: Tensor | None = None,
    extra_labels_Q: Tensor | None = None,
) -> Tensor:
    """Return the mean over anchors a and positives p of log(1 + sum over negatives n of exp(s(a, n) - s(a, p))).

    s(x, y) is -|x - y|^2 / 2T, with the temperature T. For vectors of length 1 this is the cosine similarity over T, up
    to a constant. Anchors, positives and negatives are those of `batch_triplet_loss`. Each pair is compared with all
    negatives, and the nearest ones weigh most. As T goes to zero, T times the loss becomes the loss of the pair's
    hardest triplet, by half the squared distances and without a margin. Without a pair it is zero, with a zero
    gradient.

    Formula: Sohn 2016 (multi-class N-pair loss), equation 6, for each positive of the batch, with a temperature as in
    Khosla et al. 2020 (supervised contrastive learning). Unlike there, the other positives are not among the
    negatives.
    """
    pool_MD, pool_labels_M = _with_extra(embeddings_ND, labels_N, extra_negatives_QD, extra_labels_Q)
    with torch.autocast(embeddings_ND.device.type, enabled=False):
        anchors_ND, pool_MD = embeddings_ND.float(), pool_MD.float()
        # |a|^2 is left out: it is the same in all scores of an anchor, which are only compared with each other.
        scores_NM = (anchors_ND @ pool_MD.T - pool_MD.square().sum(dim=1) / 2) / temperature
    positive_NM, negative_NM = _pairs(labels_N, pool_labels_M)
    # A finite number: with an infinite one, the gradient of an anchor without negatives would be NaN.
    negative_scores_NM = scores_NM.masked_fill(~negative_NM, torch.finfo(scores_NM.dtype).min)
    losses_NM = functional.softplus(torch.logsumexp(negative_scores_NM, dim=1, keepdim=True) - scores_NM)
    return losses_NM.where(positive_NM, 0).sum() / positive_NM.sum().clamp(min=1)


def _with_extra(
    embeddings_ND: Tensor, labels_N: Tensor, extra_QD: Tensor | None, extra_labels_Q: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return all vectors that can be negatives, and their labels."""
    if extra_QD is None or extra_labels_Q is None:
        return embeddings_ND, labels_N
    pool_MD = torch.cat([embeddings_ND, extra_QD.detach().to(embeddings_ND.dtype)])
    return pool_MD, torch.cat([labels_N, extra_labels_Q])


def _pairs(labels_N: Tensor, pool_labels_M: Tensor) -> tuple[Tensor, Tensor]:
    """Return which vectors are positives of each image, and which are negatives [N, M]."""
    known_NM = (labels_N >= 0)[:, None] & (pool_labels_M >= 0)
    same_NM = labels_N[:, None] == pool_labels_M
    positive_NM = (same_NM & known_NM).fill_diagonal_(False)
    positive_NM[:, len(labels_N) :] = False
    return positive_NM, ~same_NM & known_NM


def gather_batch(embeddings_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the embeddings and labels of all workers, in order of rank. Each must give the same number.

    The gradient of a worker's own part is the sum of the gradients of all workers' losses. DDP averages it. So it is
    the gradient of the mean of the losses, the same as in one process with the whole batch.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return embeddings_ND, labels_N
    return _Gather.apply(embeddings_ND), gather_rows(labels_N)


def gather_rows(values_N: Tensor) -> Tensor:
    """Return the values of all workers, in order of rank, without a gradient."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values_N
    parts = [torch.empty_like(values_N) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values_N.contiguous())
    return torch.cat(parts)


class _Gather(Function):
    """Concatenation over ranks, whose gradient is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, local_ND: Tensor) -> Tensor:
        ctx.num_local = len(local_ND)
        return gather_rows(local_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_ND: Tensor) -> Tensor:
        total_ND = gradient_ND.contiguous().clone()
        dist.all_reduce(total_ND)
        start = dist.get_rank() * ctx.num_local
        return total_ND[start : start + ctx.num_local]
