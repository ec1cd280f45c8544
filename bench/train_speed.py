"""How much of a bare PyTorch loop's speed the whole training job keeps, and what hard negatives cost.

    python -m bench.train_speed

Machines here change their speed from second to second, so nothing is compared that lies a minute apart: the worker of a
real job (Ray, store, loader, history, checkpoints) makes some steps of a bare loop over tensors in memory after every
few of its own, and its epochs have random and hard negatives in turns. Prints one line of JSON with the medians over
all such pairs of blocks. Faces are those of drawn people.
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.inputs import drawn, run_job
from lib.recognition.model import EmbeddingModel
from lib.training import loop, ray_train
from lib.training.batches import ASK_AHEAD, LOAD_AHEAD
from lib.training.losses import batch_triplet_loss, triplet_margin_loss
from lib.training.settings import TrainConfig
from lib.training.step import TrainingStep
from lib.training.train_job import train

BATCH_SIZE = 96
NUM_STEPS = 6
"""Of a block, the job's or the bare loop's."""
NUM_UNTIMED = LOAD_AHEAD + ASK_AHEAD + 1
"""Steps of the job after a bare block: their batches were loaded while that ran."""
NUM_BLOCKS = 3
"""Of each kind in an epoch."""
TIMES_NAME = "times.json"


class ObservedStep(TrainingStep):
    """A step after which something is done."""

    after: Callable[[], None]

    def __call__(self, *arguments: Any, **named: Any) -> None:
        super().__call__(*arguments, **named)
        self.after()


class TimedWorker(loop.Worker):
    """A worker that makes bare steps between its own and takes the time of both."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        torch.manual_seed(0)
        spec = self.state.model.spec
        size, batch_size = spec.image_size, BATCH_SIZE
        self._bare_model = EmbeddingModel(spec).to(memory_format=torch.channels_last).train()
        self._bare_optimizer = torch.optim.AdamW(self._bare_model.parameters(), lr=3e-4)
        self._images = torch.randn(batch_size, 3, size, size).to(memory_format=torch.channels_last)
        self._labels = torch.arange(batch_size) // self.config.sampling.photos_per_person
        self._times: dict[str, list[float]] = {"random": [], "hard": [], "bare random": [], "bare hard": []}
        self._shares: dict[str, list[float]] = {"data_wait": [], "store_wait": [], "refresh": []}
        assert isinstance(self.step, ObservedStep)
        self.step.after = self._count_step

    def run(self) -> None:
        """Train, and write down the times."""
        super().run()
        (Path(self.config.run_url) / TIMES_NAME).write_text(json.dumps({**self._times, **self._shares}))

    def train_epoch(self) -> loop.EpochSteps:
        """Train with random and with hard negatives in turns."""
        before = self.state.progress.negatives
        self._policy = "hard" if self.state.progress.epoch % 2 else "random"
        self.state.progress = dataclasses.replace(self.state.progress, negatives=self._policy)
        self._num_own, self._bare_s = 0, 0.0
        steps = super().train_epoch()
        self.state.progress = dataclasses.replace(self.state.progress, negatives=before)
        self._own_s = steps.seconds["train"] - self._bare_s
        if self._policy == "hard":
            self._shares["data_wait"].append(steps.seconds["data_wait"] / self._own_s)
            self._shares["store_wait"].append(steps.seconds["store_wait"] / self._own_s)
        return steps

    def _count_step(self) -> None:
        self._num_own += 1
        in_round = self._num_own % (NUM_UNTIMED + NUM_STEPS)
        if in_round == NUM_UNTIMED:
            self._block_began = time.perf_counter()
        elif in_round == 0:
            ended = time.perf_counter()
            for _ in range(NUM_STEPS):
                self._bare_step()
            bare_s = time.perf_counter() - ended
            self._bare_s += bare_s
            if self.state.progress.epoch > 2:  # in the first of each kind everything is met for the first time
                self._times[self._policy].append(ended - self._block_began)
                self._times[f"bare {self._policy}"].append(bare_s)

    def _bare_step(self) -> None:
        embeddings = self._bare_model(self._images)
        if self.config.sampling.batch == "identities":
            loss = batch_triplet_loss(embeddings, self._labels, margin=self.config.objective.margin).mean
        else:
            loss = triplet_margin_loss(*embeddings.chunk(3), margin=self.config.objective.margin).mean
        self._bare_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._bare_optimizer.step()

    def refresh_store(self, was_used_N: np.ndarray) -> float:
        """Refresh, and note which share of the epoch it took."""
        seconds = super().refresh_store(was_used_N)
        if self._policy == "hard":
            self._shares["refresh"].append(seconds / (self._own_s + seconds))
        return seconds


def train_timed_worker(settings: dict[str, Any]) -> None:
    """Take the place of the function that Ray Train calls on every worker."""
    loop.Worker, loop.TrainingStep = TimedWorker, ObservedStep  # type: ignore[misc, assignment]
    ray_train.train_worker(settings)


def times_of_job(data: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Train, and return the seconds of all blocks and the shares of each epoch."""
    num_steps = NUM_BLOCKS * (NUM_UNTIMED + NUM_STEPS)
    config = TrainConfig.of(
        data=str(data),
        name="timed",
        cache_dir=str(data / "cache"),
        init="none",
        backbone=options.backbone,
        image_size=options.image_size,
        batch=options.batch,
        negatives="hard",
        batch_size=BATCH_SIZE,
        epochs=2 * (1 + options.rounds),
        triplets_per_epoch=num_steps * BATCH_SIZE // (3 if options.batch == "triplets" else 1),
        candidates=2000,
        lr=1e-4,  # hard negatives from random weights: no collapse
        val_photos=200,
        val_pairs=200,
    )
    ray_train.train_worker = train_timed_worker
    train(config)
    return json.loads((Path(config.run_url) / TIMES_NAME).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="convnext_atto")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--batch", default="triplets", choices=["triplets", "identities"])
    parser.add_argument("--identities", type=int, default=180)
    parser.add_argument("--photos-per-identity", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=4, help=f"of {NUM_BLOCKS} pairs of blocks for either negatives")
    options = parser.parse_args()

    os.environ.pop("RAY_ADDRESS", None)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with tempfile.TemporaryDirectory() as folder:
        data = drawn(Path(folder), options.identities, options.photos_per_identity)
        run_job("preprocess.py", "--data", str(data))
        times = times_of_job(data, options)
    to_bare = {
        policy: [bare / own for bare, own in zip(times[f"bare {policy}"], times[policy], strict=True)]
        for policy in ("random", "hard")
    }
    medians = {policy: statistics.median(ratios) for policy, ratios in to_bare.items()}
    print(
        json.dumps(
            {
                "bench": "train_speed",
                "images_per_s": round(NUM_STEPS * BATCH_SIZE / statistics.median(times["random"]), 1),
                "job_to_bare": round(medians["random"], 3),
                "hard_to_bare": round(medians["hard"], 3),
                "hard_to_random": round(medians["hard"] / medians["random"], 3),
                **{
                    f"{name}_share": round(statistics.median(times[name]), 4)
                    for name in ("data_wait", "store_wait", "refresh")
                },
                "ratios": {policy: [round(ratio, 3) for ratio in sorted(ratios)] for policy, ratios in to_bare.items()},
                **vars(options),
            }
        )
    )


if __name__ == "__main__":
    main()
