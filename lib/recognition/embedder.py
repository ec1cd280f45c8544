"""A model in use, whoever made it: aligned faces in, embeddings out.

Shape suffixes: N faces, H and W pixels, C channels, D embedding dimension.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch

from lib.errors import UserError
from lib.faces.extraction import fingerprint_differences
from lib.recognition.model import SPEC_NAME, WEIGHTS_NAME, ModelSpec, embed, load_model
from lib.storage import exists, join, read_bytes

logger = logging.getLogger(__name__)

DEFAULT_ALIGNMENT = "faces"
"""The crops of the faces table, as `lib.faces.alignment` makes them."""


class Embedder(Protocol):
    """A model in use.

    Attributes:
        url: where it came from.
        digest: short hash of its weights and of what it does with the input; not of its threshold.
        embedding_dim: length of an embedding.
        threshold: Euclidean distance at or below which two faces count as one person, None where none was chosen.
        fingerprint: how the faces it was trained on were made; empty where that is not known.
        alignment: which crops it takes: `faces` or `arcface-112`.
    """

    url: str
    digest: str
    embedding_dim: int
    threshold: float | None
    fingerprint: Mapping[str, Any]
    alignment: str

    def embed(self, crops_NHWC: np.ndarray) -> np.ndarray:
        """Return float32 embeddings_ND of uint8 RGB crops."""


class TorchEmbedder:
    """A model folder of this project as an `Embedder`.

    Raises:
        UserError: as `load_model` does; or `device` is not there.
    """

    def __init__(self, url: str, *, device: str = "cpu") -> None:
        self._model = load_model(url)
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"the model cannot run on {device!r}: torch finds no GPU here; leave --gpus out")
        self._device = device
        spec = self._model.spec
        self.url, self.digest = url, _digest(spec, read_bytes(join(url, WEIGHTS_NAME)))
        self.embedding_dim, self.threshold, self.fingerprint = spec.embedding_dim, spec.threshold, spec.fingerprint
        self.alignment = DEFAULT_ALIGNMENT

    def embed(self, crops_NHWC: np.ndarray) -> np.ndarray:
        """Return float32 embeddings_ND of uint8 RGB crops of any size."""
        return embed(self._model, crops_NHWC, device=self._device)


def load_embedder(url: str, *, device: str = "cpu") -> Embedder:
    """Return the model of a model folder, or of a run folder that holds one.

    Raises:
        UserError: there is none, or it is damaged.
    """
    return TorchEmbedder(model_folder(url), device=device)


def model_folder(url: str) -> str:
    """Return `url`, or the folder `model` in it where that is the one that holds a model."""
    within = join(url, "model")
    return within if not exists(join(url, SPEC_NAME)) and exists(join(within, SPEC_NAME)) else url


def check_fingerprint(ours: Mapping[str, Any], embedder: Embedder, *, strict: bool, next_step: str) -> list[str]:
    """Return in what the faces at hand differ from those the model was trained on, after warning of it.

    Raises:
        UserError: they differ and `strict` is set.
    """
    if not embedder.fingerprint:
        logger.warning("%s does not say how its faces were made: they may be aligned otherwise here", embedder.url)
        return []
    differences = fingerprint_differences(ours, embedder.fingerprint)
    if differences:
        message = f"the faces are not made as those {embedder.url!r} was trained on ({'; '.join(differences)})"
        if strict:
            raise UserError(f"{message}: {next_step}")
        logger.warning("%s: its threshold and figures may not hold; %s", message, next_step)
    return differences


def _digest(spec: ModelSpec, weights: bytes) -> str:
    used = {name: value for name, value in spec.to_json().items() if name not in ("threshold", "metrics", "training")}
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode() + weights).hexdigest()[:16]
