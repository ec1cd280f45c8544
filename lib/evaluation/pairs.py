"""Pairs of photos to compare, drawn by a seed; `pair_files` reads pairs from files.

A pair holds two indices into the caller's list of photos, so that a million pairs take 19 MB.

Shapes: N photos of the caller, I identities, P pairs, M photos of one fold.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lib.errors import UserError

logger = logging.getLogger(__name__)

DEFAULT_FOLDS = 10
MAX_FOLDS = 32_767
"""Folds are numbered in 16 bits."""

NUM_NAMED = 5
"""A message names at most this many wrong photos or lines."""

SMALL_FOLD = 8
"""If a fold has fewer different pairs than this many times the wanted number, all are listed and some of them chosen.
Otherwise pairs are drawn at random."""


Strings: TypeAlias = Sequence[str] | pa.Array | pa.ChunkedArray
"""Names as a list, or as an Arrow array, which takes less memory."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Pairs of photos, as indices into the caller's list of photos."""

    a_P: NDArray[np.int64]
    b_P: NDArray[np.int64]
    same_P: NDArray[np.bool_]
    """Whether both photos show the same person."""
    fold_P: NDArray[np.int16]
    missing_photos: tuple[str, ...] = ()
    """Photos that are in the file but not in the caller's list. The arrays leave out their pairs."""
    num_missing_pairs: int = 0
    note: str = ""
    """A line for the user about these pairs. Empty if they are as requested."""

    def __len__(self) -> int:
        return len(self.a_P)


