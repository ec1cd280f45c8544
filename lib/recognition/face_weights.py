"""Weights of iResNet, as InsightFace and CVLface publish them, as a model that is ready for use."""

import logging

import torch
from torch import nn

from lib.errors import UserError
from lib.recognition.iresnet_names import backbone_of, under_our_names
from lib.recognition.model import EmbeddingModel
from lib.recognition.onnx_model import ARCFACE_SIZE, OnnxInput
from lib.recognition.spec import ModelSpec
from lib.recognition.tensor_files import first_few, load_tensors, read_weights, tensors_of
from lib.recognition.weights import fitted

logger = logging.getLogger(__name__)


def read_face_weights(url: str, wanted: OnnxInput) -> tuple[EmbeddingModel, bytes]:
    """Return the model of a file of weights, in eval mode, on the CPU, and what its digest is made of.

    The model has no head, so its vectors are those of the file. `wanted` describes the input that the weights were
    trained on, as for ONNX files. For BGR the first layer is reordered, so that the model takes RGB.

    Raises:
        UserError: no such file, a damaged one, no iResNet, weights that do not fit, or an input that it cannot have.
    """
    if wanted.layout != "nchw" or wanted.input_size not in (None, ARCFACE_SIZE) or wanted.model_output:
        flags = "--layout, --input-size and --model-output"
        raise UserError(f"{flags} are for ONNX files: {url!r} takes {ARCFACE_SIZE} pixels")
    content = read_weights(url)
    tensors = under_our_names(tensors_of(content, url))
    backbone = backbone_of(tensors)
    if backbone is None:
        raise UserError(
            f"{url!r} is no iResNet of 18, 34, 50 or 100 layers by InsightFace or CVLface: it holds "
            f"{first_few(list(tensors))}; give the folder of a model, or train from the file with --init"
        )
    spec = ModelSpec(
        backbone=backbone,
        embedding_dim=len(next(each for name, each in tensors.items() if name.endswith("features.running_mean"))),
        normalize=wanted.normalize,
        image_size=ARCFACE_SIZE,
        mean=_in_rgb(wanted.mean, wanted.color),
        std=_in_rgb(wanted.std, wanted.color),
    )
    model = EmbeddingModel(spec)
    model.head = nn.Sequential()
    load_tensors(model.backbone, fitted(tensors, model.backbone, url), url)
    if wanted.color == "bgr":
        with torch.no_grad():
            first = model.backbone.get_submodule("conv1").get_parameter("weight")
            first.copy_(first.flip(1))
    logger.info("%s holds weights of %s", url, backbone)
    return model.eval(), content + f"{wanted.color} {wanted.alignment}".encode()


def _in_rgb(values: tuple[float, float, float], color: str) -> tuple[float, float, float]:
    """Return statistics of RGB values in 0-1, from those of pixels in 0-255 in the given order of colours."""
    red, green, blue = (value / 255 for value in (values[::-1] if color == "bgr" else values))
    return red, green, blue
