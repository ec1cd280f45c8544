"""How soon training starts on a million faces, how fast it draws triplets there, and how much memory that takes.

    python -m bench.face_cache

Makes a faces table of tiny crops in a temporary folder, builds its cache, and measures in a fresh process. Prints one
line of JSON; memory is what stands beside the page cache (anonymous pages).
"""

import argparse
import json
import multiprocessing
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib.faces import table
from lib.training.cache_building import build_cache
from lib.training.face_cache import FaceCache
from lib.training.loading import BatchLoader, LoadTask, Prefetcher
from lib.training.triplets import PhotoIndex, draw_triplets

ROWS_PER_PART = 100_000
CROP_SIZE = 16
BATCH_TRIPLETS = 64
EPOCH_TRIPLETS = 500_000


def make_faces(folder: Path, num_rows: int, num_identities: int) -> None:
    """Write a faces table of `num_rows` tiny crops, identities drawn at random."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (256, CROP_SIZE, CROP_SIZE, 3), np.uint8)
    crops = pa.array([cv2.imencode(".jpg", picture)[1].tobytes() for picture in pictures])
    split = folder / "split=train"
    split.mkdir(parents=True)
    for start in range(0, num_rows, ROWS_PER_PART):
        numbers = range(start, min(start + ROWS_PER_PART, num_rows))
        people = rng.integers(num_identities, size=len(numbers))
        columns = {
            "photo": [f"person {p:06d}/photo {n:08d}.jpg" for p, n in zip(people, numbers, strict=True)],
            "identity": [f"person {p:06d}" for p in people],
            "status": [table.ALIGNED] * len(numbers),
            "crop": crops.take(pa.array(np.asarray(numbers) % len(crops))),
        }
        arrays = [
            pa.array(columns[field.name], field.type) if field.name in columns else pa.nulls(len(numbers), field.type)
            for field in table.SCHEMA
        ]
        part = pa.Table.from_arrays(arrays, schema=table.SCHEMA)
        pq.write_table(part, split / f"part-{start // ROWS_PER_PART:05d}.parquet", row_group_size=10_000)
    (folder / table.SUCCESS_NAME).write_text(json.dumps({"run_id": "bench", "counts": {"train": num_rows}}))


def anonymous_mb() -> float:
    """Return the memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found, "Linux says so"
    return int(found[1]) / 1e3


def measure(cache_path: str) -> dict[str, float]:
    """Open the cache, load a first batch, draw an epoch of triplets; run in a process that has done nothing before."""
    mb_before = anonymous_mb()
    began = time.perf_counter()
    cache = FaceCache(cache_path)
    index = PhotoIndex(cache.labels_N)
    opened_s = time.perf_counter() - began
    triplets = draw_triplets(index, BATCH_TRIPLETS, seed=0, epoch=0)
    rows = np.concatenate([triplets.anchors, triplets.positives, triplets.negatives])
    loader = BatchLoader(cache=cache, size=112, level="original", seed=0, epoch=0)
    with Prefetcher(loader, [LoadTask(rows=rows, first_draw=0)], num_threads=1, num_ahead=1) as batches:
        first = next(batches)
    assert not first.failed.any(), "every crop is a picture"
    first_batch_s = time.perf_counter() - began
    mb_per_million = (anonymous_mb() - mb_before) / (len(cache) / 1e6)

    began = time.perf_counter()
    draw_triplets(index, EPOCH_TRIPLETS, seed=0, epoch=1)
    return {
        "opened_s": round(opened_s, 3),
        "first_batch_s": round(first_batch_s, 3),
        "resident_mb_per_million_photos": round(mb_per_million, 1),
        "triplets_per_s": round(EPOCH_TRIPLETS / (time.perf_counter() - began)),
    }


def main() -> None:
    """Make the faces, build the cache, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--identities", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-face-cache-") as folder:
        faces = Path(folder) / "faces"
        make_faces(faces, arguments.rows, arguments.identities)
        began = time.perf_counter()
        path = build_cache(str(faces), ["train"], f"{folder}/cache")
        build_s = time.perf_counter() - began
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh_process:
            figures = fresh_process.submit(measure, path).result()
        size_mb = Path(path).stat().st_size / 1e6
    result = {"rows": arguments.rows, "identities": arguments.identities, "build_s": round(build_s, 1)}
    print(json.dumps({**result, "cache_mb": round(size_mb), **figures}))


if __name__ == "__main__":
    main()
