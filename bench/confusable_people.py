"""What does an epoch pay to know whom its model confuses?

    python -m bench.confusable_people --people 1000000 --seeds 100000

Means of people who resemble others in groups stand in blocks, made anew each time they are asked for, as a cluster
would fetch them. Prints the seconds and the memory of the search of one worker's seeds, and the share of the nearest
people that it finds, measured on 200 seeds against all people.
"""

import functools
import json
import resource
import time
from dataclasses import dataclass

import numpy as np
import tyro

from lib.nearest import nearest
from lib.training.confusable import BLOCK_PEOPLE, Block, confusable_people

DIM, NUM_NEIGHBOURS, GROUP = 128, 3, 50


@dataclass(frozen=True, kw_only=True)
class Flags:
    """How much."""

    people: int = 1_000_000
    seeds: int = 100_000
    """People whom one worker asks for in an epoch."""


def means_of(first: int, stop: int) -> np.ndarray:
    """Return unit vectors in groups of about 50 around centres of their own."""
    rng = np.random.default_rng(first)
    centres_GD = rng.standard_normal((max(1, (stop - first) // GROUP), DIM)).astype(np.float32)
    means_ID = centres_GD[rng.integers(len(centres_GD), size=stop - first)]
    means_ID += rng.standard_normal(means_ID.shape, np.float32)
    return np.asarray(means_ID / np.linalg.norm(means_ID, axis=1, keepdims=True))


def main() -> None:
    """Measure and print."""
    flags = tyro.cli(Flags, description=__doc__)
    blocks: list[Block] = [
        (first, functools.partial(means_of, first, min(flags.people, first + BLOCK_PEOPLE)))
        for first in range(0, flags.people, BLOCK_PEOPLE)
    ]
    seeds_J = np.sort(np.random.default_rng(1).choice(flags.people, flags.seeds, replace=False))
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began, cpu = time.perf_counter(), time.process_time()
    found_JT = confusable_people(seeds_J, blocks, num_neighbours=NUM_NEIGHBOURS)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            {
                "bench": "confusable_people",
                "people": flags.people,
                "seeds": flags.seeds,
                "seconds": round(seconds, 1),
                "cpu_seconds": round(cpu, 1),
                "mb_above_start": round(peak_mb - before_mb),
                "recall": round(recall(seeds_J, found_JT, blocks), 4),
            }
        )
    )


def recall(seeds_J: np.ndarray, found_JT: np.ndarray, blocks: list[Block]) -> float:
    """Return the share of the nearest people of some seeds that was found."""
    tried = np.linspace(0, len(seeds_J) - 1, 200).astype(int)
    means_ID = np.concatenate([means() for _, means in blocks])
    exact_JK = nearest(means_ID[seeds_J[tried]], means_ID, NUM_NEIGHBOURS + 1)[0]
    shares = [
        np.isin([person for person in exact_K if person != seed][:NUM_NEIGHBOURS], found_T).mean()
        for seed, exact_K, found_T in zip(seeds_J[tried], exact_JK, found_JT[tried], strict=True)
    ]
    return float(np.mean(shares))


if __name__ == "__main__":
    main()
