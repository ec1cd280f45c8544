"""The centres of the identities, spread over the workers, and the class-centre loss that moves them.

Worker r of W owns one range of identities: their centres and the optimiser's state. Every worker gets the embeddings
and labels of all, and computes the logits of its own range. Then the workers exchange one number for each image, the
logarithm of its sum of exponentials. Loss, sampling and layout are those of An et al. 2022 (PartialFC).

A centre takes 12 bytes a number: the number itself and the two averages of Adam. The gradient of all centres is never
in memory at once. A range is processed in chunks, and the centres of a chunk move as soon as their gradient is known.
The logits of several chunks are computed twice, first for the sum of exponentials, then for the gradient.

Shape suffixes: N images of all workers, R identities of this worker, C identities of a chunk, S sub-centres of each,
D dimensions, W workers.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from lib.errors import UserError
from lib.training.centre_losses import NormStatistics, cosines, with_margin
from lib.training.flag_groups import LossSettings

DECAYS, EPSILON = (0.9, 0.999), 1e-8
"""Of Adam (Kingma and Ba 2015)."""

SMALLEST_CHUNK = 2**18
"""A chunk may always have this many numbers."""
NUM_CHUNKS = 96
"""Chunks of a large range. Each then needs a few percent of the memory of the range."""

DRAWN_AT_ONCE = 4096
"""Identities whose first centres come from one seed, whichever worker owns them."""
SAVED_AT_ONCE = 2**22
"""Numbers of each kind in a block of a checkpoint: 48 MB."""


def owned(num_identities: int, rank: int, num_workers: int) -> range:
    """Return the identities whose centres a worker owns."""
    return range(num_identities * rank // num_workers, num_identities * (rank + 1) // num_workers)


class CentreBlock(NamedTuple):
    """Centres of consecutive identities in a checkpoint, with their optimiser's state."""

    start: int
    """The first identity."""
    tensors: dict[str, Tensor]


class _Logits(NamedTuple):
    """Of one chunk."""

    centres_CSD: Tensor
    logits_NC: Tensor
    is_own_NC: Tensor


