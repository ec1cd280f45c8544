"""The state of a run between two steps: model, optimiser, counts and progress. A checkpoint saves it."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch

from lib import device as devices
from lib.recognition.model import EmbeddingModel, ModelSpec
from lib.training import checkpoint_parts, checkpoints, collective
from lib.training.averaging import AveragedWeights
from lib.training.centre_store import CentreBlock, CentreStore
from lib.training.checkpoints import Checkpoint, Progress
from lib.training.freezing import checkpoint_activations, fix_statistics, freeze_stages
from lib.training.settings import TrainConfig
from lib.training.suspects import SuspectLog
from lib.training.usage import loaded_usage


class TrainingState:
    """The state of one worker.

    Attributes:
        progress: how far the run is.
        model: the model that learns.
        averaged: the average of its weights, None with `--ema 0`.
        centres: this worker's part of them, None where the loss has none.
        best_scores_P: of the validation pairs, by the best epoch; None where there is none.
        usage: how often photos were used; each worker holds the counts of its own.
        suspects: what this worker has found; a checkpoint has the findings of all workers.
    """

    def __init__(
        self,
        config: TrainConfig,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        *,
        device: torch.device,
        num_photos: int,
        is_first: bool,
        num_identities: int = 0,
        stage: int = 0,
    ) -> None:
        """Load a checkpoint. Only the first worker takes the suspects, which each worker adds to.

        The optimiser starts anew if its state is from another `stage` of the recipe, which may train other weights.

        Raises:
            UserError: there are fewer identities than workers, or a part of the checkpoint is damaged.
        """
        self._is_first = is_first
        tensors = checkpoint.tensors
        self.progress = checkpoint.progress
        self.model = EmbeddingModel(spec).to(device).to(memory_format=torch.channels_last)
        self.model.load_state_dict(checkpoints.without_prefix("model", tensors))
        freeze_stages(self.model, config.model.frozen_stages)
        if config.model.checkpoint_activations:
            checkpoint_activations(self.model)
        self.averaged = _loaded_average(config, self.model, checkpoint)
        self.optimizer = devices.adamw(
            _parameter_groups(self.model, config.optimizer.weight_decay), device, lr=self.progress.lr
        )
        optimizer = checkpoints.without_prefix("optimizer", tensors)
        if optimizer and checkpoint.progress.stage == stage:
            checkpoints.restore_optimizer(self.optimizer, optimizer)
        self.usage = loaded_usage(config.run_url, checkpoint, num_photos)
        self.suspects = SuspectLog.from_tensors(checkpoints.without_prefix("suspects", tensors) if is_first else {})
        self._random_state = tensors.get("random_state") if is_first else None
        self.best_scores_P = tensors["best_scores"].numpy().copy() if "best_scores" in tensors else None
        self.centres: CentreStore | None = None
        if config.objective.terms.centre is not None:
            self.centres = _loaded_centres(config, spec, checkpoint, device, num_identities)
        num_centres = 0 if self.centres is None else self.centres.num_identities
        self.progress = dataclasses.replace(self.progress, stage=stage, num_centres=num_centres, num_counted=num_photos)

    @property
    def evaluated(self) -> EmbeddingModel:
        """The model that is validated and saved, and that fills the feature store: the average if there is one."""
        return self.model if self.averaged is None else cast(EmbeddingModel, self.averaged.module)

    def train_mode(self) -> None:
        """Put the model into training mode; BatchNorm keeps its statistics if the run says so."""
        self.model.train()
        if self.progress.fixed_statistics:
            fix_statistics(self.model)

    def seed_torch(self, seed: int, rank: int, first_step: int) -> None:
        """Seed torch's draws, such as dropout, by seed, epoch and worker, or by the state in the checkpoint."""
        if self._random_state is not None and first_step:
            torch.set_rng_state(self._random_state)
        else:
            sequence = np.random.SeedSequence((seed, self.progress.epoch, rank, first_step))
            torch.manual_seed(int(sequence.generate_state(1)[0]))
        self._random_state = None

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Undo at the end what trial runs in training mode change: gradients, statistics and the random state."""
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        random_state = torch.get_rng_state()
        self.train_mode()
        yield
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        self.model.zero_grad(set_to_none=True)
        torch.set_rng_state(random_state)

    def save(self, run_url: str, progress: Progress, suspects: SuspectLog) -> None:
        """Write a checkpoint with the suspects of all workers.

        Every worker calls this. Each writes its own centres and counts; when all have, the first writes the rest.

        Raises:
            JobError: the storage is full or does not answer; earlier checkpoints are unchanged.
        """
        self.usage.save(run_url, progress)
        centre_norms = {}
        if self.centres is not None:
            for block in self.centres.blocks():
                checkpoint_parts.write_centres(run_url, progress, block.start, block.tensors)
            centre_norms = {"centre_norms": self.centres.norms.sums_3}
        collective.wait_for_all()
        if not self._is_first:
            return
        averaged = self.averaged.state_dict() if self.averaged is not None else {}
        checkpoints.write(
            run_url,
            progress,
            {
                **checkpoints.prefixed("model", self.model.state_dict()),
                **checkpoints.prefixed("averaged", averaged),
                **checkpoints.prefixed("optimizer", checkpoints.flat_optimizer(self.optimizer)),
                **checkpoints.prefixed("suspects", suspects.to_tensors()),
                **centre_norms,
                **({} if self.best_scores_P is None else {"best_scores": torch.from_numpy(self.best_scores_P)}),
                "random_state": torch.get_rng_state(),
            },
        )


def _loaded_average(config: TrainConfig, model: EmbeddingModel, checkpoint: Checkpoint) -> AveragedWeights | None:
    if not config.optimizer.ema:
        return None
    average = AveragedWeights(model, config.optimizer.ema)
    if tensors := checkpoints.without_prefix("averaged", checkpoint.tensors):
        average.load_state_dict(tensors)
    return average


def _loaded_centres(
    config: TrainConfig, spec: ModelSpec, checkpoint: Checkpoint, device: torch.device, num_identities: int
) -> CentreStore:
    centres = CentreStore(
        config.objective,
        num_identities=num_identities,
        dim=spec.embedding_dim,
        device=device,
        seed=config.run.seed,
        rank=collective.rank(),
        num_workers=collective.num_workers(),
    )
    if checkpoint.progress.num_centres:
        centres.norms.sums_3 = checkpoint.tensors["centre_norms"].to(device)
        for start, tensors in checkpoint_parts.read_centres(config.run_url, checkpoint.progress, centres.identities):
            centres.load(CentreBlock(start, tensors))
    return centres


def _parameter_groups(model: EmbeddingModel, weight_decay: float) -> list[dict[str, Any]]:
    """Leave norms and biases, the parameters of one dimension, without weight decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
