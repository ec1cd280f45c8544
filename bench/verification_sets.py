"""How fast a verification set is embedded, against the bare forward of the same model on pixels in memory.

    .venv/bin/python -m bench.verification_sets --num-images 384

Both take turns in one process, and the median of the ratios counts.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass

import cv2
import numpy as np
import tyro

from lib.recognition.embedder import load_embedder
from lib.recognition.encoded_crops import BATCH_SIZE, decoded_square, embed_images
from lib.recognition.model import EmbeddingModel, save_model
from lib.recognition.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Compare reading, decoding and embedding with embedding alone."""

    num_images: int = 384
    backbone: str = "resnet18"
    rounds: int = 5


def drawn(num_images: int) -> list[bytes]:
    """Return smooth coloured pictures as JPEG of the size that the sets have."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (num_images, 14, 14, 3)).astype(np.uint8)
    return [
        cv2.imencode(".jpg", cv2.resize(each, (112, 112), interpolation=cv2.INTER_CUBIC))[1].tobytes() for each in small
    ]


def main(settings: Settings) -> None:
    """Print the rates and the ratio."""
    images = drawn(settings.num_images)
    crops_NHWC = np.stack([decoded_square(image) for image in images])  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        save_model(EmbeddingModel(ModelSpec(backbone=settings.backbone, image_size=112)), folder)
        embedders = {flip: load_embedder(folder, flip=flip) for flip in (False, True)}
    for flip, embedder in embedders.items():
        ratios, rates = [], []
        for round_number in range(settings.rounds + 1):
            started = time.perf_counter()
            for crops in np.split(crops_NHWC, range(BATCH_SIZE, len(crops_NHWC), BATCH_SIZE)):
                embedder.embed(crops)
            bare_s = time.perf_counter() - started
            started = time.perf_counter()
            embed_images(embedder, images)
            whole_s = time.perf_counter() - started
            if round_number:  # the first one warms up
                ratios.append(bare_s / whole_s)
                rates.append(len(images) / whole_s)
        print(
            f"flip {flip}: {statistics.median(rates):.1f} images/s, ratio to the bare forward "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )


if __name__ == "__main__":
    main(tyro.cli(Settings))
