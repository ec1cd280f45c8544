"""What training leaves as it is stays, and the rest learns."""

import pytest
import torch

from lib.errors import UserError
from lib.recognition.model import EmbeddingModel, ModelSpec
from lib.training.freezing import checkpoint_activations, fix_statistics, freeze_stages, has_statistics


def test_fixed_statistics_stay_while_scale_and_shift_learn() -> None:
    model = EmbeddingModel(ModelSpec(backbone="test_efficientnet", image_size=64)).train()
    norm = model.backbone.bn1
    assert not has_statistics(model)
    model(torch.rand(4, 3, 64, 64))
    assert has_statistics(model)
    fix_statistics(model)
    before = norm.running_mean.clone()
    together = model(torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    alone = model(torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))[:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-3, atol=1e-5)
    together.sum().backward()
    assert torch.equal(norm.running_mean, before)
    assert norm.weight.grad.any()


@pytest.mark.parametrize("backbone", ["test_convnext", "test_efficientnet", "tf_efficientnet_lite0"])
def test_frozen_stages_are_the_first_ones(backbone: str) -> None:
    model = EmbeddingModel(ModelSpec(backbone=backbone, image_size=64))
    freeze_stages(model, 0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    freeze_stages(model, 2)
    learns = [parameter.requires_grad for parameter in model.parameters()]
    assert learns == sorted(learns)
    assert 0 < learns.count(False) < len(learns) / 2
    model(torch.rand(2, 3, 64, 64)).sum().backward()
    assert [parameter.grad is not None for parameter in model.parameters()] == learns


def test_no_stage_left_to_train_is_refused() -> None:
    model = EmbeddingModel(ModelSpec(backbone="test_convnext", image_size=64))
    with pytest.raises(UserError, match="--frozen-stages 6 leaves none of test_convnext's 6 stages to train"):
        freeze_stages(model, 6)


def test_activations_that_are_computed_again_give_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = EmbeddingModel(ModelSpec(backbone="test_convnext", image_size=32)).train()
    images = torch.rand(2, 3, 32, 32)
    calls = []
    model.backbone.stages[0].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        checkpoint_activations(model)
    assert len(calls) == 3, "forward, forward, and once more on the way back"
    torch.testing.assert_close(gradients[1], gradients[0])

    def unable(_: bool) -> None:
        raise AssertionError("gradient checkpointing not supported")

    monkeypatch.setattr(model.backbone, "set_grad_checkpointing", unable)
    with pytest.raises(UserError, match=r"^--checkpoint-activations: timm knows no way for test_convnext"):
        checkpoint_activations(model)
