"""How much of a bare PyTorch loop's speed the whole training job keeps, and what hard negatives cost.

    python -m bench.train_speed

Three rounds, in alternation: a bare loop over tensors that are already in memory, the job with random negatives, the
job with hard ones. Prints one line of JSON with the medians. Faces are those of drawn people.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from bench.inputs import drawn, run_job
from lib.recognition.model import EmbeddingModel, ModelSpec
from lib.training.losses import batch_triplet_loss, triplet_margin_loss

BATCH_SIZE = 96
PHOTOS_PER_PERSON = 4


def bare_rate(backbone: str, image_size: int, batch: str, num_steps: int) -> float:
    """Return the images/s of forward, loss, backward and AdamW on one batch that stays in memory."""
    torch.manual_seed(0)
    model = EmbeddingModel(ModelSpec(backbone=backbone, image_size=image_size)).to(memory_format=torch.channels_last)
    images = torch.randn(BATCH_SIZE, 3, image_size, image_size).to(memory_format=torch.channels_last)
    labels = torch.arange(BATCH_SIZE) // PHOTOS_PER_PERSON
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    model.train()
    began = 0.0
    for step in range(num_steps + 3):
        if step == 3:
            began = time.perf_counter()
        embeddings = model(images)
        if batch == "identities":
            loss = batch_triplet_loss(embeddings, labels, margin=0.2).mean
        else:
            loss = triplet_margin_loss(*embeddings.chunk(3), margin=0.2).mean
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return num_steps * BATCH_SIZE / (time.perf_counter() - began)


def job_rows(data: Path, name: str, options: argparse.Namespace, negatives: str) -> list[dict[str, Any]]:
    """Train and return the history without its first epoch, in which everything is read for the first time."""
    run_job(
        "train.py",
        *("--data", str(data), "--name", name, "--cache-dir", str(data / "cache"), "--init", "none"),
        *("--backbone", options.backbone, "--image-size", str(options.image_size), "--batch", options.batch),
        *("--negatives", negatives, "--batch-size", str(BATCH_SIZE), "--epochs", str(options.epochs)),
        *("--triplets-per-epoch", str(options.triplets_per_epoch)),
        *("--candidates", "2000", "--refresh-fraction", "0.1", "--val-photos", "200", "--val-pairs", "200"),
    )
    return pq.read_table(data / "runs" / name / "history.parquet").to_pylist()[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="convnext_atto")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--batch", default="triplets", choices=["triplets", "identities"])
    parser.add_argument("--identities", type=int, default=180)
    parser.add_argument("--photos-per-identity", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--triplets-per-epoch", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    rates: dict[str, list[float]] = {"bare": [], "random": [], "hard": []}
    shares: dict[str, list[float]] = {"data_wait_share": [], "store_wait_share": [], "refresh_share": []}
    with tempfile.TemporaryDirectory() as folder:
        data = drawn(Path(folder), options.identities, options.photos_per_identity)
        run_job("preprocess.py", "--data", str(data))
        for number in range(options.rounds):
            rates["bare"].append(bare_rate(options.backbone, options.image_size, options.batch, num_steps=20))
            for negatives in ("random", "hard"):
                rows = job_rows(data, f"{negatives} {number}", options, negatives)
                rates[negatives].append(statistics.median(row["images_per_s"] for row in rows))
                shares["data_wait_share"] += [row["data_wait_share"] for row in rows]
                if negatives == "hard":
                    shares["store_wait_share"] += [row["store_wait_share"] for row in rows]
                    shares["refresh_share"] += [row["refresh_s"] / row["seconds"] for row in rows]
            print({name: [round(value, 1) for value in values] for name, values in rates.items()}, file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in {**rates, **shares}.items()}
    ratios = [(job / bare, hard / job) for bare, job, hard in zip(*rates.values(), strict=True)]
    result = {
        **{name: round(value, 4) for name, value in medians.items()},
        "job_to_bare": round(statistics.median(a for a, _ in ratios), 3),
        "hard_to_random": round(statistics.median(b for _, b in ratios), 3),
        **vars(options),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
