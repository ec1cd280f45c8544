"""Makes new models with initial weights: from a model of this project, from a file of weights, or random."""

import dataclasses
import logging

from torch import nn

from lib.errors import UserError
from lib.recognition.model import EmbeddingModel, load_model
from lib.recognition.spec import INIT_NAMES, SPEC_NAME, WEIGHTS_SUFFIXES, ModelSpec
from lib.recognition.tensor_files import load_tensors
from lib.recognition.weights import load_pretrained
from lib.storage import exists, join

logger = logging.getLogger(__name__)


def initial_model(spec: ModelSpec, init: str) -> EmbeddingModel:
    """Return a new model in training mode whose weights `init` names; its mean and std follow the weights.

    `init` is a run or model folder of this project, or what `lib.recognition.weights.load_pretrained` takes. From a
    folder the head is taken, too, if its shapes fit. Random layers follow torch's global seed. If the backbone's
    published weights already give embeddings of the wanted length, a head of one layer starts as the identity.

    Raises:
        UserError: no such weights, or they do not fit `spec`; JobError: `hub` was asked for and does not answer.
    """
    model = EmbeddingModel(spec)
    if init not in INIT_NAMES and not init.endswith(WEIGHTS_SUFFIXES):
        return _continue_from(model, init)
    normalization = load_pretrained(model.backbone, init)
    if normalization:
        model.is_pretrained = True
        model.spec = dataclasses.replace(spec, mean=normalization.mean, std=normalization.std)
        if getattr(model.backbone, "gives_embeddings", False):
            _start_as_identity(model.head)
    return model


def _start_as_identity(head: nn.Sequential) -> None:
    """Set a head of one square layer to the identity. Other heads stay random."""
    layer = head[0]
    if len(head) == 1 and isinstance(layer, nn.Linear) and layer.in_features == layer.out_features:
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    else:
        logger.warning(
            "the head starts from random weights: with --embedding-dim 512 and no --head it gives the vectors "
            "of the file"
        )


def _continue_from(model: EmbeddingModel, init: str) -> EmbeddingModel:
    folders = [folder for folder in (init, join(init, "model")) if exists(join(folder, SPEC_NAME))]
    if not folders:
        raise UserError(
            f"--init {init!r} names no weights: give a run or model folder of this project, a file ending in "
            f"{', '.join(WEIGHTS_SUFFIXES)}, or one of {', '.join(INIT_NAMES)}"
        )
    folder = folders[0]
    earlier = load_model(folder)
    if earlier.spec.backbone != model.spec.backbone:
        raise UserError(
            f"the model at {folder!r} has the backbone {earlier.spec.backbone!r}, not {model.spec.backbone!r}: "
            f"--backbone {earlier.spec.backbone}"
        )
    load_tensors(model.backbone, earlier.backbone.state_dict(), folder)
    if earlier.spec.layer_widths == model.spec.layer_widths:
        load_tensors(model.head, earlier.head.state_dict(), folder)
    else:
        logger.warning(
            "the head starts from random weights: %s has layers of %s, this model of %s",
            folder,
            earlier.spec.layer_widths,
            model.spec.layer_widths,
        )
    if earlier.spec.flip and not model.spec.flip:
        logger.warning("%s adds mirror images, and the model that starts from it does not: --flip keeps that", folder)
    model.is_pretrained = True
    model.spec = dataclasses.replace(model.spec, mean=earlier.spec.mean, std=earlier.spec.std)
    return model
