"""Do features of half the size rank photos as those of float32 do?

    python -m bench.feature_precision --photos 20000 200000 1000000

Unit vectors of people with about 20 photos each, near to each other (a trained model) or far apart. Prints how many of
the 11 nearest photos of 500 are the same, how many are in the same place, and how often the nearest photo of another
person is the same.
"""

import json
from dataclasses import dataclass

import numpy as np
import tyro

from lib.nearest import nearest
from lib.training.feature_shard import Shard

DIM, PHOTOS_A_PERSON, NUM_QUERIES, NUM_NEAREST = 128, 20, 500, 11


@dataclass(frozen=True, kw_only=True)
class Flags:
    """How much."""

    photos: tuple[int, ...] = (20_000, 200_000, 1_000_000)
    spread: tuple[float, ...] = (0.7, 1.0)
    """Of a person's photos around the person, in units of the spread of people."""


def person_vectors(num: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors [N, D] and the person of each."""
    rng = np.random.default_rng(0)
    people_ID = rng.standard_normal((num // PHOTOS_A_PERSON, DIM)).astype(np.float32)
    labels_N = rng.integers(len(people_ID), size=num)
    vectors_ND = people_ID[labels_N] + np.float32(spread) * rng.standard_normal((num, DIM), np.float32)
    return np.asarray(vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)), labels_N


def compare(num: int, spread: float) -> dict[str, float]:
    """Return how alike both kinds of features rank."""
    vectors_ND, labels_N = person_vectors(num, spread)
    queries = np.random.default_rng(1).choice(num, NUM_QUERIES, replace=False)
    found, negatives = [], []
    for precision in ("float32", "float16"):
        shard = Shard(start=0, stop=num, dim=DIM, precision=precision)
        shard.write(np.arange(num), vectors_ND, labels_N, 1)
        stored_ND = shard.read(np.arange(num)).value[0]
        found.append(nearest(stored_ND[queries], stored_ND, NUM_NEAREST)[0])
        negatives.append(shard.search_all(stored_ND[queries], labels_N[queries], None).value.rows)
    same = [len(np.intersect1d(*both)) / NUM_NEAREST for both in zip(*found, strict=True)]
    return {
        "same_nearest": round(float(np.mean(same)), 5),
        "same_place": round(float(np.mean(found[0] == found[1])), 5),
        "same_negative": round(float(np.mean(negatives[0] == negatives[1])), 5),
    }


def main() -> None:
    """Compare and print."""
    flags = tyro.cli(Flags, description=__doc__)
    for num in flags.photos:
        for spread in flags.spread:
            print(json.dumps({"bench": "feature_precision", "photos": num, "spread": spread, **compare(num, spread)}))


if __name__ == "__main__":
    main()
