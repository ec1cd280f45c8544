"""Who is nearest among a gallery: a matrix product against the libraries that index, in queries a second and recall.

Vectors of unit length around one centre a person, as embeddings are. The last line is JSON. Run it as
`python -m bench.gallery_search`; a library that is not installed is left out.
"""

import json
import os
import time
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np

from lib.recognition.gallery import nearest

DIM, TOP = 128, 5
SIZES = (100_000, 1_000_000)
NUM_PROBES = 256

Search = Callable[[np.ndarray], np.ndarray]


def drawn(num: int, seed: int) -> np.ndarray:
    """Return `num` unit vectors, five a person."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((-(-num // 5), DIM), np.float32)
    vectors = np.repeat(centres, 5, axis=0)[:num] + 0.7 * rng.standard_normal((num, DIM), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def exact(gallery: np.ndarray) -> Search:
    """Return our own search."""
    return lambda probes: nearest(probes, gallery, TOP, "exact")[0]


def faiss_flat(gallery: np.ndarray) -> Search:
    """Return faiss's exhaustive search."""
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatL2(DIM)
    index.add(gallery)
    return lambda probes: index.search(probes, TOP)[1]


def faiss_hnsw(gallery: np.ndarray) -> Search:
    """Return faiss's graph."""
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.IndexHNSWFlat(DIM, 16)
    index.hnsw.efConstruction, index.hnsw.efSearch = 60, 128
    index.add(gallery)
    return lambda probes: index.search(probes, TOP)[1]


def faiss_ivf(gallery: np.ndarray) -> Search:
    """Return faiss's inverted lists."""
    import faiss

    faiss.omp_set_num_threads(1)
    num_lists = int(2 * np.sqrt(len(gallery)))
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(DIM), DIM, num_lists)
    index.train(gallery[:: max(1, len(gallery) // (40 * num_lists))])
    index.add(gallery)
    index.nprobe = 32
    return lambda probes: index.search(probes, TOP)[1]


def usearch_hnsw(gallery: np.ndarray) -> Search:
    """Return usearch's graph."""
    from usearch.index import Index

    index = Index(ndim=DIM, metric="l2sq", dtype="f32", connectivity=16, expansion_add=60, expansion_search=128)
    index.add(np.arange(len(gallery)), gallery, threads=1)
    return lambda probes: np.asarray(index.search(probes, TOP, threads=1).keys)


WAYS = {
    "matrix product": (exact, "numpy"),
    "faiss flat": (faiss_flat, "faiss"),
    "faiss IVF": (faiss_ivf, "faiss"),
    "faiss HNSW": (faiss_hnsw, "faiss"),
    "usearch HNSW": (usearch_hnsw, "usearch"),
}


def main() -> None:
    """Measure every way at every size on one core, print a line for each and all of them as JSON."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    results = []
    for num in SIZES:
        gallery = drawn(num, seed=0)
        probes = gallery[:: num // NUM_PROBES][:NUM_PROBES] + 0.02 * drawn(NUM_PROBES, seed=1)
        truth = exact(gallery)(probes)
        for name, (build, package) in WAYS.items():
            if find_spec(package) is None or (num > 200_000 and "HNSW" in name):  # minutes to build on one core
                continue
            start = time.perf_counter()
            search = build(gallery)
            built = time.perf_counter()
            found = search(probes)
            seconds = time.perf_counter() - built
            recall = np.mean([len(set(a) & set(b)) / TOP for a, b in zip(truth, found, strict=True)])
            results.append(
                {
                    "gallery": num,
                    "way": name,
                    "build_s": round(built - start, 2),
                    "probes_per_s": round(len(probes) / seconds),
                    "recall": round(float(recall), 4),
                }
            )
            print(
                "{gallery:>9,} {way:<15} built in {build_s} s, {probes_per_s} probes/s, recall {recall}".format(
                    **results[-1]
                )
            )
    print(json.dumps({"gallery_search": results}))


if __name__ == "__main__":
    main()
