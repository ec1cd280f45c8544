"""Freezes BatchNorm statistics and the first stages of a pretrained model, and saves memory for activations."""

from torch.nn.modules.batchnorm import _BatchNorm

from lib.errors import UserError
from lib.recognition.model import EmbeddingModel


def has_statistics(model: EmbeddingModel) -> bool:
    """Return whether the backbone has BatchNorm statistics, as pretrained ones do."""
    return any(bool(norm.running_mean.any()) for norm in _batch_norms(model) if norm.running_mean is not None)


def fix_statistics(model: EmbeddingModel) -> None:
    """Make BatchNorm use its running statistics, unchanged, until the next `model.train()`; scale and shift learn."""
    for norm in _batch_norms(model):
        norm.eval()


def _batch_norms(model: EmbeddingModel) -> list[_BatchNorm]:
    return [module for module in model.backbone.modules() if isinstance(module, _BatchNorm)]


def freeze_stages(model: EmbeddingModel, num_stages: int) -> None:
    """Freeze the first stages of the backbone. The stem is the first stage; timm's stages follow.

    Raises:
        UserError: no stage would be left to train, or timm does not know this backbone's stages.
    """
    if not num_stages:
        return
    from timm.models import group_parameters

    name, matcher = model.spec.backbone, getattr(model.backbone, "group_matcher", None)
    if matcher is None:
        raise UserError(f"timm does not tell the stages of {name}: --frozen-stages 0")
    stages: dict[int, list[str]] = group_parameters(model.backbone, matcher(coarse=True))
    if num_stages >= len(stages):
        raise UserError(f"--frozen-stages {num_stages} leaves none of {name}'s {len(stages)} stages to train")
    parameters = dict(model.backbone.named_parameters())
    for stage in sorted(stages)[:num_stages]:
        for parameter in stages[stage]:
            parameters[parameter].requires_grad_(False)


def can_freeze(model: EmbeddingModel, num_stages: int) -> bool:
    """Return whether `freeze_stages` can freeze so many stages. It may freeze them."""
    try:
        freeze_stages(model, num_stages)
    except UserError:
        return False
    return True


def checkpoint_activations(model: EmbeddingModel) -> None:
    """Recompute the activations of each block in the backward pass, instead of keeping them in memory.

    Raises:
        UserError: timm cannot do so with this backbone.
    """
    try:
        model.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError) as error:
        name = model.spec.backbone
        raise UserError(f"--checkpoint-activations: timm knows no way for {name}; take another backbone") from error