def made_pairs(
    photos: Strings,
    identities: Strings,
    *,
    num_pairs: int = 6_000,
    num_folds: int = DEFAULT_FOLDS,
    seed: int,
) -> Pairs:
    """Draw pairs as in LFW: half of one person, half of two, no pair twice, in folds that share no person.

    In a fold all people are in equally many pairs, as far as their photos allow. The draw depends on the names and the
    seed, not on the order of the photos. `photos` and `identities` have length N. If there are too few photos for
    `num_pairs`, each fold gets as many pairs as it can have, still half of each kind, and `note` says so.

    Raises:
        UserError: too few people for two folds, or `num_pairs` is too small for the folds.
    """
    if not 2 <= num_folds <= MAX_FOLDS or num_pairs < 2 * num_folds:
        raise UserError(f"{num_pairs} pairs in {num_folds} folds: at least 2 folds and 2 pairs a fold are needed")
    photo_N, count_I = _by_identity(photos, identities)
    num_paired = int((count_I >= 2).sum())
    folds = min(num_folds, num_paired, len(count_I) // 2)
    if folds < 2:
        raise UserError(
            f"{len(count_I)} people, {num_paired} of them with two photos or more, are too few to make pairs from: "
            "two folds need four people, two of them with two photos"
        )
    rng = np.random.default_rng(seed)
    # People are dealt in order of their number of photos, so that the folds have similar sizes.
    fold_I = np.empty(len(count_I), np.int64)
    fold_I[np.lexsort((rng.random(len(count_I)), -count_I))] = np.arange(len(count_I)) % folds
    start_I = np.cumsum(count_I) - count_I

    parts = []
    for fold in range(folds):
        people = rng.permutation(np.flatnonzero(fold_I == fold))
        wanted = num_pairs // 2 // folds + (fold < num_pairs // 2 % folds)
        parts.append(photo_N[_fold_pairs(count_I[people], start_I[people], wanted, rng)])
    a_P, b_P = np.concatenate(parts).T
    size_F = np.array([len(part) for part in parts])
    fold_P = np.repeat(np.arange(folds, dtype=np.int16), size_F)
    same_P = np.concatenate([np.repeat([True, False], size // 2) for size in size_F])
    short = len(a_P) < num_pairs - num_pairs % 2 or folds < num_folds
    note = (
        f"{len(a_P)} pairs in {folds} folds were made, {num_pairs} in {num_folds} asked for: "
        f"there are {len(count_I)} people, {num_paired} of them with two photos or more"
    )
    return Pairs(a_P=a_P.copy(), b_P=b_P.copy(), same_P=same_P, fold_P=fold_P, note=note if short else "")


def _fold_pairs(
    count_J: NDArray[np.int64], start_J: NDArray[np.int64], wanted: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw the pairs of a fold, [2 * num, 2], up to `wanted` of each kind: first the same pairs, then the different.

    Pairs hold positions of photos. Those of person j of the fold start at `start_J[j]`, and there are `count_J[j]`.
    """
    num_each = min(wanted, int(_num_same(count_J).sum()), _num_different(count_J))
    same = _draw_same(count_J, num_each, rng)
    different = _draw_different(count_J, num_each, rng)
    # Both are positions within the fold's photos, laid out person by person.
    place_M = np.arange(count_J.sum()) + np.repeat(start_J - (np.cumsum(count_J) - count_J), count_J)
    return place_M[np.concatenate([same, different])]


def original_pairs(photos: Sequence[str], identities: Sequence[str], *, seed: int) -> Pairs:
    """Return the original project's pairs: every two photos of a person, and for each a random photo of someone else.

    A same pair and its different pair are in the fold of that person. There are 10 folds, or as many as there are
    people with two photos. Same pairs of two folds share no person, but the random others may come from any fold.

    Raises:
        UserError: nobody has two photos, or there is only one person.
    """
    photo_N, count_I = _by_identity(photos, identities)
    paired = np.flatnonzero(count_I >= 2)
    if not len(paired) or len(count_I) < 2:
        raise UserError(
            f"{len(count_I)} people, {len(paired)} of them with two photos or more: "
            "pairs need two people, one of them with two photos"
        )
    rng = np.random.default_rng(seed)
    num_photos = len(photo_N)
    person_N = np.repeat(np.arange(len(count_I)), count_I)
    stop_N = np.cumsum(count_I)[person_N]
    a_P, b_P = _listed(np.arange(1, num_photos + 1), stop_N)
    person_P = person_N[a_P]
    other_P = rng.integers(num_photos - count_I[person_P])
    other_P += np.where(other_P >= stop_N[a_P] - count_I[person_P], count_I[person_P], 0)  # step over the own photos

    fold_I = np.zeros(len(count_I), np.int16)
    fold_I[rng.permutation(paired)] = np.arange(len(paired)) % min(DEFAULT_FOLDS, len(paired))
    return Pairs(
        a_P=photo_N[np.concatenate([a_P, a_P])],
        b_P=photo_N[np.concatenate([b_P, other_P])],
        same_P=np.arange(2 * len(a_P)) < len(a_P),
        fold_P=np.tile(fold_I[person_P], 2),
    )


def strings_of(values: Strings) -> pa.Array | pa.ChunkedArray:
    """Return names as an Arrow array of strings."""
    return values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, pa.string())


def _by_identity(photos: Strings, identities: Strings) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of the photos person by person, by name within each, and how many photos each person has."""
    assert len(photos) == len(identities)
    table = pa.table({"identity": strings_of(identities), "photo": strings_of(photos)})
    assert table["identity"].null_count == 0
    photo_N = pc.sort_indices(table, sort_keys=[("identity", "ascending"), ("photo", "ascending")]).to_numpy()
    runs = pc.run_end_encode(table["identity"].combine_chunks().take(photo_N))
    return photo_N.astype(np.int64), np.diff(runs.run_ends.to_numpy().astype(np.int64), prepend=0)


def _num_same(count_J: NDArray[np.int64]) -> NDArray[np.int64]:
    return count_J * (count_J - 1) // 2


def _num_different(count_J: NDArray[np.int64]) -> int:
    return int(count_J.sum() ** 2 - (count_J**2).sum()) // 2


def _draw_same(count_J: NDArray[np.int64], num: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw `num` pairs, [num, 2], of positions among photos laid out person by person, evenly over those people."""
    capacity_J = np.sort(_num_same(count_J))
    num_people = len(count_J)
    before_J = np.cumsum(capacity_J) - capacity_J
    # Everyone gives the same number of pairs, except people with fewer pairs, who give all.
    num_spent = int(np.searchsorted(before_J + capacity_J * np.arange(num_people, 0, -1), num, side="right"))
    level = (num - before_J[num_spent]) // (num_people - num_spent) if num_spent < num_people else capacity_J[-1]
    quota_J = np.minimum(_num_same(count_J), level)
    quota_J[rng.permutation(np.flatnonzero(_num_same(count_J) > level))[: num - quota_J.sum()]] += 1

    start_J = np.cumsum(count_J) - count_J
    drawn = []
    for person in np.flatnonzero(quota_J):
        code = rng.choice(int(_num_same(count_J[person])), int(quota_J[person]), replace=False)
        b = ((1 + np.sqrt(1 + 8 * code)) / 2).astype(np.int64)  # row of the lower triangle, counted row by row
        drawn.append(start_J[person] + np.stack([code - b * (b - 1) // 2, b], axis=1))
    return np.concatenate(drawn)


def _draw_different(count_J: NDArray[np.int64], num: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw `num` pairs, [num, 2], of positions of two people's photos, evenly over the people, none twice."""
    num_people, num_photos = len(count_J), int(count_J.sum())
    person_M = np.repeat(np.arange(num_people), count_J)
    start_J = np.cumsum(count_J) - count_J
    if _num_different(count_J) <= SMALL_FOLD * num:
        a, b = _listed(start_J[person_M] + count_J[person_M], np.full(num_photos, num_photos))
        candidates = np.stack([a, b], axis=1)
    else:
        num_rounds = 1 + 2 * num // (num_people // 2)
        candidates = np.empty((0, 2), np.int64)
        while len(candidates) < num:
            # Everyone is paired with one other in each round.
            people = rng.permuted(np.tile(np.arange(num_people), (num_rounds, 1)), axis=1)[:, : num_people // 2 * 2]
            person = np.sort(people.reshape(-1, 2), axis=1)
            photo = start_J[person] + (rng.random(person.shape) * count_J[person]).astype(np.int64)
            candidates = np.stack(np.divmod(np.unique(photo[:, 0] * num_photos + photo[:, 1]), num_photos), axis=1)
            num_rounds *= 2
    candidates = rng.permutation(candidates)
    # People who are in many pairs already come last.
    turn = _occurrence(person_M[candidates].ravel()).reshape(-1, 2).max(axis=1)
    return candidates[np.argsort(turn, kind="stable")[:num]]


def _occurrence(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of equal values before each value."""
    order = np.argsort(values, kind="stable")
    count = np.bincount(values)
    occurrence = np.empty(len(values), np.int64)
    occurrence[order] = np.arange(len(values)) - (np.cumsum(count) - count)[values[order]]
    return occurrence


def _listed(first_N: NDArray[np.int64], stop_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """List every (n, m) with first[n] <= m < stop[n]."""
    length_N = stop_N - first_N
    a_P = np.repeat(np.arange(len(first_N)), length_N)
    b_P = np.arange(len(a_P)) + np.repeat(first_N - (np.cumsum(length_N) - length_N), length_N)
    return a_P, b_P
