"""What does it cost to find people in a large gallery, and does an index pay?

Part one searches a gallery in Parquet as a worker of identify does, on one core: CPU seconds, comparisons a second,
what reading takes of it, and the memory of the process. Part two compares the search of one shard with faiss, exact and
with inverted lists, by the share of known people whose nearest face is found. Vectors are of unit length around one
centre a person. The last line is JSON. Run it as `python -m bench.gallery_search`.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lib import storage
from lib.nearest import nearest
from lib.recognition.embeddings_table import schema
from lib.recognition.gallery import known_people
from lib.recognition.gallery_search import SHARD_FACES, SearchPlan, SearchWorker, left_to_search, planned_search

TOP, PART_FACES, PHOTOS, SPREAD = 5, 1000, 5, 0.7
NUM_TRIED = 2000


class Model:
    """What identify knows of the model."""

    digest, flip, url = "bench", False, "the model"


def drawn(num: int, dim: int, seed: int, first: int = 0) -> np.ndarray:
    """Return `num` unit vectors, five a person, from person `first` on; another seed draws other photos of them."""
    people = np.arange(num) // PHOTOS + first
    centres = np.random.default_rng([1, first]).standard_normal((int(people[-1]) - first + 1, dim), np.float32)
    noise = np.random.default_rng([seed, first, 2]).standard_normal((num, dim), np.float32)
    vectors = centres[people - first] + SPREAD * noise
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_table(folder: Path, num: int, dim: int, seed: int) -> str:
    """Write an embeddings table of so many people's photos, in parts of a thousand faces."""
    about = json.dumps({"digest": Model.digest, "embedding_dim": dim, "template": "eyes"})
    names = {}
    for first in range(0, num, PART_FACES):
        vectors = drawn(min(PART_FACES, num - first), dim, seed, first // PHOTOS)
        numbers = range(first, first + len(vectors))
        columns = {
            "photo": pa.array([f"folder-{n // PHOTOS}/photo-{n}.jpg" for n in numbers]),
            "identity": pa.array([f"person-{n // PHOTOS}" for n in numbers]),
            "status": pa.array(["aligned"] * len(vectors)),
            "num_faces": pa.array([1] * len(vectors), pa.int16()),
            "score": pa.array(np.ones(len(vectors), np.float32)),
            "box": pa.FixedSizeListArray.from_arrays(np.ones(4 * len(vectors), np.float32), 4),
            "embedding": pa.FixedSizeListArray.from_arrays(vectors.ravel(), dim),
        }
        name = f"split=test/part-{first // PART_FACES:06d}-{'0' * 12}.parquet"
        storage.write_parquet(
            str(folder / name), pa.table(columns, schema=schema(dim, "{}", about)), compression="zstd"
        )
        names[name] = (folder / name).stat().st_size
    storage.write_json(str(folder / "_SUCCESS"), {"run_id": "1", "fingerprint": {}, "counts": {}, "parts": names})
    return str(folder)


def cpu_s(work: Callable[[], object]) -> float:
    """Return the CPU seconds of a piece of work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def search_all(plan: SearchPlan) -> None:
    """Search all pieces, as one worker does."""
    worker = SearchWorker(plan)
    for piece in left_to_search(plan):
        worker.search(piece)


def searched(num_faces: int, num_probes: int, dim: int) -> dict[str, float]:
    """Search a gallery on this core, as a worker does; return what it cost."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gallery_url = write_table(folder / "gallery", num_faces, dim, 0)
        at_start_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        gallery = None

        def look() -> None:
            nonlocal gallery
            gallery = known_people(gallery_url, Model())  # type: ignore[arg-type]

        scan_s = cpu_s(look)
        costs = []
        for num in (1, num_probes):
            probes_url = write_table(folder / f"probes {num}", num, dim, 5)
            plan = planned_search(gallery, probes_url, str(folder / "out"), TOP, [])  # type: ignore[arg-type]
            costs.append(cpu_s(partial(search_all, plan)))
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {
            "faces": num_faces,
            "probes": num_probes,
            "dim": dim,
            "scan_cpu_s": round(scan_s, 1),
            "read_cpu_s": round(costs[0], 1),
            "search_cpu_s": round(costs[1], 1),
            "million_comparisons_per_s": round(num_faces * num_probes / costs[1] / 1e6),
            "at_start_mb": round(at_start_mb),
            "peak_mb": round(peak_mb),
        }


def indexes(dim: int) -> list[dict[str, float | str]]:
    """Search one shard with half known people and half strangers, in several ways."""
    import faiss

    faiss.omp_set_num_threads(1)
    gallery = drawn(SHARD_FACES, dim, 0)
    known = drawn(SHARD_FACES, dim, 5)[:: SHARD_FACES // NUM_TRIED * 2][: NUM_TRIED // 2]
    probes = np.concatenate([known, drawn(NUM_TRIED // 2, dim, 0, first=SHARD_FACES)])
    truth = nearest(probes, gallery, 1)[0][:, 0]
    results: list[dict[str, float | str]] = []

    def tried(way: str, build_s: float, search: Callable[[], np.ndarray]) -> float:
        found = np.empty(0)

        def look() -> None:
            nonlocal found
            found = search()

        seconds = cpu_s(look)
        right = found[:, 0] == truth
        shares = [round(float(half.mean()), 3) for half in (right[: NUM_TRIED // 2], right[NUM_TRIED // 2 :])]
        per_s = round(len(probes) * len(gallery) / seconds / 1e6)
        results.append({"way": way, "build_s": round(build_s, 1), "million_comparisons_per_s": per_s})
        results[-1] |= {"recall_of_known": shares[0], "recall_of_strangers": shares[1]}
        print(json.dumps(results[-1]), flush=True)
        return shares[0]

    tried("matrix product, exact (ours)", 0.0, lambda: nearest(probes, gallery, TOP)[0])
    tried("faiss, exact", 0.0, lambda: faiss.knn(probes, gallery, TOP)[1])
    index: Any = faiss.index_factory(dim, f"IVF{int(2 * SHARD_FACES**0.5)},Flat")
    index.cp.max_points_per_centroid = 64

    def build() -> None:
        index.train(gallery)
        index.add(gallery)

    build_s = cpu_s(build)
    for lists in (16, 32, 64, 128, 256):
        index.nprobe = lists
        way = f"faiss inverted lists, {lists} of {index.nlist}"
        if tried(way, build_s, lambda: index.search(probes, TOP)[1]) >= 0.99:
            break
    return results


def main() -> None:
    """Measure on one core, and print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faces", type=int, default=1_000_000)
    parser.add_argument("--probes", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=128)
    flags = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cost = searched(flags.faces, flags.probes, flags.dim)
    print(json.dumps(cost), flush=True)
    print(json.dumps({"gallery_search": {"search": cost, "indexes": indexes(flags.dim)}}))


if __name__ == "__main__":
    main()
