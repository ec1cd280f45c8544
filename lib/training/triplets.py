"""The photos of an epoch: triplets, or batches of people x photos.

Every draw depends on (seed, epoch, rank) and the labels alone, so a repeated epoch draws the same.

Shape suffixes: N photos (rows), I identities, T triplets, P people of a batch, K photos of each, M people to draw
photos of, S seeds, V neighbours of a seed.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from lib.errors import UserError
from lib.training.mining import random_negatives

Ints = npt.NDArray[np.integer]

_NO_PHOTO = np.iinfo(np.int64).max


class Confusable(Protocol):
    """Returns the people whom the model confuses with some seeds."""

    def __call__(self, seeds_S: Ints, *, num_neighbours: int) -> Ints:
        """Return for each seed identity its neighbours, nearest first, -1 for none [S, V]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Triplets:
    """Rows of the photos of each triplet, three arrays [T]."""

    anchors: Ints
    positives: Ints
    negatives: Ints

    def __len__(self) -> int:
        return len(self.anchors)


class PhotoIndex:
    """Rows grouped by identity, to find the photos of a person in constant time.

    Attributes:
        labels_N: identity number of each row.
        usable_N: False for rows that must not be drawn.
        pairable: identities with two usable photos or more, ascending.
        singles: rows of the photos whose identity has no other usable photo, ascending.
    """

    def __init__(
        self,
        labels_N: Ints,
        *,
        excluded_rows: Iterable[int] = (),
        held_N: npt.NDArray[np.bool_] | None = None,
        needs_pairs: bool = True,
    ) -> None:
        """Group the rows; `excluded_rows` (photos found corrupt), and those not `held_N`, are never drawn.

        Raises:
            UserError: there is only one identity, or pairs are needed and none has two photos.
        """
        self.labels_N = labels_N
        self.usable_N = np.ones(len(labels_N), bool) if held_N is None else held_N.copy()
        self.usable_N[list(excluded_rows)] = False
        rows = np.flatnonzero(self.usable_N).astype(np.int32)
        self._rows_by_identity = rows[np.argsort(labels_N[rows], kind="stable")]
        self._counts_I = np.bincount(labels_N[rows])
        self._starts_I = np.cumsum(self._counts_I) - self._counts_I
        self.pairable = np.flatnonzero(self._counts_I >= 2)
        self.singles = rows[self._counts_I[labels_N[rows]] == 1]
        num_identities = np.count_nonzero(self._counts_I)
        problem = ""
        if num_identities < 2:
            problem = f"the faces ({len(rows)} photos) show {num_identities} identity: a negative needs a second one"
        elif needs_pairs and not len(self.pairable):
            problem = f"none of the {num_identities} identities has two photos, which anchor and positive need"
        if problem:
            raise UserError(f"{problem}; add photos and run jobs/preprocess.py on them first")

    def num_places(self, photos_of_singles: int) -> int:
        """Return how many people a batch can have, if so many single photos take the place of one person."""
        return len(self.pairable) + (len(self.singles) // photos_of_singles if photos_of_singles else 0)

    def draw_photos(self, people_M: Ints, num_photos: int, rng: np.random.Generator) -> Ints:
        """Return `num_photos` random rows of each person [M, K].

        No photo repeats before all photos of the person were drawn. So a person with too few photos is oversampled
        evenly.
        """
        counts_M = self._counts_I[people_M]
        draws_MK = rng.random((len(people_M), num_photos))
        taken_MK = np.full(draws_MK.shape, _NO_PHOTO)
        photos_MK = np.empty(draws_MK.shape, np.int64)
        for k in range(num_photos):
            num_taken_M = k % counts_M
            taken_MK[num_taken_M == 0] = _NO_PHOTO
            photos_M = (draws_MK[:, k] * (counts_M - num_taken_M)).astype(np.int64)
            # Turn an index among the rows left into one among all: each row taken at or below it adds one.
            for taken_M in np.sort(taken_MK[:, :k], axis=1).T:
                photos_M += photos_M >= taken_M
            taken_MK[:, k] = photos_MK[:, k] = photos_M
        return self._rows_by_identity[self._starts_I[people_M][:, None] + photos_MK]


def draw_triplets(index: PhotoIndex, num_triplets: int, *, seed: int, epoch: int = 0, rank: int = 0) -> Triplets:
    """Draw triplets: two different photos of a random identity, and a photo of someone else.

    Validation calls this once, with a seed of its own, for its fixed triplets.
    """
    rng = np.random.default_rng((seed, epoch, rank))
    people_T = index.pairable[rng.integers(len(index.pairable), size=num_triplets)]
    anchors_T, positives_T = index.draw_photos(people_T, 2, rng).T
    usable_N = None if index.usable_N.all() else index.usable_N
    negatives_T = random_negatives(people_T, index.labels_N, rng=rng, filled_N=usable_N).astype(np.int32)
    return Triplets(anchors=anchors_T, positives=positives_T, negatives=negatives_T)


@dataclass(frozen=True, kw_only=True, eq=False)
class IdentityBatchSampler:
    """Draws batches of P people x K photos.

    The people come in random order, and each comes once in a round. A round leaves out the people that do not fill a
    batch at its end. With `confusable`, a share of each batch are people near to its seeds. People with one photo have
    no positive: they are left out, or K of their photos take the place of one person.
    """

    index: PhotoIndex
    num_people: int
    """P: at most the number of identities with two photos, plus groups of K singles if these take part."""
    num_photos: int
    """K: two or more; people with fewer photos are oversampled."""
    seed: int
    rank: int = 0
    confusable_share: float = 0.75
    """Share of the people that `confusable` chooses; the others are its seeds."""
    with_singles: bool = False
    """Whether people with one photo take part, in batches without confusable people."""

    def __post_init__(self) -> None:
        most = self.index.num_places(self.num_photos if self.with_singles else 0)
        if not 2 <= self.num_people <= most:
            raise UserError(
                f"{self.num_people} people a batch: allowed are 2 to {most}, "
                "the number of identities with two photos or more"
            )
        if self.num_photos < 2:
            raise UserError(f"{self.num_photos} photos of each person a batch: two or more are needed for a positive")
        if not 0 <= self.confusable_share < 1:
            raise UserError(f"a share of {self.confusable_share} confusable people: allowed is 0 up to, not with, 1")

    @property
    def num_seeds(self) -> int:
        """How many people of a batch have their neighbours in it."""
        return max(1, round(self.num_people * (1 - self.confusable_share)))

    @property
    def num_neighbours(self) -> int:
        """How many neighbours of each seed a batch has room for."""
        return -(-(self.num_people - self.num_seeds) // self.num_seeds)

    def seeds(self, epoch: int, num_batches: int, first: int = 0) -> Ints:
        """Return the seeds of the batches from number `first` on; with confusable people these are all in rounds."""
        rng = np.random.default_rng((self.seed, epoch, self.rank))
        rounds = self._rounds(rng)
        seeds = []
        for number in range(num_batches):
            people_P = next(rounds)
            self._pass_over(rng)
            if number >= first:
                seeds.append(people_P[: self.num_seeds])
        return np.concatenate(seeds) if seeds else np.empty(0, np.int64)

    def batches(
        self, epoch: int, num_batches: int, confusable: Confusable | None = None, first: int = 0
    ) -> Iterator[Ints]:
        """Yield the rows [P, K] of the batches from number `first` on; `confusable` is called for each."""
        rng = np.random.default_rng((self.seed, epoch, self.rank))
        if self.with_singles and (confusable is None or self.num_people > len(self.index.pairable)):
            yield from itertools.islice(self._with_groups(rng), first, num_batches)
            return
        rounds = self._rounds(rng)
        for number in range(num_batches):
            people_P = next(rounds)
            if number < first:
                self._pass_over(rng)
                continue
            if confusable is not None:
                people_P = self._with_confusable(people_P, confusable)
            yield self.index.draw_photos(people_P, self.num_photos, rng)

    def _pass_over(self, rng: np.random.Generator) -> None:
        """Draw as many numbers as `draw_photos` does for a batch, whoever is in it."""
        rng.random((self.num_people, self.num_photos))

    def _rounds(self, rng: np.random.Generator) -> Iterator[Ints]:
        while True:
            people = rng.permutation(self.index.pairable)
            for start in range(0, len(people) - self.num_people + 1, self.num_people):
                yield people[start : start + self.num_people]

    def _with_groups(self, rng: np.random.Generator) -> Iterator[Ints]:
        """Yield batches of people or groups of singles, each once in a round."""
        num_groups, people = len(self.index.singles) // self.num_photos, self.index.pairable
        while True:
            singles = rng.permutation(self.index.singles)[: num_groups * self.num_photos]
            groups_GK = singles.reshape(-1, self.num_photos)
            places = rng.permutation(len(people) + num_groups)
            for start in range(0, len(places) - self.num_people + 1, self.num_people):
                places_P = places[start : start + self.num_people]
                is_person_P = places_P < len(people)
                rows_PK = np.empty((self.num_people, self.num_photos), np.int64)
                rows_PK[is_person_P] = self.index.draw_photos(people[places_P[is_person_P]], self.num_photos, rng)
                rows_PK[~is_person_P] = groups_GK[places_P[~is_person_P] - len(people)]
                yield rows_PK

    def _with_confusable(self, people_P: Ints, confusable: Confusable) -> Ints:
        """Keep the first people as seeds, then their nearest, then their second nearest, …, then the other people."""
        num_seeds = self.num_seeds
        neighbours_SV = confusable(people_P[:num_seeds], num_neighbours=self.num_neighbours)
        wanted = np.concatenate([people_P[:num_seeds], neighbours_SV.T.ravel(), people_P[num_seeds:]])
        wanted = wanted[np.isin(wanted, self.index.pairable)]
        _, first_places = np.unique(wanted, return_index=True)
        return wanted[np.sort(first_places)[: self.num_people]]


def shuffled_photos(
    index: PhotoIndex, size: int, *, seed: int, epoch: int, rank: int, num_workers: int
) -> Iterator[Ints]:
    """Yield batches of photos in random order [size, 1], without end. The workers share one order of all photos."""
    order = np.random.default_rng((seed, epoch)).permutation(np.flatnonzero(index.usable_N))[rank::num_workers]
    for start in itertools.count(0, size):
        yield order[(start + np.arange(size)) % len(order)][:, None]
