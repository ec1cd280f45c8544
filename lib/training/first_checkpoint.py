"""The first checkpoint of a run: the initial weights and what depends on them, written before any worker starts."""

import logging
from typing import Any

import torch

from lib import storage
from lib.errors import UserError
from lib.recognition.initial_weights import initial_model
from lib.recognition.spec import ModelSpec
from lib.training import checkpoints
from lib.training.checkpoints import CONFIG_NAME, SPEC_NAME, Progress
from lib.training.freezing import can_freeze, checkpoint_activations, freeze_stages, has_statistics
from lib.training.schedule import PRETRAINED_CLIP_NORM, RANDOM_CLIP_NORM, first_phase, usual_lr
from lib.training.settings import TrainConfig

logger = logging.getLogger(__name__)


def begin(config: TrainConfig, plan: dict[str, Any], spec: ModelSpec) -> ModelSpec:
    """Write the first checkpoint, with the initial weights, and the configuration; return the model's spec."""
    torch.manual_seed(config.run.seed)
    model = initial_model(spec, config.init)
    freeze_stages(model, config.model.frozen_stages)  # the workers do both again; impossible settings are refused here
    if config.model.checkpoint_activations:
        checkpoint_activations(model)
    fixed = config.model.batch_norm != "batch" and has_statistics(model)
    if config.model.batch_norm == "fixed" and not fixed:
        raise UserError(f"--batch-norm fixed: the weights of {spec.backbone} come with no statistics: use batch")
    clip_norm = config.optimizer.clip_norm or (PRETRAINED_CLIP_NORM if model.is_pretrained else RANDOM_CLIP_NORM)
    lr = config.lr or usual_lr(is_pretrained=model.is_pretrained, has_batch_norm=has_statistics(model))
    logger.info("peak learning rate %g; gradients are clipped at a norm of %g", lr, clip_norm)
    storage.check_writable(config.run_url)
    phase = first_phase(config.negatives)
    frozen = [] if config.staged is None else [stage.settings.get("frozen_stages") for stage in config.staged.stages]
    progress = Progress(
        epoch=1,
        negatives=phase.negatives,
        phase_first_epoch=phase.first_epoch,
        fixed_statistics=fixed,
        clip_norm=clip_norm,
        lr=lr,
        may_freeze=model.is_pretrained and all(can_freeze(model, num) for num in frozen if num),
    )
    checkpoints.write(config.run_url, progress, checkpoints.prefixed("model", model.state_dict()))
    storage.write_json(storage.join(config.run_url, checkpoints.FOLDER, SPEC_NAME), model.spec.to_json())
    storage.write_json(storage.join(config.run_url, CONFIG_NAME), plan)
    return model.spec
