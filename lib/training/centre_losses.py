"""Margins of class-centre losses: from the cosine of an image with the centre of its identity to a logit.

Every identity has a learnt vector, its centre. The logits of an image are its cosines with all centres, times a scale;
a margin lowers the one of its own identity. The loss is their softmax cross-entropy.

Shape suffixes: N images, C identities, S sub-centres of each, D dimensions.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from lib.training.loss_terms import CentreLossName

COSINE_LIMIT = 1 - 1e-6
"""Cosines are clipped here, because the gradient of the angle is infinite at 1."""

ADAFACE_LIMIT = 1e-3
"""AdaFace keeps angles this far from 0 and pi."""

NORM_RANGE = (1e-3, 100.0)
"""Norms of embeddings are clipped to these, as in the authors' code of AdaFace."""
NORM_MOMENTUM = 0.99
NORM_SPREAD = 0.333
"""h of AdaFace, section 3.3: about two thirds of the images have a quality between -1 and 1."""


def cosines(embeddings_ND: Tensor, centres_CSD: Tensor) -> Tensor:
    """Return the cosine of each image with the nearest sub-centre of each identity [N, C], in float32.

    Formula: Deng et al. 2020 (Sub-center ArcFace), equation 3 and the max pooling after it.
    """
    with torch.autocast(embeddings_ND.device.type, enabled=False):
        unit_ND = functional.normalize(embeddings_ND.float(), dim=1)
        unit_XD = functional.normalize(centres_CSD.float(), dim=2).flatten(0, 1)
        cosines_NX = unit_ND @ unit_XD.T
    num_sub = centres_CSD.shape[1]
    return cosines_NX if num_sub == 1 else cosines_NX.unflatten(1, (-1, num_sub)).max(dim=2).values


def with_margin(cosines_N: Tensor, loss: CentreLossName, margin: float, quality_N: Tensor | None = None) -> Tensor:
    """Return the cosines of images with the centres of their own identities, lowered by the margin.

    Formulas: arcface: Deng et al. 2019, equation 3, cos(angle + margin); above an angle of pi - margin, where that
    rises again, cos(angle) - margin * sin(margin), as in the authors' code. cosface: Wang et al. 2018, equation 4,
    cos(angle) - margin. adaface: Kim et al. 2022, equation 11, with the qualities of `NormStatistics`.
    """
    if loss == "cosface":
        return cosines_N - margin
    cosines_N = cosines_N.clamp(-COSINE_LIMIT, COSINE_LIMIT)
    angles_N = cosines_N.arccos()
    if loss == "arcface":
        beyond_N = cosines_N - margin * math.sin(margin)
        return torch.where(angles_N <= math.pi - margin, (angles_N + margin).cos(), beyond_N)
    assert quality_N is not None
    angles_N = (angles_N - margin * quality_N).clamp(ADAFACE_LIMIT, math.pi - ADAFACE_LIMIT)
    return angles_N.cos() - margin * (1 + quality_N)


class NormStatistics:
    """Running mean and deviation of the embeddings' norms, by which AdaFace judges how clear a photo is.

    Formula: Kim et al. 2022, equation 9, with a momentum of 0.99 as in section 3.3. The averages are corrected for the
    bias of their start, as in Adam. The authors start at norms that fit only their network.

    Attributes:
        sums_3: float32, the weights of all batches so far, and the weighted sums of their means and deviations.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums_3 = torch.zeros(3, device=device)

    @torch.no_grad()
    def quality(self, norms_N: Tensor, is_known_N: Tensor, *, learn: bool) -> Tensor:
        """Return the quality of each image, -1 to 1, after adding the norms of the known ones to the averages."""
        norms_N = norms_N.float().clamp(*NORM_RANGE)
        num = is_known_N.sum().clamp(min=2)
        mean = norms_N.where(is_known_N, 0).sum() / num
        deviation = ((norms_N - mean).where(is_known_N, 0).square().sum() / (num - 1)).sqrt()
        now_3 = torch.stack([torch.ones_like(mean), mean, deviation])
        sums_3 = NORM_MOMENTUM * self.sums_3 + (1 - NORM_MOMENTUM) * now_3
        if learn:
            self.sums_3 = sums_3
        weight, mean, deviation = sums_3
        quality_N = (norms_N - mean / weight) / (deviation / weight + ADAFACE_LIMIT)
        return (quality_N * NORM_SPREAD).clamp(-1, 1)
