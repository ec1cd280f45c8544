"""A model in use, from this project or elsewhere: turns aligned faces into embeddings.

Shape suffixes: N faces, H and W pixels, C channels, D embedding dimension.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Protocol

import numpy as np
import torch
import tyro

from lib import cluster
from lib import device as devices
from lib.config import absolute_url
from lib.errors import UserError
from lib.faces.alignment import ARCFACE, EYES, Alignment
from lib.faces.extraction import ExtractionSettings, fingerprint_differences, settings_from_fingerprint
from lib.layout import Layout
from lib.recognition.compiling import repeated_blocks
from lib.recognition.face_weights import read_face_weights
from lib.recognition.model import EmbeddingModel, built_model, embed, normalized_images, read_model
from lib.recognition.onnx_model import ARCFACE_SIZE, OnnxInput, OnnxModel
from lib.recognition.onnx_session import runtime_knows_gpus
from lib.recognition.spec import SPEC_NAME, WEIGHTS_SUFFIXES, ModelSpec
from lib.storage import exists, join, list_files, redacted

logger = logging.getLogger(__name__)

COMPILING_PAYS = 1_000_000
"""Compiling pays from this many faces per GPU on. It takes up to a minute and saves tens of microseconds per face."""

FlipFlag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""--flip and --no-flip are two flags, because a third case exists: neither of them, which leaves it to the model."""

Pending = Callable[[], np.ndarray]
"""Waits until the device has computed the embeddings_ND, and returns them."""


class Embedder(Protocol):
    """A model in use.

    Attributes:
        url: where it came from.
        digest: short hash of its weights and its treatment of the input. The threshold is not part of it.
        embedding_dim: length of an embedding.
        threshold: Euclidean distance up to which two faces count as one person. None if none was chosen.
        fingerprint: how its training faces were made. Empty if unknown.
        template: the template of `lib.faces.alignment` for its crops.
        flip: whether an embedding adds that of the mirror image.
    """

    url: str
    digest: str
    embedding_dim: int
    threshold: float | None
    fingerprint: Mapping[str, Any]
    template: str
    flip: bool

    def embed(self, crops_NHWC: np.ndarray) -> np.ndarray:
        """Return float32 embeddings_ND of uint8 RGB crops."""

    def buffer(self, num: int) -> np.ndarray:
        """Return an uninitialised array for `num` crops of the model's size, uint8 [N, S, S, 3]."""

    def launch(self, crops_NHWC: np.ndarray) -> Pending:
        """Start to embed crops of `buffer`. They must not change until the embeddings are there."""


class TorchEmbedder:
    """A model folder of this project, or a file of published weights, as an `Embedder`.

    Args:
        url: of the folder or the file.
        onnx: what the weights of a file were trained on.
        device: `cpu` or `cuda`.
        precision: its arithmetic.
        flip: whether to add mirror images. None leaves it to the model.

    Raises:
        UserError: as `load_model` and `read_face_weights` do; or `device` does not exist.
    """

    def __init__(
        self,
        url: str,
        onnx: OnnxInput | None = None,
        *,
        device: str = "cpu",
        precision: cluster.Precision = "fp32",
        flip: bool | None = None,
    ) -> None:
        opened = open_model(url, onnx or OnnxInput(), flip)
        self._model, spec = opened.model, opened.model.spec
        self.is_folder, self.own_flip = opened.is_folder, opened.own_flip
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"the model cannot run on {device!r}: torch finds no GPU here; leave --gpus out")
        self._device = torch.device(device)
        self._model.to(self._device).to(memory_format=torch.channels_last)
        self._precision = devices.chosen_precision(precision, self._device)
        self._upload = devices.Upload(self._device)
        self.url, self.digest, self.template = url, opened.digest, opened.template
        self.embedding_dim, self.threshold, self.fingerprint = spec.embedding_dim, spec.threshold, spec.fingerprint
        self.flip = spec.flip

    def embed(self, crops_NHWC: np.ndarray) -> np.ndarray:
        """Return float32 embeddings_ND of uint8 RGB crops of any size."""
        return embed(self._model, crops_NHWC, device=self._device, precision=self._precision)

    def buffer(self, num: int) -> np.ndarray:
        """Return an uninitialised array for `num` crops. For a GPU it is in pinned memory."""
        return self._upload.empty(num, self._model.spec.image_size, self._model.spec.image_size, 3)

    def launch(self, crops_NHWC: np.ndarray) -> Pending:
        """Start to embed crops of `buffer`. A GPU computes while the caller goes on."""
        uploaded = self._upload(crops_NHWC)
        with torch.inference_mode(), devices.autocast(self._device, self._precision):
            images_NCHW = normalized_images(uploaded.tensor(), self._model.spec)
            return devices.Fetched(self._model.embedded(images_NCHW)).numpy

    def compile(self, asked: cluster.Compile, *, size: int, pays: bool) -> bool:
        """Compile the model for batches of this size, if that pays and works. Return whether it is compiled."""
        try:
            return devices.compile_module(
                self._model,
                asked,
                self._device,
                lambda: self.launch(np.zeros_like(self.buffer(size)))(),
                pays=pays,
                parts=repeated_blocks(self._model.backbone),
            )
        except torch.OutOfMemoryError:
            logger.warning("not compiled (the GPU has no memory for %d faces at once): the model runs as it is", size)
        devices.free_memory()
        return False


