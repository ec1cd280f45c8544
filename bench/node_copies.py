"""What does a node's copy of the crops cost, whole, in part, and where its disk has no room for one?

    python -m bench.node_copies --photos 60000

Crops of 8 to 12 kB lie in parts of 1,000 rows, as preprocess writes them. Prints the seconds of a copy by one thread
and by as many as training has, of `--cache-size` for a quarter, and of finding the crops in the table; and crops a
second from the copy, from the part, and from the table. Medians of some rounds in turns.
"""

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tyro

from lib import storage
from lib.faces import table
from lib.faces.face_filter import EVERY_FACE
from lib.training import cache_building
from lib.training.cache_building import build_cache
from lib.training.cache_files import CacheFullError
from lib.training.face_cache import FaceCache
from lib.training.face_names import part_urls
from lib.training.meeting import Meeting
from lib.training.node_share import open_train
from lib.training.settings import TrainConfig
from lib.training.table_crops import TableCrops

CROP_SIZE = 112
ROWS_A_PART, PHOTOS_A_PERSON, BATCH, NUM_BATCHES, PART = 1000, 20, 96, 200, 0.25
THREADS = cache_building.COPY_THREADS


@dataclass(frozen=True, kw_only=True)
class Flags:
    """How much."""

    photos: int = 60_000
    rounds: int = 3


def write_table(url: str, num_photos: int) -> None:
    """Write a faces table whose crops are random bytes."""
    rng = np.random.default_rng(0)
    noise = rng.bytes(1 << 22)
    for first in range(0, num_photos, ROWS_A_PART):
        starts = rng.integers(0, len(noise) - 12_000, ROWS_A_PART)
        ends = starts + rng.integers(8_000, 12_000, ROWS_A_PART)
        people = rng.integers(num_photos // PHOTOS_A_PERSON, size=ROWS_A_PART)
        rows = [
            {
                "photo": f"{first + row}.jpg",
                "identity": f"person {person}",
                "status": table.ALIGNED,
                "crop": noise[start:end],
            }
            for row, (start, end, person) in enumerate(zip(starts, ends, people, strict=True))
        ]
        part_url = storage.join(url, f"split=train/part-{first:09d}.parquet")
        storage.write_parquet(part_url, table.faces_table(rows, "{}"), compression="none")
    success = {"run_id": "bench", "fingerprint": {"id": "f", "image_size": CROP_SIZE}, "counts": {}}
    storage.write_json(storage.join(url, table.SUCCESS_NAME), success)


def seconds(action: Callable[[], object]) -> float:
    """Return how long an action takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def crops_per_s(crops: FaceCache | TableCrops, rows: np.ndarray) -> float:
    """Return the rate at which batches of random rows are at hand."""
    batches = np.random.default_rng(1).choice(rows, (NUM_BATCHES, BATCH))

    def read() -> None:
        for batch in batches:
            at_hand = crops.at_hand(batch)
            for row in batch.tolist():
                at_hand.crop_bytes(row).sum()

    return batches.size / seconds(read)


def measure(folder: str, num_photos: int) -> dict[str, float]:
    """Measure each once."""
    url, found = storage.join(folder, "faces"), {}
    for threads in (1, THREADS):
        cache_building.COPY_THREADS = threads
        with tempfile.TemporaryDirectory(dir=folder) as copy:
            found[f"copy_s_{threads}_threads"] = seconds(partial(build_cache, url, ["train"], copy))
            if threads == THREADS:
                cache = FaceCache(build_cache(url, ["train"], copy), CROP_SIZE)
                found["crops_per_s_of_copy"] = crops_per_s(cache, np.arange(num_photos))
    with tempfile.TemporaryDirectory(dir=folder) as copy:
        room = PART * cache_building.size_of_crops(part_urls(url, table.read_success(url), ["train"]))[0] / 1e9
        cache, share = open_train(TrainConfig.of(data=folder, faces=url, cache_size=room), copy, None)
        assert share is not None
        found["part_s"] = seconds(lambda: share.hold(1, Meeting(None)))
        assert cache.held is not None
        found["crops_per_s_of_part"] = crops_per_s(cache, np.flatnonzero(cache.held.rows_N))
    urls, full = part_urls(url, table.read_success(url), ["train"]), CacheFullError(Path(folder), "full")
    found["find_s"] = seconds(lambda: TableCrops(urls, None, EVERY_FACE, full))
    found["crops_per_s_of_table"] = crops_per_s(TableCrops(urls, None, EVERY_FACE, full), np.arange(num_photos))
    return found


def main() -> None:
    """Measure in turns and print."""
    flags = tyro.cli(Flags, description=__doc__)
    rounds: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        write_table(storage.join(folder, "faces"), flags.photos)
        for _ in range(flags.rounds):
            for name, value in measure(folder, flags.photos).items():
                rounds[name].append(value)
    medians = {name: float(f"{statistics.median(values):.3g}") for name, values in rounds.items()}
    print(json.dumps({"bench": "node_copies", "photos": flags.photos, **medians}))


if __name__ == "__main__":
    main()
