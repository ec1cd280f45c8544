"""How fast is the search for hard negatives, the nearest of 2,000 random photos of other people for each anchor?

Compared, all on one thread and in turns: the plain function; the feature store (asked and answered at once); the way of
the project that this one follows (one candidate after the other from a dictionary of lists); faiss's flat index, built
from the batch's candidates or kept over all photos with a selector; and one bare GEMM. "Ready" ways are given the
candidates drawn and read; the plain function, the store and the dictionary draw and read them in the time measured.
A second table compares asking the store with searching a snapshot in shared memory. The last line is JSON. Run it as
`python -m bench.negative_search`.
"""

import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import ray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from lib.training.feature_store import FeatureStore
from lib.training.mining import CandidatePool, Floats, Ints, draw_candidates, exact_negatives, search
from lib.training.shard_places import ANYWHERE

DIM = 128
NUM_CANDIDATES = 2_000
PHOTOS_EACH = 20
NUM_PHOTOS = 200_000
BATCH_SIZES = (64, 256, 1024)
STORE_BATCH_SIZES = (64, 256)
STORE_SIZES = (20_000, 200_000, 1_000_000)
SHARD_COUNTS = (1, 4)
NUM_ROUNDS = 15
NUM_DICTIONARY_ANCHORS = 4
"""The dictionary is asked for fewer anchors a round, because it takes milliseconds for each."""


def hard_negatives(
    queries_BD: Floats, labels_B: Ints, features_ND: Floats, labels_N: Ints, rng: np.random.Generator
) -> Ints:
    """Return the rows of the nearest of random candidates, drawn and searched in one process."""
    pool = draw_candidates(labels_B, labels_N, num_candidates=NUM_CANDIDATES, rng=rng)
    return search(queries_BD, features_ND.take(pool.rows, axis=0), pool.rows, pool.blocked).rows


def draw_photos(num_photos: int) -> tuple[Floats, Ints]:
    """Return normalised features and the person of each."""
    features_ND = np.random.default_rng(0).standard_normal((num_photos, DIM), np.float32)
    features_ND /= np.linalg.norm(features_ND, axis=1, keepdims=True)
    return features_ND, np.arange(num_photos) // PHOTOS_EACH


def medians_ms(ways: dict[str, Callable[[int], Any]], num_rounds: int = NUM_ROUNDS) -> dict[str, float]:
    """Return the median milliseconds of each way; the ways take turns, so that a slow moment meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(num_rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way(turn)
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def dictionary_search(
    anchors: list[int], features_of: dict[int, list[float]], person_of: dict[int, int], photos: list[int], seed: int
) -> list[int]:
    """Return the negatives as the project's forerunner finds them: candidates drawn and compared one by one."""
    rng = random.Random(seed)
    used = set(anchors)
    negatives = []
    for anchor in anchors:
        nearest, negative, num_seen = math.inf, -1, 0
        while num_seen < NUM_CANDIDATES:
            photo = rng.choice(photos)
            if person_of[photo] == person_of[anchor] or photo in used:
                continue
            num_seen += 1
            distance = math.dist(features_of[anchor], features_of[photo])
            if distance < nearest:
                nearest, negative = distance, photo
        used.add(negative)
        negatives.append(negative)
    return negatives


def faiss_candidates(queries_BD: Floats, candidates_PD: Floats, depth: int) -> Ints:
    """Return the `depth` nearest candidates, the anchor's own among them, from an index of the candidates alone."""
    index = faiss.IndexFlatL2(DIM)
    index.add(candidates_PD)
    return index.search(queries_BD, depth)[1]


def faiss_selector(index: Any, queries_BD: Floats, rows_P: Ints, depth: int) -> Ints:
    """Return the `depth` nearest candidates from an index of all photos, told which rows count."""
    selector = faiss.IDSelectorBatch(rows_P.astype(np.int64))
    return index.search(queries_BD, depth, params=faiss.SearchParameters(sel=selector))[1]  # type: ignore[call-arg]


def own_depth(pool: CandidatePool, num_anchors: int) -> int:
    """Return how deep faiss must look to get past the candidates that an anchor may not take."""
    return 1 + int(np.bincount(pool.blocked.anchors, minlength=num_anchors).max())


