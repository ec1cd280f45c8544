"""The batches of an epoch: photos loaded ahead of the step, with the negatives that the feature store finds.

Rows of a batch have the shape [3, T] (anchors, positives, negatives), [P, K] (people x photos) or [N, 1] (photos).

Shape suffixes: T triplets of a step, P people, K photos of each, Q stored vectors, D dimensions of an embedding.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt

from lib.device import Upload
from lib.training import mining
from lib.training.confusable import confusable_people
from lib.training.decoders import Decoders
from lib.training.face_cache import FaceCache
from lib.training.feature_store import FeatureStore
from lib.training.loading import BatchLoader, LoadedBatch, LoadTask, Prefetcher
from lib.training.settings import TrainConfig
from lib.training.suspects import SuspectLog
from lib.training.triplets import Confusable, IdentityBatchSampler, PhotoIndex, draw_triplets, shuffled_photos

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.integer]

Answered = TypeVar("Answered")

LOAD_AHEAD = 3
"""Batches that load while a step computes."""
PROCESSES_LOAD_AHEAD = 7
"""The same for loading by processes, where steps are short."""
ASK_AHEAD = 1
"""Searches in the store that run ahead of those."""


class StoredVectors(NamedTuple):
    """Features from the store that join a batch as negatives."""

    vectors_QD: Floats
    labels_Q: Ints
    """-1 for a photo that has no feature."""


class TrainingBatch(NamedTuple):
    """What a step trains on."""

    loaded: LoadedBatch
    stored: StoredVectors | None


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """Which part of which epoch this worker trains on."""

    config: TrainConfig
    epoch: int
    rank: int
    first_step: int
    num_steps: int
    """Of the whole epoch; those before `first_step` were done earlier."""
    negatives: str
    num_workers: int = 1

    @property
    def is_mined(self) -> bool:
        """Whether the epoch searches the feature store."""
        return self.negatives != "random"


class EpochBatches:
    """Iterates over the batches of an epoch, in a `with` block.

    Every batch depends on the plan alone, and on the features in the store if the epoch searches it. So an epoch that
    is repeated or resumed draws the same.
    """

    def __init__(
        self,
        plan: EpochPlan,
        cache: FaceCache,
        index: PhotoIndex,
        *,
        image_size: int,
        num_threads: int,
        store: FeatureStore | None,
        suspects: SuspectLog,
        decoders: Decoders | None = None,
        upload: Upload | None = None,
    ) -> None:
        """Load with threads, or with `decoders` if there are any, and send the images to the device of `upload`."""
        self._plan = plan
        self._cache = cache
        self._index = index
        self._store = store if plan.is_mined else None
        self._suspects = suspects
        self._device = upload.device if upload else None
        self._exit = ExitStack()
        # In a deterministic run nothing may depend on timing.
        self._ask_ahead = 0 if plan.config.run.deterministic else ASK_AHEAD
        self._questions: list[Prefetcher[int, Any]] = []
        loader = BatchLoader(
            cache=cache,
            size=image_size,
            level=plan.config.sampling.augment,
            seed=plan.config.run.seed,
            epoch=plan.epoch,
            rank=plan.rank,
            decoders=decoders,
            upload=upload,
        )
        num_ahead = LOAD_AHEAD if decoders is None else PROCESSES_LOAD_AHEAD
        self._loading: Prefetcher[LoadTask, LoadedBatch] = Prefetcher(
            loader,
            self._tasks(),
            num_threads=num_threads if decoders is None else num_ahead + 1,  # which then only wait
            num_ahead=num_ahead,
        )
        self._stored: Prefetcher[int, StoredVectors] | None = None
        if self._store and plan.config.sampling.batch == "identities" and plan.config.mining.stored_negatives:
            self._stored = self._asking(self._stored_vectors)

    def __enter__(self) -> Self:
        self._exit.enter_context(self._loading)
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def __iter__(self) -> Iterator[TrainingBatch]:
        for loaded in self._loading:
            yield TrainingBatch(loaded, next(self._stored) if self._stored else None)

    @property
    def store_wait_s(self) -> float:
        """Seconds that the step has waited for the store."""
        return sum(questions.wait_s for questions in self._questions)

    @property
    def data_wait_s(self) -> float:
        """Seconds that the step has waited for crops."""
        # The wait for the store happens while the task of a batch is drawn.
        in_tasks = sum(questions.wait_s for questions in self._questions if questions is not self._stored)
        return self._loading.wait_s - in_tasks

    def _asking(self, answer: Callable[[int], Answered]) -> Prefetcher[int, Answered]:
        """Search the store for every step, one step ahead."""
        steps = range(self._plan.first_step, self._plan.num_steps)
        questions = Prefetcher(answer, steps, num_threads=1, num_ahead=self._ask_ahead)
        self._questions.append(questions)
        return self._exit.enter_context(questions)

    def _tasks(self) -> Iterator[LoadTask]:
        kinds = {"triplets": self._triplet_rows, "identities": self._people_rows, "photos": self._photo_rows}
        rows = kinds[self._plan.config.sampling.batch]()
        for step, batch in enumerate(rows, start=self._plan.first_step):
            yield LoadTask(rows=batch, first_draw=step * batch.size)

    def _triplet_rows(self) -> Iterator[Ints]:
        plan, size = self._plan, self._plan.config.anchors_per_step(self._index)
        drawn = draw_triplets(
            self._index, plan.num_steps * size, seed=plan.config.run.seed, epoch=plan.epoch, rank=plan.rank
        )
        rows_3N = np.stack([drawn.anchors, drawn.positives, drawn.negatives])
        batches = (rows_3N[:, step * size : (step + 1) * size] for step in range(plan.first_step, plan.num_steps))
        if self._store is None:
            return batches
        return self._asking(lambda step: self._mined(rows_3N[:, step * size : (step + 1) * size], step))

    def _mined(self, rows_3T: Ints, step: int) -> Ints:
        """Return the triplets with the negatives that the store finds; the drawn ones stay if it finds none."""
        plan, store = self._plan, self._store
        assert store is not None
        anchors_T, positives_T, random_T = rows_3T
        queries_TD, known_T = store.read(anchors_T)
        positives_TD = store.read(positives_T)[0] if plan.negatives == "semihard" else None
        found = store.search(
            queries_TD,
            self._index.labels_N[anchors_T],
            policy=plan.negatives,  # type: ignore[arg-type]
            num_candidates=plan.config.mining.candidates,
            seed=self._seed(step),
            positives_BD=positives_TD,
            ceiling=plan.config.mining.ceiling,
            among_N=None if self._cache.held is None else self._index.usable_N,
        ).result()
        self._suspects.add(anchors_T[found.suspects.anchors], found.suspects.rows, found.suspects.similarities)
        is_mined_T = known_T & (found.rows != mining.NO_ROW)
        return np.stack([anchors_T, positives_T, np.where(is_mined_T, found.rows, random_T)])

    def _photo_rows(self) -> Iterator[Ints]:
        plan = self._plan
        batches = shuffled_photos(
            self._index,
            plan.config.anchors_per_step(self._index),
            seed=plan.config.run.seed,
            epoch=plan.epoch,
            rank=plan.rank,
            num_workers=plan.num_workers,
        )
        return itertools.islice(batches, plan.first_step, plan.num_steps)

    def _people_rows(self) -> Iterator[Ints]:
        plan = self._plan
        sampler = IdentityBatchSampler(
            index=self._index,
            num_people=plan.config.people_per_batch(self._index),
            num_photos=plan.config.sampling.photos_per_person,
            seed=plan.config.run.seed,
            rank=plan.rank,
            confusable_share=plan.config.mining.confusable_share,
            with_singles=bool(plan.config.photos_of_singles),
        )
        if self._store is None or not plan.config.fills_batches_with_confusable_people(plan.negatives):
            return sampler.batches(plan.epoch, plan.num_steps, first=plan.first_step)
        drawn: Iterator[Ints] | None = None

        def next_rows(_: int) -> Ints:
            nonlocal drawn
            if drawn is None:
                confusable = self._confusable(sampler)
                drawn = sampler.batches(plan.epoch, plan.num_steps, confusable, plan.first_step)
            return next(drawn)

        return self._asking(next_rows)  # on its one thread, one step after the other

    def _confusable(self, sampler: IdentityBatchSampler) -> Confusable:
        """Look up the neighbours of all seeds that are to come, and return what answers with them."""
        plan, store = self._plan, self._store
        assert store is not None
        seeds_J = np.unique(sampler.seeds(plan.epoch, plan.num_steps, plan.first_step))
        neighbours_JT = confusable_people(
            seeds_J,
            store.means(plan.epoch),
            num_neighbours=sampler.num_neighbours,
            device=self._device,
            among_I=None if self._cache.held is None else self._cache.held.people_I,
        )

        def confusable(seeds_S: Ints, *, num_neighbours: int) -> Ints:
            return neighbours_JT[np.searchsorted(seeds_J, seeds_S), :num_neighbours]

        return confusable

    def _stored_vectors(self, step: int) -> StoredVectors:
        assert self._store is not None
        rng = np.random.default_rng(self._seed(step))
        rows_Q = rng.integers(len(self._cache), size=self._plan.config.mining.stored_negatives)
        vectors_QD, known_Q = self._store.read(rows_Q)
        return StoredVectors(vectors_QD, np.where(known_Q, self._cache.labels_N[rows_Q], -1))

    def _seed(self, step: int) -> int:
        sequence = np.random.SeedSequence((self._plan.config.run.seed, self._plan.epoch, self._plan.rank, step))
        return int(sequence.generate_state(1, np.uint64)[0])
