"""RetinaFace with MobileNet-0.25 as a torch module, loaded from the packaged ONNX file or from the original's .pth.

The network is that of Deng et al. 2020, "RetinaFace: Single-Shot Multi-Level Face Localisation", as in its public
PyTorch implementation, with the batch norms folded into the convolutions.

Shape suffixes: B pictures, C channels, A anchors.
"""

import io
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lib.errors import UserError

_SLOPE = 0.1
_BATCH_NORM_EPSILON = 1e-5
# Input and output channels and stride of the blocks after the first convolution, by stage.
_STAGES = (
    ((8, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)),
    ((64, 128, 2), (128, 128, 1), (128, 128, 1), (128, 128, 1), (128, 128, 1), (128, 128, 1)),
    ((128, 256, 2), (256, 256, 1)),
)
_WIDTH = 64
_ANCHORS_A_PLACE = 2


class _Context(nn.Module):
    """The context module ("SSH") that follows each level of the pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3X3 = nn.Conv2d(_WIDTH, _WIDTH // 2, 3, padding=1)
        self.conv5X5_1 = nn.Conv2d(_WIDTH, _WIDTH // 4, 3, padding=1)
        self.conv5X5_2 = nn.Conv2d(_WIDTH // 4, _WIDTH // 4, 3, padding=1)
        self.conv7X7_2 = nn.Conv2d(_WIDTH // 4, _WIDTH // 4, 3, padding=1)
        self.conv7x7_3 = nn.Conv2d(_WIDTH // 4, _WIDTH // 4, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        shared = functional.leaky_relu(self.conv5X5_1(features), _SLOPE)
        deeper = functional.leaky_relu(self.conv7X7_2(shared), _SLOPE)
        return torch.cat([self.conv3X3(features), self.conv5X5_2(shared), self.conv7x7_3(deeper)], dim=1).relu()


class RetinaFaceNet(nn.Module):
    """BGR pictures [B, 3, H, W], with the mean subtracted, to box offsets, probabilities and landmark offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        for number, blocks in enumerate(_STAGES):
            convolutions = [nn.Conv2d(3, 8, 3, stride=2, padding=1)] if number == 0 else []
            for channels_in, channels_out, stride in blocks:
                convolutions.append(nn.Conv2d(channels_in, channels_in, 3, stride, padding=1, groups=channels_in))
                convolutions.append(nn.Conv2d(channels_in, channels_out, 1))
            self.stages.append(nn.ModuleList(convolutions))
        self.output = nn.ModuleList(nn.Conv2d(blocks[-1][1], _WIDTH, 1) for blocks in _STAGES)
        self.merge = nn.ModuleList(nn.Conv2d(_WIDTH, _WIDTH, 3, padding=1) for _ in range(2))
        self.context = nn.ModuleList(_Context() for _ in _STAGES)
        self.box_heads, self.class_heads, self.landmark_heads = (
            nn.ModuleList(nn.Conv2d(_WIDTH, _ANCHORS_A_PLACE * width, 1) for _ in _STAGES) for width in (4, 2, 10)
        )

    def forward(self, pictures_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return box offsets [B, A, 4], probabilities [B, A, 2] and landmark offsets [B, A, 10]."""
        features, levels = pictures_BCHW, []
        for convolutions, output in zip(self.stages, self.output, strict=True):
            for convolution in convolutions:  # type: ignore[attr-defined]
                features = functional.leaky_relu(convolution(features), _SLOPE)
            levels.append(functional.leaky_relu(output(features), _SLOPE))
        for level in (1, 0):
            above = functional.interpolate(levels[level + 1], size=levels[level].shape[2:], mode="nearest")
            levels[level] = functional.leaky_relu(self.merge[level](levels[level] + above), _SLOPE)
        levels = [context(level) for context, level in zip(self.context, levels, strict=True)]
        offsets, classes, points = (
            torch.cat([_rows(head(level), width) for head, level in zip(heads, levels, strict=True)], dim=1)
            for heads, width in ((self.box_heads, 4), (self.class_heads, 2), (self.landmark_heads, 10))
        )
        return offsets, classes.softmax(dim=-1), points


def _rows(outputs_BCHW: Tensor, width: int) -> Tensor:
    return outputs_BCHW.permute(0, 2, 3, 1).reshape(len(outputs_BCHW), -1, width)


def load_network(weights: bytes, *, is_torch: bool = False) -> RetinaFaceNet:
    """Return the network in eval mode. `weights` is the content of an .onnx file, or of a .pth file if `is_torch`.

    Raises:
        UserError: the weights belong to another network, or are no plain tensors.
    """
    network = RetinaFaceNet()
    found = list(_of_state(_torch_state(weights)) if is_torch else _of_onnx(weights))
    wanted = _convolutions(network)
    shapes_found = [(weight.shape, bias.shape) for weight, bias in found]
    shapes_wanted = [(each.weight.shape, each.bias.shape) for each in wanted if each.bias is not None]
    if shapes_found != shapes_wanted:
        raise UserError(
            f"--detector-weights is no RetinaFace MobileNet-0.25: it has {len(found)} convolutions, "
            f"{len(wanted)} of certain shapes are expected"
        )
    with torch.no_grad():
        for convolution, (weight, bias) in zip(wanted, found, strict=True):
            convolution.weight.copy_(weight)
            convolution.bias.copy_(bias)  # type: ignore[union-attr]
    return network.eval().requires_grad_(False)


def _convolutions(network: RetinaFaceNet) -> list[nn.Conv2d]:
    """Return all convolutions in the order in which the weights are read."""
    parts: list[Any] = [
        *(network.stages, network.output, network.merge, network.context),
        *(network.box_heads, network.class_heads, network.landmark_heads),
    ]
    return [each for part in parts for each in part.modules() if isinstance(each, nn.Conv2d)]


_PREFIXES = (
    *("body.", "fpn.output1", "fpn.output2", "fpn.output3", "fpn.merge1", "fpn.merge2"),
    *("ssh1", "ssh2", "ssh3", "BboxHead", "ClassHead", "LandmarkHead"),
)


def _of_state(state: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield weight and bias of each convolution of the original's state, with its batch norm folded in."""
    for prefix in _PREFIXES:
        for name in [name for name in state if name.startswith(prefix) and state[name].ndim == 4]:
            weight, stem = state[name].float(), name.removesuffix(".weight")
            if f"{stem}.bias" in state:
                yield weight, state[f"{stem}.bias"].float()
                continue
            parent, _, place = stem.rpartition(".")
            norm = f"{parent}.{int(place) + 1}" if place.isdigit() else ""
            if f"{norm}.running_var" not in state:
                raise UserError(f"--detector-weights holds no batch norm for {name}: another network")
            scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + _BATCH_NORM_EPSILON).sqrt()
            yield (
                weight * scale.view(-1, 1, 1, 1),
                state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale,
            )


