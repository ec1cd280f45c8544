"""What a model is and where its weights can start. This module needs no torch."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lib.errors import UserError

FORMAT_VERSION = 1
SPEC_NAME = "model.json"

WEIGHTS_KEY = "weights_sha256"
"""Key in `model.json` for the digest of its weights. Folders of older versions lack it."""

MIN_IMAGE_SIZE = 32

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

AUTO = "auto"
NONE = "none"
HUB = "hub"
LITE0 = "efficientnet-lite0"
INIT_NAMES = (AUTO, NONE, HUB, LITE0)
"""Where the weights of a training can start, besides files and folders."""

SAFETENSORS_SUFFIX = ".safetensors"
TORCH_SUFFIXES = (".pth", ".pt")
WEIGHTS_SUFFIXES = (SAFETENSORS_SUFFIX, *TORCH_SUFFIXES)
"""Of files of weights."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a model is and what it was made from: the content of `model.json`."""

    backbone: str = "convnext_tiny"
    """Name of any timm model."""
    embedding_dim: int = 128
    """Length of an embedding."""
    head: tuple[int, ...] = ()
    """Widths of the layers after the pooled features. `embedding_dim` is appended unless it is already the last."""
    normalize: bool = True
    """Whether embeddings are scaled to length 1. If not, they are the head's raw vectors."""
    flip: bool = False
    """Whether an embedding adds the vector of the mirror image. The sum is scaled to length 1."""
    image_size: int = 240
    """Side of the square input in pixels; crops of another size are resized to it."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from RGB values in 0-1; follows the pretrained weights."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divides RGB values in 0-1 after the mean is subtracted; follows the pretrained weights."""
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    """How the faces it was trained on were made (detector, alignment, image size, code version)."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """What it was trained on and how: counts and settings, shown in the model card."""
    threshold: float | None = None
    """Euclidean distance of embeddings at or below which two faces count as one person; None until it is chosen."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """The figures of the evaluation that chose the threshold: accuracy, auc, num_pairs and others."""

    def __post_init__(self) -> None:
        if self.embedding_dim < 1 or any(width < 1 for width in self.head):
            raise UserError(
                f"embedding_dim={self.embedding_dim}, head={self.head}: layers are 1 wide or more, such as 256,128"
            )
        if self.flip and not self.normalize:
            raise UserError("flip=True, normalize=False: the sum with the mirror image always has length 1; drop one")
        if self.image_size < MIN_IMAGE_SIZE:
            raise UserError(f"image_size={self.image_size} pixels is too small: {MIN_IMAGE_SIZE} or more")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UserError(f"mean={self.mean}, std={self.std}: three values each (R, G, B), std above 0")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise UserError(f"threshold={self.threshold}: a Euclidean distance of embeddings, or null")

    @property
    def layer_widths(self) -> tuple[int, ...]:
        """Widths of the head's layers, the last one `embedding_dim`."""
        return self.head if self.head[-1:] == (self.embedding_dim,) else (*self.head, self.embedding_dim)

    def to_json(self) -> dict[str, Any]:
        """Return the spec as a dictionary for `model.json`, without newer fields that have their default."""
        content = {"version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return {name: value for name, value in content.items() if name not in _NEWER or value != _NEWER[name]}

    @classmethod
    def from_json(cls, content: Any, source: str = SPEC_NAME) -> "ModelSpec":
        """Return the spec that `content`, parsed from the file `source`, describes.

        Raises:
            UserError: another version, keys that are unknown or missing, values of another type or out of range.
        """
        if not isinstance(content, dict) or content.get("version") != FORMAT_VERSION:
            version = content.get("version") if isinstance(content, dict) else None
            raise UserError(f"{source!r} has version {version!r}; this code reads version {FORMAT_VERSION}")
        names = {spec_field.name for spec_field in dataclasses.fields(cls)}
        values: dict[str, Any] = {
            name: value for name, value in {**_NEWER, **content}.items() if name not in ("version", WEIGHTS_KEY)
        }
        if values.keys() != names:
            unknown, missing = sorted(values.keys() - names), sorted(names - values.keys())
            raise UserError(f"{source!r} is not a model description: unknown keys {unknown}, missing keys {missing}")
        wrong = [f"{name}={value!r}" for name, value in values.items() if not isinstance(value, _JSON_TYPES[name])]
        if wrong:
            raise UserError(f"{source!r} has values of the wrong type: {', '.join(wrong)}")
        for name in ("head", "mean", "std"):
            values[name] = tuple(values[name])
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"{source!r} has a list with values of the wrong type: {error}") from error


_NEWER: dict[str, Any] = {"flip": False}
"""Fields that models of older versions lack, and what that means."""

_JSON_TYPES: dict[str, Any] = {
    "backbone": str,
    "embedding_dim": int,
    "head": list,
    "normalize": bool,
    "flip": bool,
    "image_size": int,
    "mean": list,
    "std": list,
    "fingerprint": dict,
    "training": dict,
    "threshold": float | int | None,
    "metrics": dict,
}
