"""Embedding passes, always without augmentation: over the validation photos, and to fill and refresh the feature store.

The workers share the rows of a pass: worker r of W takes rows r, r + W, r + 2 W, …

Shape suffixes: M rows of this worker, D dimensions of an embedding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch

from lib.device import Fetched, Upload, autocast, eager
from lib.recognition.model import EmbeddingModel, Precision, normalized_images
from lib.recognition.spec import ModelSpec
from lib.training import collective
from lib.training.control import WorkerJob
from lib.training.decoders import Decoders
from lib.training.face_cache import FaceCache
from lib.training.feature_shard import NEVER
from lib.training.feature_store import FeatureStore
from lib.training.loading import BatchLoader, LoadedBatch, LoadTask, Prefetcher

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.integer]

BATCH_SIZE, GPU_BATCH_SIZE = 64, 256
LOAD_AHEAD = 3


class EmbeddedRows(NamedTuple):
    """A batch of a pass."""

    rows_M: Ints
    embeddings_MD: Floats
    failed_M: npt.NDArray[np.bool_]
    """Crops that could not be decoded; their embeddings mean nothing."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingPass:
    """How a worker embeds rows of a cache."""

    device: torch.device
    precision: Precision
    num_threads: int
    decoders: Decoders | None = None
    """Processes that decode instead of the threads."""

    def over(
        self, rows_M: Ints, cache: FaceCache, model: EmbeddingModel, *, as_used: bool = False
    ) -> Iterator[EmbeddedRows]:
        """Yield the embeddings of the rows, in batches, in order; the model is in evaluation mode until the end.

        With `as_used` they are those that the model's users get: with mirror images, where it adds them.
        """
        size = GPU_BATCH_SIZE if self.device.type == "cuda" else BATCH_SIZE
        loader = BatchLoader(
            cache=cache,
            size=model.spec.image_size,
            level="none",
            seed=0,
            epoch=0,
            decoders=self.decoders,
            upload=Upload(self.device),
        )
        tasks = (LoadTask(rows=rows_M[start : start + size], first_draw=0) for start in range(0, len(rows_M), size))
        num_threads = self.num_threads if self.decoders is None else LOAD_AHEAD + 1
        was_training = model.training
        model.eval()
        try:
            with Prefetcher(loader, tasks, num_threads=num_threads, num_ahead=LOAD_AHEAD) as loaded:
                before: tuple[LoadedBatch, Fetched] | None = None
                for batch in loaded:
                    fetched = self._embedded(model.embedded if as_used else model, model.spec, batch, size)
                    if before is not None:
                        yield _rows(*before)  # the device works on the next batch meanwhile
                    before = batch, fetched
                if before is not None:
                    yield _rows(*before)
        finally:
            model.train(was_training)

    def _embedded(
        self, forward: Callable[[torch.Tensor], torch.Tensor], spec: ModelSpec, batch: LoadedBatch, size: int
    ) -> Fetched:
        assert batch.uploaded is not None
        crops_NHWC = batch.uploaded.tensor()
        if self.device.type == "cuda" and len(crops_NHWC) < size:
            # For another size the GPU would choose its kernels again.
            rest = size - len(crops_NHWC)
            crops_NHWC = torch.cat([crops_NHWC, crops_NHWC.new_zeros(rest, *crops_NHWC.shape[1:])])
        with torch.inference_mode(), autocast(self.device, self.precision), eager():
            return Fetched(forward(normalized_images(crops_NHWC, spec))[: len(batch.images)])

    def shared(self, rows_N: Ints, cache: FaceCache, model: EmbeddingModel, *, mark_failed: bool = False) -> Floats:
        """Return the embeddings of all rows [N, D], as users get them, on every worker; each computes its share.

        With `mark_failed`, crops that could not be decoded have NaN.
        """
        mine = rows_N[collective.rank() :: collective.num_workers()]
        parts = [np.empty((0, model.spec.embedding_dim), np.float32)]
        for batch in self.over(mine, cache, model, as_used=True):
            is_lost_M = batch.failed_M & mark_failed
            parts.append(np.where(is_lost_M[:, None], np.float32(np.nan), batch.embeddings_MD))
        return collective.interleaved(np.concatenate(parts), len(rows_N))