_ONNX_PREFIXES = (
    *("/fx/", "/fpn/output1/", "/fpn/output2/", "/fpn/output3/", "/fpn/merge1/", "/fpn/merge2/"),
    *("/ssh1/", "/ssh2/", "/ssh3/", "/bbox_head/", "/class_head/", "/landmark_head/"),
)


def _of_onnx(weights: bytes) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield weight and bias of each convolution of the exported network, which has its batch norms folded in."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load_from_string(weights).graph
        tensors = {each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in graph.initializer}
    except (DecodeError, ValueError, TypeError) as error:
        raise UserError(f"--detector-weights is neither ONNX nor a PyTorch file: {error}") from error
    for prefix in _ONNX_PREFIXES:
        for node in graph.node:
            # A convolution that is used twice is listed twice, the second time without weights.
            if node.op_type == "Conv" and node.name.startswith(prefix) and node.input[1] in tensors:
                yield tensors[node.input[1]].float(), tensors[node.input[2]].float()


def _torch_state(weights: bytes) -> dict[str, Tensor]:
    try:
        state = torch.load(io.BytesIO(weights), map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError) as error:
        raise UserError(
            "--detector-weights is no PyTorch file of plain tensors, and other files are never loaded: choose the "
            ".pth or .onnx file of RetinaFace MobileNet-0.25"
        ) from error
