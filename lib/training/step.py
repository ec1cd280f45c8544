"""A training step: forward, loss, backward, update. It never waits for the GPU, which is some steps behind."""

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from lib import device as devices
from lib.errors import JobError
from lib.recognition.model import EmbeddingModel, normalized_images
from lib.training import collective
from lib.training.batches import TrainingBatch
from lib.training.feature_store import FeatureStore
from lib.training.losses import gather_rows
from lib.training.objective import CentreLoss, EpochSums, objective
from lib.training.settings import TrainConfig
from lib.training.state import TrainingState

CENTRES_RATE = 10
"""Default learning rate of the centres, as a multiple of the model's."""

MAX_STEPS_UNCHECKED = 32
"""Steps that a GPU may be behind. Then the oldest gradient is waited for, to see whether it is finite."""


class TrainingStep:
    """Trains the state's model on one batch a call.

    Attributes:
        was_used_N: which photos were in a batch since `begin_epoch`.
    """

    was_used_N: npt.NDArray[np.bool_]

    def __init__(
        self,
        state: TrainingState,
        config: TrainConfig,
        labels_N: npt.NDArray[np.integer],
        *,
        device: torch.device,
        store: FeatureStore | None = None,
        identities: Sequence[str] = (),
    ) -> None:
        """Train on photos with these labels. A store gets the features that steps compute anyway.

        The names of the identities are for messages.
        """
        self._identities = identities
        self._state = state
        self._config = config
        self._labels_N = labels_N
        self._device = device
        self._precision = devices.chosen_precision(config.run.precision, device)
        # The store has features of photos without augmentation.
        self._store = store if config.sampling.augment == "none" else None
        self._model: nn.Module = state.model
        if collective.num_workers() > 1:
            self._model = _distributed(state.model, device)
        self._parameters = list(state.model.parameters())
        self._norms: collections.deque[tuple[str, devices.Fetched]] = collections.deque()
        self._features: collections.deque[tuple[TrainingBatch, devices.Fetched, int]] = collections.deque()
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Put the model into training mode, and forget which photos were used."""
        self._model.train()
        self._state.train_mode()
        self.was_used_N = np.zeros(len(self._labels_N), bool)

    def __call__(
        self, batch: TrainingBatch, sums: EpochSums, lr: float, *, share: float = 1.0, is_last: bool = True
    ) -> None:
        """Train on a batch. Its gradient has this share in the update, which follows the last batch of a step.

        Raises:
            JobError: the gradient of an earlier step was not finite.
        """
        state, uploaded = self._state, batch.loaded.uploaded
        assert uploaded is not None
        with contextlib.ExitStack() as stack:
            if isinstance(self._model, DistributedDataParallel) and not is_last:
                stack.enter_context(self._model.no_sync())
            images_NCHW = normalized_images(uploaded.tensor(), state.model.spec)
            with devices.autocast(self._device, self._precision):
                raw_ND = self._model(images_NCHW, raw=True)
            embeddings_ND = functional.normalize(raw_ND, dim=1) if state.model.spec.normalize else raw_ND
            with devices.exact_products():
                centre_loss = self._centre_loss(raw_ND.detach(), lr)
                figures = objective(embeddings_ND, batch, self._labels_N, self._config, centre_loss)
            (figures.loss if share == 1 else figures.loss * share).backward()
        if is_last:
            self._update(lr)
        sums.add(figures, len(embeddings_ND))
        rows = batch.loaded.rows
        state.usage.add(*(rows if self._config.sampling.batch == "triplets" else (rows, rows, rows)))
        self.was_used_N[rows] = True
        if self._store is not None:
            self._features.append((batch, devices.Fetched(embeddings_ND), state.progress.step))
            self._write_features(wait=self._config.run.deterministic)

    def _centre_loss(self, raw_ND: Tensor, lr: float) -> CentreLoss | None:
        """Return the class-centre loss of this step, which also moves the centres."""
        state, centres = self._state, self._state.centres
        if centres is None:
            return None
        norms_N = gather_rows(torch.linalg.vector_norm(raw_ND, dim=1))
        highest = self._config.objective.center_lr or CENTRES_RATE * state.progress.lr
        return functools.partial(
            centres.loss, norms_N=norms_N, step=state.progress.step, lr=highest * lr / state.progress.lr
        )

    def settle(self) -> None:
        """Wait for all work of the device.

        Raises:
            JobError: a gradient was not finite.
        """
        self._check_norms(max_left=0)
        self._write_features(wait=True)

    def _update(self, lr: float) -> None:
        state = self._state
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, state.progress.clip_norm)
        place = f"step {state.progress.step + 1} (epoch {state.progress.epoch}, learning rate {lr:.3g})"
        self._norms.append((place, devices.Fetched(norm)))
        self._check_norms(max_left=MAX_STEPS_UNCHECKED)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        if state.averaged is not None:
            state.averaged.update()
        state.progress = dataclasses.replace(state.progress, step=state.progress.step + 1)

    def _check_norms(self, *, max_left: int) -> None:
        """Check the norms of gradients that have come from the device, and wait for all but `max_left`.

        Gradients are means over the workers, so all workers notice one that is not finite before anything is written.
        """
        while self._norms and (len(self._norms) > max_left or self._norms[0][1].is_there):
            place, norm = self._norms.popleft()
            if not np.isfinite(norm.numpy()):
                centres = self._state.centres
                identity = None if centres is None else centres.broken_identity()
                problem = "the loss is not finite"
                if identity is not None:
                    problem = f"the centre of identity {self._identities[identity]!r} is not finite"
                raise JobError(
                    f"{problem} at {place}: the last checkpoint and the best model are intact; train with "
                    "a lower --lr, or with --precision fp32, under another --name"
                )

    def _write_features(self, *, wait: bool) -> None:
        """Write the features that have come from the device into the store."""
        while self._features and (wait or self._features[0][1].is_there):
            assert self._store is not None
            batch, features, step = self._features.popleft()
            whole_N = ~batch.loaded.failed
            self._store.write(batch.loaded.rows.ravel()[whole_N], features.numpy()[whole_N], step=step)
            if self._config.run.deterministic:
                self._store.flush()


def _distributed(model: EmbeddingModel, device: torch.device) -> DistributedDataParallel:
    return DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )
