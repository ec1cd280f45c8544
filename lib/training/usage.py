"""How often each photo was used. Every worker counts what it trains on, and holds the counts of its own photos alone.

The photos are counted in blocks, which the workers own. A block has the same photos with any number of workers, so a
run goes on with another number. A table of up to `BLOCK_PHOTOS` photos is one block, of the last worker.

Shape suffixes: N photos (rows), M photos of this worker, B photos of a block, X uses.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from lib import storage
from lib.training import checkpoint_parts, collective
from lib.training.centre_store import owned
from lib.training.checkpoints import Checkpoint, Progress

Counts = npt.NDArray[np.int32]
Ints = npt.NDArray[np.integer]

ROLES = ("anchor", "positive", "negative")

BLOCK_PHOTOS = 1 << 20
"""Photos of a block: 12 MB of counts."""

MOST_PENDING = 1 << 22
"""Uses that are kept one by one, before equal ones become a number."""


class UsageCounter:
    """How often each photo was anchor, positive and negative.

    Attributes:
        num_photos: of all workers.
        blocks: the numbers of this worker's blocks.
        photos: their rows.
        counts_3M: int32, a row for each of `ROLES`, as of the last `settle`.
    """

    def __init__(self, num_photos: int) -> None:
        """Start with zeros. A use is counted on the worker that trained, until `settle` tells the photo's owner."""
        self.num_photos = num_photos
        num_blocks = -(-num_photos // BLOCK_PHOTOS)
        rank, num_workers = collective.rank(), collective.num_workers()
        starts = [owned(num_blocks, each, num_workers).start for each in range(num_workers)]
        self._bounds = np.minimum(np.array([*starts, num_blocks]) * BLOCK_PHOTOS, num_photos)
        self.blocks = owned(num_blocks, rank, num_workers)
        self.photos = range(*self._bounds[rank : rank + 2].tolist())
        self.counts_3M = np.zeros((len(ROLES), len(self.photos)), np.int32)
        self._pending: list[tuple[Ints, Ints]] = []
        self._num_pending = 0

    def add(self, anchors: Ints, positives: Ints, negatives: Ints) -> None:
        """Count the rows of some triplets."""
        for role, rows in enumerate((anchors, positives, negatives)):
            keys_X = role * self.num_photos + rows.ravel().astype(np.int64)
            self._pending.append((keys_X, np.ones_like(keys_X)))
            self._num_pending += len(keys_X)
        if self._num_pending > MOST_PENDING:
            self._pending = [self._joined()]
            self._num_pending = 0

    def settle(self) -> None:
        """Tell the owners what this worker has counted. Every worker calls this."""
        keys_X, uses_X = self._joined()
        self._pending, self._num_pending = [], 0
        if collective.num_workers() > 1:
            owners_X = np.searchsorted(self._bounds, keys_X % self.num_photos, side="right") - 1
            order_X = np.argsort(owners_X, kind="stable")
            counts_W = np.bincount(owners_X, minlength=collective.num_workers())
            received_X2 = collective.exchanged(np.stack([keys_X, uses_X], axis=1)[order_X], counts_W)
            keys_X, uses_X = received_X2.T
        roles_X, rows_X = np.divmod(keys_X, self.num_photos)
        np.add.at(self.counts_3M, (roles_X, rows_X - self.photos.start), uses_X.astype(np.int32))

    def _joined(self) -> tuple[Ints, Ints]:
        """Return what waits for `settle`: each role and row once, as role * N + row, and how often it was used."""
        if not self._pending:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        keys_X, uses_X = (np.concatenate(each) for each in zip(*self._pending, strict=True))
        distinct_X, places_X = np.unique(keys_X, return_inverse=True)
        sums_X = np.zeros(len(distinct_X), np.int64)
        np.add.at(sums_X, places_X, uses_X)
        return distinct_X, sums_X

    def statistics(self) -> dict[str, float]:
        """Return the mean and standard deviation of the use count of the photos used, and how many were used.

        Of all workers; every worker calls this.
        """
        self.settle()
        uses_M = self.counts_3M.sum(axis=0, dtype=np.int64)
        used = uses_M[uses_M > 0]
        sums = collective.summed(np.array([len(used), used.sum(), np.square(used).sum()], np.int64))
        num, total, squares = sums.tolist()  # integers, so that no number of workers changes a digit
        return {
            "mean_uses": total / num if num else 0.0,
            "std_uses": (num * squares - total**2) ** 0.5 / num if num else 0.0,
            "num_photos_used": num,
            "share_never_used": 1 - num / max(self.num_photos, 1),
        }

    def save(self, run_url: str, progress: Progress) -> None:
        """Write this worker's part of a checkpoint. Every worker calls this.

        Raises:
            JobError: the storage is full or does not answer.
        """
        self.settle()
        for block, counts_3B in self._block_counts():
            checkpoint_parts.write_usage(run_url, progress, block, torch.from_numpy(counts_3B))

    def load(self, run_url: str, checkpoint: Checkpoint) -> None:
        """Read the counts of this worker's photos from a checkpoint of any number of workers.

        Raises:
            UserError: a part of the checkpoint is damaged or missing.
        """
        if "usage" in checkpoint.tensors:  # an older version had the counts inside
            self.counts_3M[:] = checkpoint.tensors["usage"].numpy()[:, self.photos.start : self.photos.stop]
        elif checkpoint.progress.num_counted:
            for block, counts_3B in self._block_counts():
                counts = checkpoint_parts.read_usage(run_url, checkpoint.progress, block, counts_3B.shape)
                counts_3B[:] = counts.numpy()

    def _block_counts(self) -> Iterator[tuple[int, Counts]]:
        """Yield each block of this worker with its counts [3, B]."""
        for block in self.blocks:
            start = block * BLOCK_PHOTOS - self.photos.start
            yield block, self.counts_3M[:, start : start + BLOCK_PHOTOS]

    def write(self, run_url: str, photos: pa.ChunkedArray) -> None:
        """Write `usage.parquet`, with the names of the photos, on worker 0. Every worker calls this after `settle`."""
        parts = collective.in_turn(self.counts_3M.T)
        if parts is not None:
            counts_3N = np.concatenate(parts).T
            if counts_3N.any():
                storage.write_parquet(storage.join(run_url, "usage.parquet"), usage_table(photos, counts_3N))


def loaded_usage(run_url: str, checkpoint: Checkpoint, num_photos: int) -> UsageCounter:
    """Return the counts of this worker's photos in a checkpoint; zeros where there are none."""
    usage = UsageCounter(num_photos)
    usage.load(run_url, checkpoint)
    return usage


def usage_table(photos: pa.Array | pa.ChunkedArray, counts_3N: Counts) -> pa.Table:
    """Return the counts with the names of the photos, the content of `usage.parquet`."""
    counts = {role: pa.array(counts_N) for role, counts_N in zip(ROLES, counts_3N, strict=True)}
    return pa.table({"photo": photos, **counts})
