"""Schedules of training: the learning rate by the progress, the hardness of negatives by the history."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lib.training.history import has_collapsed, has_plateaued

Hardness = Literal["random", "hard", "semihard", "exact"]

PRETRAINED_CLIP_NORM, RANDOM_CLIP_NORM = 100.0, 5.0
"""Largest norm of the gradients, by the backbone's initial weights (docs/measurements.md compares)."""

USUAL_LR, FINE_LR = 9e-4, 1e-4
"""Peak learning rates. The first was measured with efficientnet-lite0. The second is near those of the papers of
ConvNeXt (Liu et al. 2022, table 5: 5e-5) and ViT for fine-tuning; it was not measured here."""


def usual_lr(*, is_pretrained: bool, has_batch_norm: bool) -> float:
    """Return the default peak learning rate of a backbone."""
    return FINE_LR if is_pretrained and not has_batch_norm else USUAL_LR


def learning_rate(highest: float, progress: float, warmup_share: float) -> float:
    """Return the rate at `progress` (0 to 1) of the training: a linear rise, then half a cosine down to zero.

    Formula: Loshchilov and Hutter 2017 (SGDR), equation 5, without restarts.
    """
    if progress < warmup_share:
        return highest * progress / warmup_share
    share_of_fall = (progress - warmup_share) / (1 - warmup_share)
    return highest * 0.5 * (1 + math.cos(math.pi * min(share_of_fall, 1.0)))


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The policy of negatives, and its first epoch."""

    negatives: Hardness
    first_epoch: int
    """The first epoch with these negatives."""


def first_phase(policy: str) -> Phase:
    """Return the first phase for a value of `--negatives`."""
    return Phase(negatives="random" if policy == "auto" else policy, first_epoch=1)  # type: ignore[arg-type]


def next_phase(
    phase: Phase,
    *,
    policy: str,
    epoch: int,
    losses: Sequence[float],
    variances: Sequence[float],
    patience: int,
    were_kept: Sequence[bool] = (),
    had_hard: bool = False,
) -> tuple[Phase, str]:
    """Return the phase of the epoch after `epoch`, and a line for the user if it is another phase.

    Args:
        policy: `--negatives`; only `auto` and `hard` ever change.
        losses: validation losses with random negatives, of every epoch of the phase.
        variances: of the validation embeddings, of every epoch so far.
        were_kept: of every epoch of the phase, whether its model was as good as the best so far.
        had_hard: whether there was a phase of hard negatives before; there is at most one.
    """
    if policy == "auto" and phase.negatives == "hard" and len(were_kept) >= patience and not any(were_kept):
        note = f"{len(were_kept)} epochs of hard negatives were all worse than before: random negatives again"
        return Phase(negatives="random", first_epoch=epoch + 1), note
    if had_hard and phase.negatives == "random":
        return phase, ""
    if policy == "auto" and phase.negatives == "random" and has_plateaued(losses, patience=patience):
        note = f"the validation loss has not fallen for {patience} epochs: hard negatives from now on"
        return Phase(negatives="hard", first_epoch=epoch + 1), note
    if phase.negatives == "hard" and has_collapsed(variances):
        note = f"the embeddings collapsed (variance {variances[-1]:.3g}): semi-hard negatives from now on"
        return Phase(negatives="semihard", first_epoch=epoch + 1), note
    return phase, ""
