"""A whole training job on drawn faces beside a bare loop, in processes of their own: for a GPU, where steps are short.

    python -m bench.training_job

The bare loop has one batch on the device, and forward, loss, backward, clipping and optimiser: as it is, and compiled.
The job is what users start; its epochs have random and hard negatives in turns. Prints one line of JSON.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from bench.inputs import ROOT, job_environment
from lib import device as devices
from lib import storage
from lib.faces import table
from lib.recognition.model import EmbeddingModel, ModelSpec, normalized_images
from lib.training import loop, ray_train
from lib.training.history import read_rows
from lib.training.losses import batch_softmax_loss
from lib.training.settings import TrainConfig
from lib.training.step import TrainingStep
from lib.training.train_job import train

STAMPS_NAME = "stamps.json"
NUM_WARM, NUM_TIMED = 10, 40
"""Steps of the bare loop."""


class StampedWorker(loop.Worker):
    """A worker that notes when it has come how far, and has random and hard negatives in turns."""

    def __init__(self, *arguments: Any) -> None:
        self._stamps = {"worker": time.time()}
        super().__init__(*arguments)
        self._stamps["ready"] = time.time()

    def run(self) -> None:
        """Train, and write down the times."""
        super().run()
        self._stamps["last_epoch"] = time.time()
        assert isinstance(self.step, FirstStep)
        assert self.step.done_at is not None
        self._stamps["first_step"] = self.step.done_at
        (Path(self.config.run_url) / STAMPS_NAME).write_text(json.dumps(self._stamps))

    def compile(self) -> None:
        """Compile, and note when it is done."""
        super().compile()
        self._stamps["compiled"] = time.time()

    def train_epoch(self) -> loop.EpochSteps:
        """Train with random and with hard negatives in turns."""
        policy = "random" if self.state.progress.epoch % 2 else "hard"
        self.state.progress = dataclasses.replace(self.state.progress, negatives=policy)
        return super().train_epoch()


class FirstStep(TrainingStep):
    """A step that notes when the first one was done."""

    done_at: float | None = None

    def __call__(self, *arguments: Any, **named: Any) -> None:
        super().__call__(*arguments, **named)
        if self.done_at is None:
            self.settle()
            self.done_at = time.time()


def train_stamped_worker(settings: dict[str, Any]) -> None:
    """Take the place of the function that Ray Train calls on every worker."""
    loop.Worker, loop.TrainingStep = StampedWorker, FirstStep  # type: ignore[misc, assignment]
    ray_train.train_worker(settings)


def write_faces(faces: Path, options: argparse.Namespace) -> None:
    """Write a faces table of noisy pictures, which take as long to decode as photos."""
    rng, size = np.random.default_rng(0), options.image_size
    jpegs = []
    for _ in range(300):
        picture = cv2.resize(rng.integers(20, 220, (30, 30, 3), np.uint8), (size, size), interpolation=cv2.INTER_CUBIC)
        noisy = (picture + rng.normal(0, 3, picture.shape)).clip(0, 255).astype(np.uint8)
        jpegs.append(cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes())
    for split, people in (("train", options.people), ("val", 40)):
        rows = [
            {
                "photo": f"{split}/{person}/{photo}.jpg",
                "identity": f"{split} {person}",
                "status": table.ALIGNED,
                "crop": jpegs[rng.integers(len(jpegs))],
            }
            for person in range(people)
            for photo in range(options.photos)
        ]
        url = storage.join(str(faces), f"split={split}", "part-000000.parquet")
        storage.write_parquet(url, table.faces_table(rows, "{}"))
    success = {"run_id": "bench", "fingerprint": {"id": "bench", "image_size": size}, "counts": {}}
    storage.write_json(storage.join(str(faces), table.SUCCESS_NAME), success)


def settings(data: Path, options: argparse.Namespace) -> TrainConfig:
    """Return the settings of the job."""
    return TrainConfig.of(
        data=str(data),
        name="timed",
        cache_dir=str(data / "cache"),
        init="none",
        backbone=options.backbone,
        image_size=options.image_size,
        negatives="hard",
        gpus=options.gpus,
        compile=options.compile,
        batch_size=options.batch_size,
        epochs=options.epochs,
        triplets_per_epoch=options.steps * options.batch_size,
        lr=1e-4,
        val_photos=400,
        val_pairs=2000,
    )


def run_bare(options: argparse.Namespace) -> dict[str, float]:
    """Return the images a second of the bare loop, as it is and compiled."""
    device = torch.device("cuda" if options.gpus else "cpu")
    devices.prepare(device)
    precision = devices.chosen_precision("auto", device)
    model = EmbeddingModel(ModelSpec(backbone=options.backbone, image_size=options.image_size)).train()
    model.to(device).to(memory_format=torch.channels_last)
    optimizer = devices.adamw([{"params": list(model.parameters())}], device, lr=1e-4)
    size = options.image_size
    crops = torch.randint(0, 255, (options.batch_size, size, size, 3), dtype=torch.uint8, device=device)
    labels = torch.arange(options.batch_size, device=device) // 4

    def steps(forward: Any, count: int) -> float:
        _wait(device)
        began = time.perf_counter()
        for _ in range(count):
            with devices.autocast(device, precision):
                embeddings = forward(normalized_images(crops, model.spec))
            batch_softmax_loss(embeddings, labels, temperature=0.1).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        _wait(device)
        return count * options.batch_size / (time.perf_counter() - began)

    speeds = {}
    for name, forward in (("bare", model), ("compiled", torch.compile(model, dynamic=False))):
        if name == "compiled" and options.compile == "off":
            continue
        began = time.perf_counter()
        steps(forward, NUM_WARM if options.gpus else 1)
        speeds[f"{name}_warm_s"] = round(time.perf_counter() - began, 1)
        speeds[name] = round(steps(forward, NUM_TIMED if options.gpus else 3), 1)
    return speeds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def part(name: str, folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Run a part of this file as a process and return its result."""
    command = [sys.executable, "-m", "bench.training_job", *arguments, "--part", name, "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=job_environment(), cwd=ROOT, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--gpus", type=int, default=int(has_gpu), choices=[0, 1])
    parser.add_argument("--backbone", default="convnext_tiny" if has_gpu else "convnext_atto")
    parser.add_argument("--image-size", type=int, default=240 if has_gpu else 112)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--compile", default="on" if has_gpu else "off", choices=["on", "off"])
    parser.add_argument("--people", type=int, default=500)
    parser.add_argument("--photos", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=6, help="the first with random and hard negatives are not timed")
    parser.add_argument("--steps", type=int, default=200 if has_gpu else 6, help="of an epoch")
    parser.add_argument("--part", choices=["job", "bare"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()

    if options.part == "bare":
        print(json.dumps(run_bare(options)))
        return
    if options.part == "job":
        ray_train.train_worker = train_stamped_worker
        print(json.dumps(train(settings(Path(options.folder), options))))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_faces(data / "faces", options)
        began = time.time()
        part("job", data, sys.argv[1:])
        ended = time.time()
        config = settings(data, options)
        stamps = json.loads((Path(config.run_url) / STAMPS_NAME).read_text())
        rows = read_rows(config.run_url)
        bare = part("bare", data, sys.argv[1:])
    best = max(bare["bare"], bare.get("compiled", 0))
    timed = {policy: rows[first + 2 :: 2] for first, policy in enumerate(("random", "hard"))}
    speeds = {policy: float(np.median([row["images_per_s"] for row in them])) for policy, them in timed.items()}
    print(
        json.dumps(
            {
                "bench": "training_job",
                "device": devices.device_name(torch.device("cuda" if options.gpus else "cpu")),
                "images_per_s": {policy: round(speed, 1) for policy, speed in speeds.items()},
                "bare": bare,
                "job_to_bare": {policy: round(speed / best, 3) for policy, speed in speeds.items()},
                **{
                    share: {
                        policy: round(float(np.median([row[share] for row in them])), 4)
                        for policy, them in timed.items()
                    }
                    for share in ("data_wait_share", "store_wait_share")
                },
                "seconds_until": {name: round(stamp - began, 1) for name, stamp in stamps.items()},
                "seconds_from_last_epoch_to_end": round(ended - stamps["last_epoch"], 1),
                "seconds": round(ended - began, 1),
                "cpus": os.cpu_count(),
                **{name: value for name, value in vars(options).items() if name not in ("part", "folder")},
            }
        )
    )


if __name__ == "__main__":
    main()
