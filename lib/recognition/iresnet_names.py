"""Recognises which iResNet a state dict holds, and renames its tensors as in `lib.recognition.iresnet`.

InsightFace names stages (`layer1.0.conv1`), CVLface and AdaFace number all blocks (`body.0.res_layer.1`). Their
networks differ in one place. InsightFace's first block halves its input by a convolution. The others take every second
pixel.
"""

import re
from collections.abc import Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # takes seconds, and callers that need only names should not wait

Tensors = dict[str, "torch.Tensor"]

DEPTHS: Mapping[str, tuple[int, ...]] = {
    "18": (2, 2, 2, 2),
    "34": (3, 4, 6, 3),
    "50": (3, 4, 14, 3),
    "100": (3, 13, 30, 3),
}
"""Blocks of the four stages, by the number of layers."""

LAYERS = {f"iresnet{layers}": layers for layers in DEPTHS} | {
    f"ir{'101' if layers == '100' else layers}": layers for layers in DEPTHS
}
"""The backbones, with the key of each in `DEPTHS`."""

_CVLFACE_FIRST = "input_layer.0.weight"
_CVLFACE_OUTER = {
    "input_layer.0": "conv1",
    "input_layer.1": "bn1",
    "input_layer.2": "prelu",
    "output_layer.0": "bn2",
    "output_layer.3": "fc",
    "output_layer.4": "features",
}
_CVLFACE_INNER = {
    **{f"res_layer.{n}": name for n, name in enumerate(("bn1", "conv1", "bn2", "prelu", "conv2", "bn3"))},
    "shortcut_layer.0": "downsample.0",
    "shortcut_layer.1": "downsample.1",
}


def under_our_names(tensors: Tensors) -> Tensors:
    """Return CVLface's tensors under InsightFace's names, without prefix and extra tensors. Others stay as they are.

    The last BatchNorm of CVLface has no weight and no bias, which InsightFace writes as ones and zeros.
    """
    prefixes = [name.removesuffix(_CVLFACE_FIRST) for name in tensors if f".{name}".endswith(f".{_CVLFACE_FIRST}")]
    if len(prefixes) != 1:
        return tensors
    own = {name.removeprefix(prefixes[0]): each for name, each in tensors.items() if name.startswith(prefixes[0])}
    num_blocks = 1 + max((int(name.split(".")[1]) for name in own if re.match(r"body\.\d+\.", name)), default=-1)
    starts = next(
        ([0, *accumulate(depths)] for depths in DEPTHS.values() if sum(depths) == num_blocks), [0, num_blocks]
    )
    renamed = {_our_name(name, starts): tensor for name, tensor in own.items()}
    mean = renamed.get("features.running_mean")
    if mean is not None:
        renamed.setdefault("features.weight", mean.new_ones(mean.shape))
        renamed.setdefault("features.bias", mean.new_zeros(mean.shape))
    return renamed


def _our_name(name: str, starts: list[int]) -> str:
    """Return our name of one of CVLface's tensors. Stage s + 1 begins with block `starts[s]`."""
    place, _, kind = name.rpartition(".")
    if place in _CVLFACE_OUTER:
        return f"{_CVLFACE_OUTER[place]}.{kind}"
    found = re.fullmatch(r"body\.(\d+)\.(.+)", place)
    if found is None or found[2] not in _CVLFACE_INNER:
        return name
    block = int(found[1])
    stage = sum(block >= start for start in starts[:4])
    return f"layer{stage}.{block - starts[stage - 1]}.{_CVLFACE_INNER[found[2]]}.{kind}"


def backbone_of(tensors: Tensors) -> str | None:
    """Return which of our backbones tensors of `under_our_names` are for, whatever prefix they have; None for none."""
    blocks = {(int(found[1]), int(found[2])) for name in tensors if (found := _BLOCK.search(name))}
    depths = tuple(sum(stage == wanted for stage, _ in blocks) for wanted in range(1, 5))
    if not any(name.endswith("features.running_mean") for name in tensors):
        return None
    is_insightface = any(name.endswith("layer1.0.downsample.0.weight") for name in tensors)
    fitting = (name for name, layers in LAYERS.items() if DEPTHS[layers] == depths)
    return next((name for name in fitting if name.startswith("iresnet") == is_insightface), None)


_BLOCK = re.compile(r"(?:^|\.)layer([1-4])\.(\d+)\.prelu\.weight$")