def load_embedder(
    url: str,
    onnx: OnnxInput | None = None,
    *,
    device: str = "cpu",
    precision: cluster.Precision = "fp32",
    flip: bool | None = None,
) -> Embedder:
    """Return the model of a model folder, of a run folder that holds one, of published weights, or of an .onnx file.

    `onnx` describes the input of a file from elsewhere. Files of this project describe their own input. An ONNX file
    computes in its own arithmetic. `flip` says whether to add mirror images. None leaves it to the model.

    Raises:
        UserError: it does not exist, it is damaged, or `flip` cannot be had.
    """
    if url.endswith(".onnx"):
        return OnnxModel(url, onnx or OnnxInput(), device=device, flip=flip)
    return TorchEmbedder(model_folder(url), onnx, device=device, precision=precision, flip=flip)


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model folder or a file of published weights, ready for use.

    Attributes:
        model: in eval mode, on the CPU, with or without mirror images as requested.
        digest: see `Embedder`.
        template: template of its crops.
        own_flip: whether the model itself adds mirror images.
        is_folder: whether it is a folder, which can keep a threshold.
    """

    model: EmbeddingModel
    digest: str
    template: str
    own_flip: bool
    is_folder: bool


def open_model(url: str, onnx: OnnxInput, flip: bool | None) -> OpenedModel:
    """Return the model of a folder or of a file of weights, see `TorchEmbedder`."""
    is_folder = not url.endswith(WEIGHTS_SUFFIXES)
    if is_folder:
        spec, content = read_model(url)
        model = built_model(spec, content, url)
        template = spec.fingerprint.get("template", EYES)
    else:
        model, content = read_face_weights(url, onnx)
        template = ARCFACE if onnx.alignment == ARCFACE else EYES
    own_flip = model.spec.flip
    model.spec = with_flip(model.spec, flip)
    digest = _digest(model.spec, content)
    return OpenedModel(model=model, digest=digest, template=template, own_flip=own_flip, is_folder=is_folder)


def chosen_flip(flip: bool, no_flip: bool) -> bool | None:
    """Return whether --flip or --no-flip is given. None leaves it to the model.

    Raises:
        UserError: both are given.
    """
    if flip and no_flip:
        raise UserError("--flip and --no-flip are both given: choose one")
    return True if flip else False if no_flip else None


def with_flip(spec: ModelSpec, flip: bool | None) -> ModelSpec:
    """Return the model with or without mirror images. None leaves it as it is. A change drops the threshold.

    Raises:
        UserError: the model gives raw vectors.
    """
    if flip is None or flip == spec.flip:
        return spec
    if flip and not spec.normalize:
        raise UserError("--flip gives vectors of length 1, and this model raw ones (--no-normalize): leave --flip out")
    return replace(spec, flip=flip, threshold=None, metrics={})


def chosen_gpus(url: str, asked: cluster.Gpus) -> int:
    """Return how many GPUs of the cluster to use for a model. It is 0 for an ONNX file that cannot use any."""
    if asked and cluster.num_gpus() and url.endswith(".onnx") and not runtime_knows_gpus():
        logger.warning("%s runs on the CPUs: this ONNX Runtime has no GPU support", redacted(url))
        asked = 0
    return cluster.chosen_gpus(asked)


def model_folder(url: str) -> str:
    """Return `url`, or its folder `model` if that holds the model."""
    if url.endswith(WEIGHTS_SUFFIXES):
        return url
    within = join(url, "model")
    return within if not exists(join(url, SPEC_NAME)) and exists(join(within, SPEC_NAME)) else url


def find_model(layout: Layout, given: str | None) -> str:
    """Return the model that a flag names, or the only one in the runs of `layout`.

    Raises:
        UserError: there is no flag, and not exactly one run with a model.
    """
    if given is not None:
        return model_folder(absolute_url(given, "--model"))
    runs = layout.runs()
    found = [info.path for info in list_files(runs, suffix=f"/model/{SPEC_NAME}")]
    if len(found) != 1:
        several = ", ".join(path.removesuffix(f"/model/{SPEC_NAME}") for path in found)
        what = f"{len(found)} runs in {runs} have a model ({several})" if found else f"no run in {runs} has a model yet"
        raise UserError(f"{what}: name one by --model, or make one with jobs/train.py")
    return join(runs, found[0].removesuffix(f"/{SPEC_NAME}"))


def extraction_settings(embedder: Embedder, detector_weights: str | None = None) -> ExtractionSettings:
    """Return how to detect and align faces for a model: as its training faces were."""
    weights = detector_weights and absolute_url(detector_weights, "--detector-weights")
    settings = settings_from_fingerprint(embedder.fingerprint, detector_weights=weights)
    if embedder.template == settings.alignment.template:
        return settings
    return replace(settings, alignment=Alignment(template=embedder.template, image_size=ARCFACE_SIZE))


def check_fingerprint(ours: Mapping[str, Any], embedder: Embedder, *, strict: bool, next_step: str) -> list[str]:
    """Warn if these faces were made with other settings than the model's training faces; return the differences.

    Raises:
        UserError: they differ and `strict` is set.
    """
    if not embedder.fingerprint and embedder.template != EYES:
        return []  # a public template says how to align, and nothing more is known
    if not embedder.fingerprint:
        logger.warning("%s does not say how its faces were made: the alignment here may differ", embedder.url)
        return []
    # The number of faces taken per photo changes none of them.
    known = {**embedder.fingerprint, "faces_policy": ours.get("faces_policy")}
    differences = fingerprint_differences(ours, known)
    if differences:
        message = f"the faces are not made as those {embedder.url!r} was trained on ({'; '.join(differences)})"
        if strict:
            raise UserError(f"{message}: {next_step}")
        logger.warning("%s: its threshold and metrics may not apply; %s", message, next_step)
    return differences


def _digest(spec: ModelSpec, weights: bytes) -> str:
    used = {name: value for name, value in spec.to_json().items() if name not in ("threshold", "metrics", "training")}
    return hashlib.sha256(json.dumps(used, sort_keys=True).encode() + weights).hexdigest()[:16]
