"""The plain script that preprocessing is compared with: one process, Pillow, batch-face one photo at a time.

It finds the face of the highest score, crops to its box, rotates the crop by the angle between the eyes, resizes it to
fit 240x240, pads with black and saves a JPEG.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

MAX_WIDTH, SIDE = 1024, 240


def run(photos: Sequence[Path], weights: Path, output: Path) -> float:
    """Preprocess the photos and return photos per second."""
    from batch_face import RetinaFace

    detector = RetinaFace(gpu_id=-1, model_path=str(weights), network="mobilenet")
    started = time.perf_counter()
    for number, path in enumerate(photos):
        picture = Image.open(path).convert("RGB")
        if picture.width > MAX_WIDTH:
            picture = picture.resize((MAX_WIDTH, round(picture.height * MAX_WIDTH / picture.width)))
        found = detector(np.asarray(picture), threshold=0.5)
        if not found:
            continue  # the original stops here with an error
        box, landmarks, _ = max(found, key=lambda face: face[2])
        left, top, right, bottom = (int(corner) for corner in box)
        crop = picture.crop((left, top, right, bottom))
        (left_x, left_y), (right_x, right_y) = landmarks[:2]
        crop = crop.rotate(float(np.degrees(np.arctan2(right_y - left_y, right_x - left_x))))
        scale = SIDE / max(crop.size)
        crop = crop.resize((max(1, round(crop.width * scale)), max(1, round(crop.height * scale))))
        padded = Image.new("RGB", (SIDE, SIDE))
        padded.paste(crop, ((SIDE - crop.width) // 2, (SIDE - crop.height) // 2))
        padded.save(output / f"{number}.jpg")
    return len(photos) / (time.perf_counter() - started)
