"""iResNet, the backbone of ArcFace's published models, under the names that InsightFace gives its tensors.

A residual block is BN, convolution, BN, PReLU, convolution, BN (Han et al. 2017, Deep Pyramidal Residual Networks; Deng
et al. 2019, ArcFace, section 3.1). The last map of 7x7 goes through BN, one linear layer and BN, and is the embedding.
Importing this module makes `iresnet18`, `iresnet34`, `iresnet50` and `iresnet100` models of timm, and `ir18`, `ir34`,
`ir50` and `ir101`: the same as CVLface and AdaFace have them, whose first block takes every second pixel of its input.

Shape suffixes: N images, C channels, H height, W width, D embedding dimension.
"""

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from lib.recognition.iresnet_names import DEPTHS, LAYERS

IMAGE_SIZE = 112
NUM_FEATURES = 512
_WIDTHS = (64, 128, 256, 512)
_LAST_SIDE = IMAGE_SIZE // 16


class Block(nn.Module):
    """A residual block. Its second convolution has the stride.

    With `may_skip`, the shortcut of a block that keeps its width has no weights.
    """

    def __init__(self, width_in: int, width: int, stride: int, *, may_skip: bool = False) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if may_skip and stride != 1 and width_in == width:
            self.downsample = nn.MaxPool2d(1, stride)
        elif stride != 1 or width_in != width:
            self.downsample = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
        """Return the sum of the shortcut and the layers."""
        made_NCHW = self.prelu(self.bn2(self.conv1(self.bn1(x_NCHW))))
        made_NCHW = self.bn3(self.conv2(made_NCHW))
        return made_NCHW + (x_NCHW if self.downsample is None else self.downsample(x_NCHW))


def _stage(width_in: int, width: int, depth: int, *, may_skip: bool) -> nn.Sequential:
    return nn.Sequential(
        *(Block(width if n else width_in, width, 1 if n else 2, may_skip=may_skip) for n in range(depth))
    )


class IResNet(nn.Module):
    """The network for images of 112 pixels. Its features are ArcFace's embedding before scaling to length 1.

    Raises:
        ValueError: another image size, because the linear layer takes a map of 7x7; or a classifier is asked for.
    """

    num_features = NUM_FEATURES
    gives_embeddings = True

    def __init__(
        self,
        depths: tuple[int, ...],
        *,
        img_size: int | tuple[int, int] = IMAGE_SIZE,
        num_classes: int = 0,
        in_chans: int = 3,
        may_skip: bool = False,
    ) -> None:
        super().__init__()
        if img_size not in (IMAGE_SIZE, (IMAGE_SIZE, IMAGE_SIZE)):
            raise ValueError(f"it takes {IMAGE_SIZE} pixels only: --image-size {IMAGE_SIZE}")
        if num_classes:
            raise ValueError("it has no classifier")
        self.conv1 = nn.Conv2d(in_chans, _WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.prelu = nn.PReLU(_WIDTHS[0])
        self.layer1 = _stage(_WIDTHS[0], _WIDTHS[0], depths[0], may_skip=may_skip)
        self.layer2 = _stage(_WIDTHS[0], _WIDTHS[1], depths[1], may_skip=may_skip)
        self.layer3 = _stage(_WIDTHS[1], _WIDTHS[2], depths[2], may_skip=may_skip)
        self.layer4 = _stage(_WIDTHS[2], _WIDTHS[3], depths[3], may_skip=may_skip)
        self.bn2 = nn.BatchNorm2d(_WIDTHS[3])
        self.fc = nn.Linear(_WIDTHS[3] * _LAST_SIDE**2, NUM_FEATURES)
        self.features = nn.BatchNorm1d(NUM_FEATURES)
        self.features.weight.requires_grad = False  # stays 1 in InsightFace: the length of a vector says nothing
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return which parameters belong to which stage, as timm asks its models."""
        return {"stem": r"^(?:conv1|bn1|prelu)\.", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Return features_ND of images of 112 pixels."""
        x_NCHW = self.prelu(self.bn1(self.conv1(images_NCHW)))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x_NCHW = layer(x_NCHW)
        features_ND: torch.Tensor = self.features(self.fc(self.bn2(x_NCHW).flatten(1)))
        return features_ND


def _cfg() -> dict[str, Any]:
    return {
        "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
        "fixed_input_size": True,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "num_classes": 0,
        "first_conv": "conv1",
        "classifier": None,
    }


default_cfgs = generate_default_cfgs({name: _cfg() for name in LAYERS})


def _iresnet(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    depths, may_skip = DEPTHS[LAYERS[name]], not name.startswith("iresnet")
    model: nn.Module = build_model_with_cfg(IResNet, name, pretrained, depths=depths, may_skip=may_skip, **kwargs)
    return model


@register_model
def iresnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return InsightFace's network of 18 layers."""
    return _iresnet("iresnet18", pretrained, **kwargs)


@register_model
def iresnet34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return InsightFace's network of 34 layers."""
    return _iresnet("iresnet34", pretrained, **kwargs)


@register_model
def iresnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return InsightFace's network of 50 layers."""
    return _iresnet("iresnet50", pretrained, **kwargs)


@register_model
def iresnet100(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return InsightFace's network of 100 layers."""
    return _iresnet("iresnet100", pretrained, **kwargs)


@register_model
def ir18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return CVLface's network of 18 layers."""
    return _iresnet("ir18", pretrained, **kwargs)


@register_model
def ir34(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return CVLface's network of 34 layers."""
    return _iresnet("ir34", pretrained, **kwargs)


@register_model
def ir50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return CVLface's network of 50 layers."""
    return _iresnet("ir50", pretrained, **kwargs)


@register_model
def ir101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Return CVLface's network of 101 layers, which InsightFace calls 100."""
    return _iresnet("ir101", pretrained, **kwargs)