class CentreStore:
    """This worker's centres.

    Attributes:
        num_identities: of all workers.
        identities: the range that this worker owns.
        centres_RSD: float32.
        norms: of AdaFace; the same on every worker.
    """

    def __init__(
        self,
        settings: LossSettings,
        *,
        num_identities: int,
        dim: int,
        device: torch.device,
        seed: int,
        rank: int = 0,
        num_workers: int = 1,
    ) -> None:
        """Start with random centres of length 1, which depend on seed and identity alone.

        Raises:
            UserError: there are more workers than identities.
        """
        if num_workers > num_identities:
            raise UserError(
                f"{num_workers} workers share the centres of {num_identities} identities: ask for at most "
                f"--workers {num_identities}"
            )
        self.num_identities = num_identities
        assert settings.terms.centre is not None
        self._settings, self._loss = settings, settings.terms.centre.name
        self._seed, self._rank, self._num_workers = seed, rank, num_workers
        self.identities = owned(num_identities, rank, num_workers)
        self.norms = NormStatistics(device)
        # 0, or 1 + an identity whose centre was not finite in some step.
        self._broken = torch.zeros((), dtype=torch.float64, device=device)
        shape = (len(self.identities), settings.sub_centers, dim)
        self.centres_RSD = torch.empty(shape, device=device)
        self._means_RSD, self._squares_RSD = (torch.zeros(shape, device=device) for _ in range(2))
        self._steps_R = torch.zeros(len(self.identities), dtype=torch.int32, device=device)
        self._generator = torch.Generator(device)
        self._draw_centres()

    def _draw_centres(self) -> None:
        start, stop = self.identities.start, self.identities.stop
        for block in range(start // DRAWN_AT_ONCE, -(-stop // DRAWN_AT_ONCE)):
            generator = torch.Generator().manual_seed(_seed(self._seed, block))
            drawn = torch.randn((DRAWN_AT_ONCE, *self.centres_RSD.shape[1:]), generator=generator)
            first = block * DRAWN_AT_ONCE
            low, high = max(start, first), min(stop, first + DRAWN_AT_ONCE)
            self.centres_RSD[low - start : high - start] = drawn[low - first : high - first].to(self._broken.device)
        for part_CSD in self.centres_RSD.split(DRAWN_AT_ONCE):
            part_CSD.copy_(functional.normalize(part_CSD, dim=2))

    def loss(
        self,
        embeddings_ND: Tensor,
        labels_N: Tensor,
        norms_N: Tensor | None = None,
        *,
        step: int,
        lr: float | None,
    ) -> Tensor:
        """Return the mean over the images of the cross-entropy, and move the centres by it.

        Args:
            embeddings_ND, labels_N: of all workers, the same on each; labels below zero are left out of the loss.
            norms_N: lengths of the embeddings before scaling to 1, for adaface.
            step: with seed and worker, it decides which centres are drawn.
            lr: learning rate of the centres; None leaves them as they are.

        On each worker the gradient is that of its own centres, times the number of workers: `gather_batch` sums the
        gradients of all workers, and DDP then takes the mean.
        """
        leaf_ND = embeddings_ND.detach().requires_grad_()
        is_known_N = labels_N >= 0
        share_N = is_known_N / is_known_N.sum().clamp(min=1)
        quality_N = None
        if self._loss == "adaface":
            assert norms_N is not None
            quality_N = self.norms.quality(norms_N, is_known_N, learn=lr is not None)
        chunks = self._chunks(labels_N, step)
        sum_N, own_N, kept = self._sums(leaf_ND, chunks, labels_N, quality_N)
        for rows_C in chunks:
            if len(chunks) > 1:
                kept = None  # frees the chunk before
                with torch.enable_grad():
                    kept = self._logits(leaf_ND, rows_C, labels_N, quality_N)
            assert kept is not None
            errors_NC = (kept.logits_NC.detach() - sum_N[:, None]).exp_().sub_(kept.is_own_NC.float())
            kept.logits_NC.backward(errors_NC * share_N[:, None])
            if lr is not None:
                rate = lr * torch.isfinite(sum_N).all()
                self._move(rows_C, kept.centres_CSD, _gradient(kept.centres_CSD), rate)
        value = ((sum_N - own_N).where(is_known_N, 0) * share_N).sum()
        slope = (embeddings_ND * (_gradient(leaf_ND) * self._num_workers)).sum()
        return value + (slope - slope.detach())

    def _sums(
        self, embeddings_ND: Tensor, chunks: Sequence[Tensor], labels_N: Tensor, quality_N: Tensor | None
    ) -> tuple[Tensor, Tensor, _Logits | None]:
        """Return for each image the logarithm of the sum of exponentials over all workers, and the own logit.

        The third value are the logits of the last chunk, with a graph for the gradient if it is the only one.
        """
        kept, sums_KN, own_N = None, [], torch.zeros_like(labels_N, dtype=torch.get_default_dtype())
        for rows_C in chunks:
            kept = None  # frees the chunk before
            with torch.set_grad_enabled(len(chunks) == 1):
                kept = self._logits(embeddings_ND, rows_C, labels_N, quality_N)
            logits_NC = kept.logits_NC.detach()
            sums_KN.append(logits_NC.logsumexp(dim=1))
            own_N += (logits_NC * kept.is_own_NC).sum(dim=1)
            is_broken_C = ~kept.centres_CSD.detach().sum(dim=(1, 2)).isfinite()
            number_C = rows_C + (self.identities.start + 1)
            self._broken = torch.maximum(self._broken, number_C.where(is_broken_C, 0).max())
        return (*self._over_workers(torch.stack(sums_KN).logsumexp(dim=0), own_N), kept)

    def _logits(self, embeddings_ND: Tensor, rows_C: Tensor, labels_N: Tensor, quality_N: Tensor | None) -> _Logits:
        centres_CSD = self.centres_RSD.index_select(0, rows_C).requires_grad_(torch.is_grad_enabled())
        cosines_NC = cosines(embeddings_ND, centres_CSD)
        is_own_NC = labels_N[:, None] == rows_C + self.identities.start
        own_N = (cosines_NC * is_own_NC).sum(dim=1)  # zero where the identity is of another chunk or worker
        own_N = with_margin(own_N, self._loss, self._settings.margin_of_centres, quality_N)
        return _Logits(
            centres_CSD, self._settings.scale * torch.where(is_own_NC, own_N[:, None], cosines_NC), is_own_NC
        )

    def _chunks(self, labels_N: Tensor, step: int) -> Sequence[Tensor]:
        """Return the rows of the drawn centres, ascending; those of the images' identities are always among them."""
        num_rows, numbers = len(self.identities), max(self.centres_RSD.stride(0), len(labels_N))
        num_drawn = min(num_rows, max(round(self._settings.sample_rate * num_rows), len(labels_N)))
        rows = torch.arange(num_rows, device=labels_N.device)
        if num_drawn < num_rows:
            self._generator.manual_seed(_seed(self._seed, step, self._rank))
            priorities = torch.rand(num_rows + 1, generator=self._generator, device=labels_N.device)
            local_N = labels_N - self.identities.start
            is_here_N = (local_N >= 0) & (local_N < num_rows)
            priorities.index_fill_(0, torch.where(is_here_N, local_N, num_rows), 2.0)
            rows = priorities[:num_rows].topk(num_drawn, sorted=False).indices.sort().values
        return rows.split(max(1, max(SMALLEST_CHUNK, self.centres_RSD.numel() // NUM_CHUNKS) // numbers))

    def _over_workers(self, sum_N: Tensor, own_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logarithms of the sums over all centres, and the logits of the images' own identities."""
        if self._num_workers == 1:
            return sum_N, own_N
        mine = torch.cat([sum_N.double(), own_N.double(), self._broken[None]])
        parts = [torch.empty_like(mine) for _ in range(self._num_workers)]
        dist.all_gather(parts, mine)
        parts_WX = torch.stack(parts)
        self._broken = parts_WX[:, -1].max()
        sums_WN, own_WN = parts_WX[:, :-1].float().chunk(2, dim=1)
        return sums_WN.logsumexp(dim=0), own_WN.sum(dim=0)

    @torch.no_grad()
    def _move(self, rows_C: Tensor, centres_CSD: Tensor, gradient_CSD: Tensor, lr: Tensor) -> None:
        """Do a step of Adam, with a count of steps for each centre.

        If the loss is not finite the rate is zero, so no centre moves. Works in place to save memory.
        """
        gradient_CSD.nan_to_num_(0.0, 0.0, 0.0)
        steps_C = self._steps_R.index_select(0, rows_C) + 1
        means_CSD = self._means_RSD.index_select(0, rows_C).lerp_(gradient_CSD, 1 - DECAYS[0])
        squares_CSD = self._squares_RSD.index_select(0, rows_C).mul_(DECAYS[1])
        squares_CSD.addcmul_(gradient_CSD, gradient_CSD, value=1 - DECAYS[1])
        first_C11, second_C11 = (1 - decay ** steps_C.float()[:, None, None] for decay in DECAYS)
        way_CSD = (squares_CSD / second_C11).sqrt_().add_(EPSILON).mul_(first_C11)
        way_CSD.reciprocal_().mul_(means_CSD).mul_(lr)
        for all_RSD, new_CSD in (
            (self.centres_RSD, centres_CSD.detach().sub_(way_CSD)),
            (self._means_RSD, means_CSD),
            (self._squares_RSD, squares_CSD),
            (self._steps_R, steps_C),
        ):
            all_RSD.index_copy_(0, rows_C, new_CSD)

    def broken_identity(self) -> int | None:
        """Return an identity, of any worker, whose centre was not finite in some step; waits for the device."""
        return int(self._broken) - 1 if self._broken else None

    def blocks(self) -> Iterator[CentreBlock]:
        """Yield the centres in order of identities, on the CPU, a few at a time."""
        size = max(1, SAVED_AT_ONCE // self.centres_RSD.stride(0))
        for first in range(0, len(self.identities), size):
            yield CentreBlock(
                self.identities[first],
                {name: tensor[first : first + size].cpu() for name, tensor in self._tensors().items()},
            )

    def load(self, block: CentreBlock) -> None:
        """Load the centres of the block that this worker owns."""
        num = len(block.tensors["steps"])
        low, high = max(self.identities.start, block.start), min(self.identities.stop, block.start + num)
        if low < high:
            for name, tensor in self._tensors().items():
                part = block.tensors[name][low - block.start : high - block.start]
                tensor[low - self.identities.start : high - self.identities.start] = part.to(tensor.device)

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "centres": self.centres_RSD,
            "means": self._means_RSD,
            "squares": self._squares_RSD,
            "steps": self._steps_R,
        }


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
