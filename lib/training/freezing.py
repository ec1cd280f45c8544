"""What training keeps: a pretrained model's statistics of BatchNorm and first stages, and how many activations."""

from torch.nn.modules.batchnorm import _BatchNorm

from lib.errors import UserError
from lib.recognition.model import EmbeddingModel


def has_statistics(model: EmbeddingModel) -> bool:
    """Return whether a BatchNorm of the backbone knows the mean of what passes it, as pretrained ones do."""
    return any(bool(norm.running_mean.any()) for norm in _batch_norms(model) if norm.running_mean is not None)


def fix_statistics(model: EmbeddingModel) -> None:
    """Have BatchNorm use and keep its running statistics until the next `model.train()`; its scale and shift learn."""
    for norm in _batch_norms(model):
        norm.eval()


def _batch_norms(model: EmbeddingModel) -> list[_BatchNorm]:
    return [module for module in model.backbone.modules() if isinstance(module, _BatchNorm)]


def freeze_stages(model: EmbeddingModel, num_stages: int) -> None:
    """Take the gradient from the first layers of the backbone: its stem is the first stage, then timm's own follow.

    Raises:
        UserError: no stage would be left to train, or timm does not tell this backbone's stages.
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


def checkpoint_activations(model: EmbeddingModel) -> None:
    """Have the backward pass compute the activations of each block again, instead of keeping them in memory.

    Raises:
        UserError: timm cannot do so with this backbone.
    """
    try:
        model.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError) as error:
        name = model.spec.backbone
        raise UserError(f"--checkpoint-activations: timm knows no way for {name}; take another backbone") from error
