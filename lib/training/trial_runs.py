"""Runs the model on black images before the training, to compile it or to find the largest batch that fits."""

import torch

from lib import device as devices
from lib.recognition.compiling import repeated_blocks
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