def _rows(batch: LoadedBatch, fetched: Fetched) -> EmbeddedRows:
    return EmbeddedRows(batch.rows, fetched.numpy(), batch.failed)


@dataclass(frozen=True, kw_only=True)
class StoreUpkeep:
    """Keeps the feature store full and fresh."""

    store: FeatureStore
    cache: FaceCache
    embedding: EmbeddingPass

    @classmethod
    def connected(cls, job: WorkerJob, cache: FaceCache, embedding: EmbeddingPass) -> Self | None:
        """Connect to the shards of the run; None if it has none."""
        if not job.num_shards:
            return None
        store = FeatureStore.connect(
            job.config.run_url, cache.labels_N, dim=job.spec.embedding_dim, num_shards=job.num_shards
        )
        return cls(store=store, cache=cache, embedding=embedding)

    def fill(self, model: EmbeddingModel, step: int) -> int:
        """Embed every photo that has no feature; return how many there were.

        Raises:
            JobError: no shard of the store answers.
        """
        missing = None
        if collective.rank() == 0:
            self.store.await_shards()
            missing = self.store.missing()
        return self._embed(missing, model, step)

    def share_means(self, epoch: int) -> None:
        """Reduce the features to the mean of each person, each worker for a range of people."""
        rank, num_workers = collective.rank(), collective.num_workers()
        self.store.share_means(epoch, len(self.cache.identities), rank=rank, num_workers=num_workers)
        collective.summed(np.ones(1))  # nobody asks for means before all have shared theirs

    def refresh(self, model: EmbeddingModel, step: int, used_rows: Ints, share: float) -> int:
        """Embed `share` of all photos again, and return how many: first those without a feature, then half photos
        that the epoch used, and half those with the oldest features.
        """
        rows = None
        if collective.rank() == 0:
            rows = self._rows_to_refresh(used_rows, share)
        return self._embed(rows, model, step)

    def _rows_to_refresh(self, used_rows: Ints, share: float) -> Ints:
        stamps_N = self.store.stamps()
        if self.cache.held is None:
            return rows_to_refresh(stamps_N, used_rows, round(share * len(stamps_N)))
        there = np.flatnonzero(self.cache.held.on_any_node_N)
        used = np.searchsorted(there, np.intersect1d(used_rows, there))
        return there[rows_to_refresh(stamps_N[there], used, round(share * len(there)))]

    def _embed(self, rows: Ints | None, model: EmbeddingModel, step: int) -> int:
        """Embed these rows, each worker a share of those that its node holds; return how many that are."""
        rows = collective.broadcast(rows)
        held = self.cache.held
        if held is None:
            rows_M = rows[collective.rank() :: collective.num_workers()]
        else:
            rows = rows[held.on_any_node_N[rows]]
            rows_M = rows[held.rows_N[rows]][held.worker :: held.num_workers]
        for batch in self.embedding.over(rows_M, self.cache, model):
            whole_M = ~batch.failed_M
            self.store.write(batch.rows_M[whole_M], batch.embeddings_MD[whole_M], step=step)
        self.store.flush()
        return len(rows)


def rows_to_refresh(stamps_N: Ints, used_rows: Ints, budget: int) -> Ints:
    """Return the rows to embed again, ascending: all without a feature, then others up to the budget."""
    oldest_first = np.argsort(stamps_N, kind="stable")
    missing = np.flatnonzero(stamps_N == NEVER)
    num_others = max(0, min(budget, len(stamps_N)) - len(missing))
    is_used_N = np.zeros(len(stamps_N), bool)
    is_used_N[used_rows] = True
    oldest_first = oldest_first[stamps_N[oldest_first] != NEVER]
    used = oldest_first[is_used_N[oldest_first]][: num_others // 2]
    chosen_N = stamps_N == NEVER
    chosen_N[used] = True
    chosen_N[oldest_first[~chosen_N[oldest_first]][: num_others - len(used)]] = True
    return np.flatnonzero(chosen_N)
