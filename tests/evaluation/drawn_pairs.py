"""Distances and pairs that several tests of figures draw."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from lib.evaluation.pairs import Pairs

unhurried = settings(deadline=None)  # a busy machine is no failure

LABELLED = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=2, max_size=60).filter(
    lambda rows: len({same for _, same in rows}) == 2
)
"""Distances with many ties, and both kinds of pairs."""


def split(rows):
    distances, same = zip(*rows, strict=True)
    return np.array(distances, np.float64), np.array(same)


def random_pairs(num_pairs=2_000, num_photos=300, num_people=60, num_folds=10, seed=0):
    rng = np.random.default_rng(seed)
    identity_N = np.arange(num_photos) % num_people
    a_P = rng.integers(num_photos, size=num_pairs)
    same_P = np.arange(num_pairs) % 2 == 0
    b_P = np.where(same_P, (a_P + num_people) % num_photos, (a_P + rng.integers(1, num_people, num_pairs)) % num_photos)
    fold_P = (np.arange(num_pairs) // 2 % num_folds).astype(np.int16)
    centres_ID = rng.standard_normal((num_people, 16))
    embeddings_ND = (centres_ID[identity_N] + rng.standard_normal((num_photos, 16))).astype(np.float32)
    return embeddings_ND, identity_N, Pairs(a_P=a_P, b_P=b_P, same_P=same_P, fold_P=fold_P)
