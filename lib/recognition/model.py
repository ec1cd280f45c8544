"""The embedding model: a timm backbone, a small head, and everything needed to use it, in one folder.

Shape suffixes: N images, C channels, H height, W width, D embedding dimension.
"""

import dataclasses
import difflib
import functools
import hashlib
import logging
import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Literal

import cv2
import numpy as np
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

from lib.errors import UserError
from lib.imports import quick_imports
from lib.recognition.model_card import model_card
from lib.recognition.spec import SPEC_NAME, WEIGHTS_KEY, ModelSpec
from lib.recognition.tensor_files import load_tensors, read_weights, tensors_of
from lib.storage import exists, join, read_json, write_bytes, write_json

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"

REPLACED_WITHIN_S = (0.5, 1.0, 2.0)
"""Pauses before a folder with files of two models is read again. A training may be replacing them."""

VALIDATION_SPLIT = "val"
"""Value of `split` in the metrics of a model that only training has measured."""

Precision = Literal["fp32", "bf16"]


class EmbeddingModel(nn.Module):
    """A timm backbone with a head that turns its pooled features into embeddings.

    The head is linear layers with ReLU between them. It has no norm of its own. timm's ConvNeXt applies LayerNorm to
    its pooled features, so its default head is LayerNorm and Linear.

    Attributes:
        is_pretrained: whether `initial_model` found weights for the backbone.

    Raises:
        UserError: timm does not know the backbone, or the backbone does not take the image size.
    """

    is_pretrained = False

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.backbone, num_features = _create_backbone(spec.backbone, spec.image_size)
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise((num_features, *spec.layer_widths)):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        self.head = nn.Sequential(*layers[:-1])

    def forward(self, images_NCHW: torch.Tensor, *, raw: bool = False) -> torch.Tensor:
        """Return float32 embeddings_ND of images from `normalized_images`. With `raw` they are not scaled."""
        embeddings_ND = self.head(self.backbone(images_NCHW)).float()
        return functional.normalize(embeddings_ND, dim=1) if self.spec.normalize and not raw else embeddings_ND

    def embedded(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Return the embeddings_ND for users of the model. Training uses `forward`.

        With `spec.flip`, an embedding is the sum of the raw vectors of an image and of its mirror image, scaled to
        length 1, as in InsightFace's `eval/verification.py`.
        """
        if not self.spec.flip:
            embeddings_ND: torch.Tensor = self(images_NCHW)
            return embeddings_ND
        return functional.normalize(self(images_NCHW, raw=True) + self(images_NCHW.flip(3), raw=True), dim=1)


def _create_backbone(name: str, image_size: int) -> tuple[nn.Module, int]:
    with quick_imports():
        import timm  # takes seconds, and callers that only read a ModelSpec should not wait

        from lib.recognition import iresnet as iresnet  # makes its networks models of timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name.lower(), timm.list_models(), n=5)
        hint = f"near it are {', '.join(near)}" if near else "timm.list_models() lists them all"
        raise UserError(f"timm has no backbone {name!r}: {hint}")
    try:
        # Vision transformers fix the image size when they are built; convolutions take any.
        fixed_size = {"img_size": image_size} if timm.get_pretrained_cfg_value(name, "fixed_input_size") else {}
        backbone = timm.create_model(name, pretrained=False, num_classes=0, **fixed_size)
        # One forward pass finds the true feature count. timm's attributes are right for most models only.
        with torch.no_grad():
            features_ND = backbone.eval()(torch.zeros(1, 3, image_size, image_size))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"backbone {name!r} cannot be built for images of {image_size} pixels: {error}") from error
    if features_ND.ndim != 2:
        raise UserError(
            f"backbone {name!r} gives features of shape {tuple(features_ND.shape)}, not one vector an image"
        )
    return backbone.train(), features_ND.shape[1]


def resized_crops(crops_NHWC: np.ndarray, image_size: int) -> np.ndarray:
    """Return uint8 crops of `image_size` pixels. Each output pixel is the mean of the area that it covers.

    Raises:
        UserError: anything but uint8 of shape [N, H, W, 3].
    """
    if crops_NHWC.dtype != np.uint8 or crops_NHWC.ndim != 4 or crops_NHWC.shape[3] != 3:
        raise UserError(
            f"crops are {crops_NHWC.dtype} of shape {crops_NHWC.shape}: uint8 RGB of shape [N, H, W, 3] is needed"
        )
    if crops_NHWC.shape[1:3] == (image_size, image_size):
        return crops_NHWC
    resized_NHWC = np.empty((len(crops_NHWC), image_size, image_size, 3), np.uint8)
    for crop_HWC, resized_HWC in zip(crops_NHWC, resized_NHWC, strict=True):
        cv2.resize(crop_HWC, (image_size, image_size), dst=resized_HWC, interpolation=cv2.INTER_AREA)
    return resized_NHWC


def normalized_images(crops_NHWC: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """Return uint8 RGB crops as images_NCHW, the model's input: (value / 255 - mean) / std, float32, channels last."""
    return standardized(crops_NHWC, *_statistics(spec.mean, spec.std, crops_NHWC.device))


def standardized(crops_NHWC: torch.Tensor, mean_C: torch.Tensor, std_C: torch.Tensor) -> torch.Tensor:
    """Return what `normalized_images` does, with the statistics as tensors."""
    return (crops_NHWC.float() / 255).sub_(mean_C).div_(std_C).permute(0, 3, 1, 2)  # in place: half the time


@functools.lru_cache(maxsize=16)
def _statistics(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean_C and std_C on the device, from a cache. Making them in every step would make a GPU wait.

    Code that torch traces must not call this, because the tracer's stand-ins for tensors would stay in the cache.
    """
    with torch.inference_mode(mode=False):
        return torch.tensor(mean, device=device), torch.tensor(std, device=device)


def embed(
    model: EmbeddingModel,
    crops_NHWC: np.ndarray,
    *,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
) -> np.ndarray:
    """Return float32 embeddings_ND of uint8 RGB crops of any size. The model moves to `device` and keeps its mode.

    The same crops in the same batches give the same bits. In other batches the last digits can differ.

    Raises:
        UserError: anything but uint8 of shape [N, H, W, 3].
    """
    was_training = model.training
    model.eval().to(device).to(memory_format=torch.channels_last)
    embeddings_ND = np.empty((len(crops_NHWC), model.spec.embedding_dim), np.float32)
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")
    try:
        # Only the forward pass is in inference mode: parameters that are moved in it can no longer be trained.
        with torch.inference_mode(), autocast:
            for start in range(0, len(crops_NHWC), batch_size):
                batch = slice(start, start + batch_size)
                # A copy, because the crops may be a read-only view into Arrow memory, which torch warns of.
                crops = np.array(resized_crops(crops_NHWC[batch], model.spec.image_size), order="C")
                images_NCHW = normalized_images(torch.from_numpy(crops).to(device), model.spec)
                embeddings_ND[batch] = model.embedded(images_NCHW).cpu().numpy()
    finally:
        model.train(was_training)
    return embeddings_ND


def save_model(model: EmbeddingModel, url: str, spec: ModelSpec | None = None) -> None:
    """Write the model folder `url`: weights, model card, and `model.json` last, which makes the folder a model.

    `spec` may tell more than the model's own, such as its metrics.
    """
    spec = spec or model.spec
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    weights = safetensors.torch.save(tensors)
    write_bytes(join(url, WEIGHTS_NAME), weights)
    write_bytes(join(url, CARD_NAME), model_card(spec).encode())
    write_json(join(url, SPEC_NAME), {**spec.to_json(), WEIGHTS_KEY: hashlib.sha256(weights).hexdigest()})


def load_model(url: str) -> EmbeddingModel:
    """Return the model of the folder `url`, in eval mode, on the CPU.

    Raises:
        UserError: no such folder, a file of it is missing, damaged or of another version, or a weight is NaN.
    """
    return built_model(*read_model(url), url)


def read_model(url: str) -> tuple[ModelSpec, bytes]:
    """Return the description and the weights in the folder `url`.

    Raises:
        UserError: no such folder, a file is missing or of another version, or the two files are of different models.
    """
    spec_url = join(url, SPEC_NAME)
    if not exists(spec_url):
        raise UserError(f"no model at {url!r}: {SPEC_NAME} is missing; jobs/train.py writes one to runs/<name>/model")
    for pause_s in (*REPLACED_WITHIN_S, None):
        content = read_json(spec_url)
        spec = ModelSpec.from_json(content, spec_url)
        weights = read_weights(join(url, WEIGHTS_NAME))
        if content.get(WEIGHTS_KEY) in (None, hashlib.sha256(weights).hexdigest()):
            return spec, weights
        if pause_s is not None:
            logger.info("the files of %s are those of two models, which is so while it is replaced: waiting", url)
            time.sleep(pause_s)
    tensors_of(weights, join(url, WEIGHTS_NAME))  # says so where the file is damaged
    raise UserError(
        f"{SPEC_NAME} of {url!r} describes other weights than {WEIGHTS_NAME} holds: take both from one model; where a "
        "training was killed between the two, the same command goes on and writes both"
    )


def built_model(spec: ModelSpec, weights: bytes, url: str) -> EmbeddingModel:
    """Return the model that `read_model` found in the folder `url`, as `load_model` does."""
    model = EmbeddingModel(spec)
    weights_url = join(url, WEIGHTS_NAME)
    load_tensors(model, tensors_of(weights, weights_url), weights_url)
    return model.eval()


def was_evaluated(url: str) -> bool:
    """Return whether the model in the folder `url` has a threshold from an evaluation, not only from training.

    Raises:
        UserError: the folder is no model.
    """
    spec = ModelSpec.from_json(read_json(join(url, SPEC_NAME)), join(url, SPEC_NAME))
    return spec.threshold is not None and spec.metrics.get("split") != VALIDATION_SPLIT


def keep_threshold(url: str, threshold: float, metrics: Mapping[str, Any], *, flip: bool | None = None) -> None:
    """Write a threshold and its figures into the description and the card of the model folder `url`.

    `flip` says whether the threshold is for embeddings with mirror images. It is stored in the model. None leaves the
    model's own.

    Raises:
        UserError, JobError: the folder is no model, or cannot be written to.
    """
    content = read_json(join(url, SPEC_NAME))
    spec = ModelSpec.from_json(content, join(url, SPEC_NAME))
    spec = dataclasses.replace(
        spec, threshold=threshold, metrics=dict(metrics), flip=spec.flip if flip is None else flip
    )
    write_bytes(join(url, CARD_NAME), model_card(spec).encode())
    content.pop("flip", None)  # left out where it is off
    write_json(join(url, SPEC_NAME), {**content, **spec.to_json()})
