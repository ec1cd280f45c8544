"""What does the feature store add to batches of people x photos? The whole training job, with the same steps each time.

All arms are `jobs/train.py` with its defaults but for what their names say, on the people and the judging pairs of
`bench/training_recipes.py`: the yardstick draws its people at random, another fills three quarters of a batch with
people whom the stored features confuse, the third lets stored features of other photos join as negatives. Mining begins
with the first epoch. Prints Markdown rows and a line of JSON. Run it as `python -m bench.mining_recipes` (half an hour
a seed).
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bench.inputs import bench_data, run_job
from bench.training_recipes import IMAGE_SIZE, Data, Result, judge, read_data, row
from lib.errors import UserError
from lib.faces.table import SPLITS, SUCCESS_NAME
from lib.recognition.model import load_model
from lib.training.face_names import read_identities

ARMS = {
    "random people": ("--negatives", "random"),
    "confusable people, three quarters of a batch": ("--negatives", "hard"),
    "random people, 2,048 stored negatives": (
        *("--negatives", "hard", "--confusable-share", "0", "--stored-negatives", "2048"),
    ),
}


def write_faces(source: Path, target: Path, data: Data) -> None:
    """Write the faces of the people who are not held out. Nobody validates, so the last weights become the model."""
    trained = {data.cache.identities[label] for label in data.photos.labels_N[data.photos.usable_N]}
    parts = sorted(path for split in SPLITS for path in source.glob(f"split={split}/*.parquet"))
    table = pa.concat_tables([pq.ParquetFile(path).read() for path in parts])
    folder = target / "split=train"
    folder.mkdir(parents=True)
    pq.write_table(table.filter(pc.is_in(table["identity"], pa.array(sorted(trained)))), folder / "part-00000.parquet")
    (target / SUCCESS_NAME).write_bytes((source / SUCCESS_NAME).read_bytes())


def train(folder: Path, name: str, options: argparse.Namespace, flags: tuple[str, ...], seed: int) -> dict[str, Any]:
    """Train by the job, and return its result."""
    num_photos = len(read_identities(str(folder / "faces"), ["train"]))
    epochs = max(1, round(options.images / num_photos))
    return run_job(
        "train.py",
        *("--data", str(folder), "--name", name, "--cache-dir", str(folder / "cache"), "--seed", str(seed)),
        *("--backbone", "tf_efficientnet_lite0", "--init", "efficientnet-lite0", "--image-size", str(IMAGE_SIZE)),
        *("--epochs", str(epochs), *flags),
    )


def main() -> None:
    """Train all arms and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=38_500, help="that an arm trains on; ten minutes of two cores")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    real = bench_data()
    if real is None:
        raise UserError("BENCH_DATA names no folder of real photos (celeba/ and lfw/): drawn people are too easy")
    with tempfile.TemporaryDirectory() as scratch:
        data = read_data(real, Path(scratch))
        folder = Path(scratch) / "job"
        write_faces(Path(scratch) / "lfw", folder / "faces", data)
        results: dict[str, list[Result]] = {name: [] for name in ARMS}
        seconds: dict[str, list[float]] = {name: [] for name in ARMS}
        for seed in range(options.seeds):
            for number, (name, flags) in enumerate(ARMS.items()):
                made = train(folder, f"arm {number} {seed}", options, flags, seed)
                figures, right = judge(load_model(made["model"]), data)
                results[name].append(Result(figures, right, []))
                seconds[name].append(made["seconds"])
                accuracies = {judged: round(f["accuracy"], 4) for judged, f in figures.items()}
                print(f"seed {seed}, {name}: {made['seconds']} s, {accuracies}", flush=True)
    yardstick = next(iter(results.values()))
    print(
        "| people of a batch | seeds | " + " | ".join(f"{judged}, % (AUC) | ahead by" for judged in data.judged) + " |"
    )
    print("| --- " * (2 + 2 * len(data.judged)) + "|")
    for name, seeds in results.items():
        print(row(name, seeds, yardstick, data))
    print(json.dumps({"bench": "mining_recipes", "seconds": seconds, **vars(options)}))


if __name__ == "__main__":
    main()
