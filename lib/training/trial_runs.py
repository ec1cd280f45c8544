"""Runs the model on black images before the training, to compile it or to find the largest batch that fits."""

import torch
from torch import nn

from lib import device as devices
from lib.recognition.model import normalized_images
from lib.training import collective
from lib.training.settings import TrainConfig
from lib.training.state import TrainingState

COMPILING_PAYS = 500_000
"""Images left to train on from which compiling pays. On an H100, convnext_tiny at 240 pixels gains 0.1 ms an image, and
compiling takes under a minute."""

BYTES_A_WEIGHT = 16
"""Copies of the weights in the optimiser's two averages, the averaged weights, and a step of the optimiser."""


def compile_model(
    state: TrainingState, config: TrainConfig, device: torch.device, *, num_images: int, left: int
) -> bool:
    """Compile the model for batches of `num_images` if that pays for `left` more images; return whether it did."""
    with state.kept():
        return devices.compile_module(
            state.model,
            config.run.compile,
            device,
            lambda: _run(state, config, device, num_images),
            pays=left >= COMPILING_PAYS,
            parts=repeated_blocks(state.model.backbone),
        )


def images_that_fit(state: TrainingState, config: TrainConfig, device: torch.device) -> int | None:
    """Return the largest batch that fits into the memory of every worker's GPU; None on CPUs."""
    num_weights = sum(parameter.numel() for parameter in state.model.parameters())
    with state.kept():
        largest = devices.largest_batch(
            lambda num_images: _run(state, config, device, num_images), device, reserved=BYTES_A_WEIGHT * num_weights
        )
    devices.free_memory()
    return None if largest is None else min(collective.broadcast(collective.gathered(largest)))


def _run(state: TrainingState, config: TrainConfig, device: torch.device, num_images: int) -> None:
    size = state.model.spec.image_size
    crops_NHWC = torch.zeros((num_images, size, size, 3), dtype=torch.uint8, device=device)
    with devices.autocast(device, devices.chosen_precision(config.run.precision, device)):
        embeddings_ND = state.model(normalized_images(crops_NHWC, state.model.spec))
    embeddings_ND.sum().backward()


def repeated_blocks(backbone: nn.Module) -> list[nn.Module]:
    """Return the blocks of a backbone, such as a ConvNeXt or a transformer; none if other parts hold many weights.

    A block is a member of a sequence of modules of one class that is not torch's own, and has none of these inside.
    """
    blocks: list[nn.Module] = []

    def collect(module: nn.Module) -> bool:
        found = False
        for child in module.children():
            found = collect(child) or found
        members = list(module.children())
        is_sequence = isinstance(module, nn.Sequential | nn.ModuleList) and len({type(each) for each in members}) == 1
        if not found and is_sequence and not type(members[0]).__module__.startswith("torch."):
            blocks.extend(members)
            return True
        return found

    collect(backbone)
    in_blocks = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    return blocks if 2 * in_blocks > sum(parameter.numel() for parameter in backbone.parameters()) else []
