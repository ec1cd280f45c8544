"""How long do the figures of 6,000 and of 1,000,000 pairs take on one core, and how much memory do they hold?

Every figure of the report is computed (intervals and identification among them), on vectors drawn at random around one
centre a person. The last line is JSON. Run it as `python -m bench.metrics_speed`.
"""

import json
import os
import resource
import time

import numpy as np

from lib.evaluation.metrics import verification_report
from lib.evaluation.pairs import made_pairs

EMBEDDING_DIM = 128
SIZES = (
    # pairs, people, photos of each, resamples
    (6_000, 1_000, 5, 1_000),
    (1_000_000, 10_000, 20, 500),
)


def measure(num_pairs: int, num_people: int, photos_each: int, num_resamples: int) -> dict[str, float]:
    """Return the seconds that drawing the pairs and the report take, and the peak of resident memory so far in GB."""
    rng = np.random.default_rng(0)
    person_N = np.repeat(np.arange(num_people), photos_each)
    centres_ID = rng.standard_normal((num_people, EMBEDDING_DIM), np.float32)
    embeddings_ND = centres_ID[person_N] + 1.7 * rng.standard_normal((len(person_N), EMBEDDING_DIM), np.float32)
    embeddings_ND /= np.linalg.norm(embeddings_ND, axis=1, keepdims=True)
    photos = [f"{person}/{n}.jpg" for n, person in enumerate(person_N)]

    start = time.perf_counter()
    pairs = made_pairs(photos, [str(person) for person in person_N], num_pairs=num_pairs, seed=0)
    drawn = time.perf_counter()
    report = verification_report(embeddings_ND, person_N, pairs, num_resamples=num_resamples)
    done = time.perf_counter()
    return {
        "num_pairs": len(pairs),
        "num_resamples": num_resamples,
        "pairs_s": round(drawn - start, 3),
        "report_s": round(done - drawn, 3),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "accuracy": round(report["accuracy"], 4),
    }


def main() -> None:
    """Measure every size on one core, print a line for each and all of them as JSON."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    results = []
    for size in SIZES:
        results.append(measure(*size))
        print(
            "{num_pairs:>9,} pairs: report {report_s} s, drawing {pairs_s} s, {peak_memory_gb} GB".format(**results[-1])
        )
    print(json.dumps({"metrics_speed": results}))


if __name__ == "__main__":
    main()