def compare_ways(features_ND: Floats, labels_N: Ints, batch_size: int) -> dict[str, float]:
    """Return the milliseconds a batch that each way takes."""
    num_batches = NUM_ROUNDS + 1
    anchors = np.random.default_rng(1).integers(0, NUM_PHOTOS, (num_batches, batch_size))
    queries = features_ND[anchors]
    own = labels_N[anchors]
    pools = [
        draw_candidates(own[turn], labels_N, num_candidates=NUM_CANDIDATES, rng=np.random.default_rng(turn))
        for turn in range(num_batches)
    ]
    candidates = [features_ND[pool.rows] for pool in pools]
    depths = [own_depth(pool, batch_size) for pool in pools]
    index = faiss.IndexFlatL2(DIM)
    index.add(features_ND)
    lists_of = dict(enumerate(features_ND.tolist()))
    person_of = dict(enumerate(labels_N.tolist()))
    photos = list(lists_of)
    store = FeatureStore.create(f"bench {batch_size}", labels_N, dim=DIM)
    store.write(np.arange(NUM_PHOTOS), features_ND, step=0)
    store.flush()

    def plain(turn: int) -> Ints:
        rng = np.random.default_rng(turn)
        return hard_negatives(queries[turn], own[turn], features_ND, labels_N, rng)

    def ready(turn: int) -> Ints:
        return search(queries[turn], candidates[turn], pools[turn].rows, pools[turn].blocked).rows

    def asked(turn: int) -> Ints:
        answer = store.search(queries[turn], own[turn], policy="hard", num_candidates=NUM_CANDIDATES, seed=turn)
        return answer.result().rows

    def dictionary(turn: int) -> list[int]:
        return dictionary_search(anchors[turn, :NUM_DICTIONARY_ANCHORS].tolist(), lists_of, person_of, photos, turn)

    def rebuilt(turn: int) -> Ints:
        return faiss_candidates(queries[turn], candidates[turn], depths[turn])

    def selected(turn: int) -> Ints:
        return faiss_selector(index, queries[turn], pools[turn].rows, depths[turn])

    assert (plain(0) == asked(0)).all()
    assert (plain(0) == ready(0)).all()
    ranked = pools[0].rows[rebuilt(0)]
    assert (ranked == selected(0)).all()
    assert (ranked == plain(0)[:, None]).any(axis=1).all()
    times = medians_ms(
        {
            "plain function": plain,
            "its search, candidates ready": ready,
            "bare GEMM, candidates ready": lambda turn: queries[turn] @ candidates[turn].T,
            "candidates read, bare GEMM": lambda turn: queries[turn] @ features_ND.take(pools[turn].rows, axis=0).T,
            "feature store": asked,
            "faiss, index of ready candidates": rebuilt,
            "faiss, all photos and a selector": selected,
            "dictionary": dictionary,
        }
    )
    store.close()
    times["dictionary"] *= batch_size / NUM_DICTIONARY_ANCHORS
    return times


def compare_places(num_photos: int, batch_size: int, num_shards: int) -> dict[str, float]:
    """Return milliseconds of asking the shards and of searching a snapshot in the node's shared memory."""
    features_ND, labels_N = draw_photos(num_photos)
    anchors = np.random.default_rng(1).integers(0, num_photos, (NUM_ROUNDS + 1, batch_size))
    store = FeatureStore.create(
        f"places {num_photos} {batch_size} {num_shards}", labels_N, dim=DIM, places=num_shards * ANYWHERE
    )
    store.write(np.arange(num_photos), features_ND, step=0)
    store.flush()
    snapshot_ND = ray.get(ray.put(features_ND))

    def ask(turn: int, policy: Any) -> Any:
        rows = anchors[turn]
        return store.search(features_ND[rows], labels_N[rows], policy=policy, num_candidates=NUM_CANDIDATES, seed=turn)

    def locally(turn: int) -> Ints:
        rows = anchors[turn]
        rng = np.random.default_rng(turn)
        return hard_negatives(snapshot_ND[rows], labels_N[rows], snapshot_ND, labels_N, rng)

    def all_locally(turn: int) -> Ints:
        rows = anchors[turn]
        return exact_negatives(snapshot_ND[rows], labels_N[rows], snapshot_ND, labels_N).rows

    def step_with_ask(turn: int) -> None:
        answer = ask(turn, "hard")
        time.sleep(0.05)
        answer.result()

    assert (ask(0, "hard").result().rows == locally(0)).all()
    times = medians_ms(
        {
            "asked": lambda turn: ask(turn, "hard").result(),
            "asked a step ahead": step_with_ask,
            "step alone": lambda _: time.sleep(0.05),
            "snapshot": locally,
        }
    )
    times |= medians_ms(
        {"exact, asked": lambda turn: ask(turn, "exact").result(), "exact, snapshot": all_locally}, num_rounds=3
    )
    times |= medians_ms({"snapshot taken": lambda _: ray.put(store.snapshot()[0])}, num_rounds=3)
    store.close()
    times["asked a step ahead"] -= times.pop("step alone")
    return times


def main() -> None:
    """Print both tables and one line of JSON."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    features_ND, labels_N = draw_photos(NUM_PHOTOS)
    result: dict[str, Any] = {"num_photos": NUM_PHOTOS, "num_candidates": NUM_CANDIDATES, "ways": [], "places": []}
    with threadpool_limits(1):
        for batch_size in BATCH_SIZES:
            times = compare_ways(features_ND, labels_N, batch_size)
            ours = times["plain function"]
            print(f"\n{batch_size} anchors, {NUM_PHOTOS:,} photos: ms, anchors/s, times the plain function's time")
            for name, value in sorted(times.items(), key=lambda item: item[1]):
                print(f"  {name:34} {value:10.2f} {1e3 * batch_size / value:10,.0f} {value / ours:9.2f}")
            result["ways"].append({"num_anchors": batch_size, "ms": _rounded(times)})
        print("\nms a batch, asking the store's shards or searching a snapshot on the node")
        for num_photos in STORE_SIZES:
            for num_shards in SHARD_COUNTS:
                for batch_size in STORE_BATCH_SIZES:
                    times = compare_places(num_photos, batch_size, num_shards)
                    figures = "  ".join(f"{name} {value:.2f}" for name, value in times.items())
                    print(f"  {num_photos:>9,} photos, {num_shards} shards, {batch_size:>3} anchors: {figures}")
                    place = {"num_photos": num_photos, "num_shards": num_shards, "num_anchors": batch_size}
                    result["places"].append({**place, "ms": _rounded(times)})
    ray.shutdown()
    print(json.dumps({"negative_search": result}))


def _rounded(times: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in times.items()}


if __name__ == "__main__":
    main()
