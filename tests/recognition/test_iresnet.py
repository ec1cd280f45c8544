"""iResNet: the tensors of InsightFace's files, and the vectors that they stand for."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch.nn import functional

from lib.errors import UserError
from lib.recognition import iresnet
from lib.recognition.export_job import onnx_bytes
from lib.recognition.initial_weights import initial_model
from lib.recognition.model import EmbeddingModel, ModelSpec, embed, load_model, save_model
from lib.recognition.onnx_model import OnnxInput, OnnxModel
from lib.training.freezing import freeze_stages
from tests.recognition.random_tensors import Tensors, random_like

SPEC = ModelSpec(backbone="iresnet18", embedding_dim=512, image_size=112)


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    """Return random tensors under InsightFace's names, with statistics that are not those of a new network."""
    return random_like(iresnet.iresnet18().state_dict(), seed=3)


@pytest.fixture(scope="module")
def weights(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file as InsightFace saves it."""
    torch.save(tensors, path := tmp_path_factory.mktemp("weights é") / "backbone 18.pth")
    return path


@pytest.fixture(scope="module")
def model(weights: Path) -> EmbeddingModel:
    return initial_model(SPEC, str(weights)).eval()


@pytest.fixture(scope="module")
def crops() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), np.uint8)


def reference(tensors: Tensors, images_NCHW: torch.Tensor) -> torch.Tensor:
    """Compute what the published network does, from the names in the file alone."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, var, weight, bias = (tensors[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        shape = (1, -1, *[1] * (x.ndim - 2))
        return (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt() * weight.view(shape) + bias.view(shape)

    x = functional.conv2d(images_NCHW, tensors["conv1.weight"], padding=1)
    x = functional.prelu(norm(x, "bn1"), tensors["prelu.weight"])
    for stage in range(1, 5):
        for block in range(2):
            at, stride = f"layer{stage}.{block}.", 2 if block == 0 else 1
            made = functional.conv2d(norm(x, at + "bn1"), tensors[at + "conv1.weight"], padding=1)
            made = functional.prelu(norm(made, at + "bn2"), tensors[at + "prelu.weight"])
            made = norm(functional.conv2d(made, tensors[at + "conv2.weight"], stride=stride, padding=1), at + "bn3")
            if block == 0:
                x = norm(functional.conv2d(x, tensors[at + "downsample.0.weight"], stride=2), at + "downsample.1")
            x = x + made
    x = norm(x, "bn2").flatten(1) @ tensors["fc.weight"].T + tensors["fc.bias"]
    return functional.normalize(norm(x, "features"), dim=1)


@pytest.mark.parametrize(
    ("name", "num_millions"), [("iresnet18", 24.03), ("iresnet34", 34.14), ("iresnet50", 43.59), ("iresnet100", 65.16)]
)
def test_the_networks_have_as_many_parameters_as_the_published_ones(name: str, num_millions: float) -> None:
    with torch.device("meta"):
        network = getattr(iresnet, name)()
    assert sum(each.numel() for each in network.parameters()) / 1e6 == pytest.approx(num_millions, abs=0.005)


def test_vectors_of_a_file_are_those_of_the_published_network(
    tensors: Tensors, model: EmbeddingModel, crops: np.ndarray
) -> None:
    images_NCHW = torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1
    np.testing.assert_allclose(embed(model, crops), reference(tensors, images_NCHW).numpy(), atol=1e-5)
    assert model.spec.mean == model.spec.std == (0.5, 0.5, 0.5)


def test_files_of_other_suffixes_and_with_prefixes_give_the_same_weights(
    tensors: Tensors, model: EmbeddingModel, tmp_path: Path
) -> None:
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}}, tmp_path / "a.pt")
    safetensors.torch.save_file({f"net.{name}": each for name, each in tensors.items()}, tmp_path / "b.safetensors")
    for name in ("a.pt", "b.safetensors"):
        taken = initial_model(SPEC, str(tmp_path / name))
        assert all(torch.equal(each, model.state_dict()[key]) for key, each in taken.state_dict().items())


def test_weights_of_another_depth_are_refused_in_one_line_with_their_names(weights: Path) -> None:
    with pytest.raises(UserError, match=r"layer1\.2\.bn1\.weight is missing.*choose the backbone") as refused:
        initial_model(dataclasses.replace(SPEC, backbone="iresnet34"), str(weights))
    assert "\n" not in str(refused.value)


def test_another_image_size_is_refused_with_the_flag() -> None:
    with pytest.raises(UserError, match="--image-size 112"):
        EmbeddingModel(dataclasses.replace(SPEC, image_size=240))


def test_a_head_of_another_length_starts_at_random_and_says_so(
    weights: Path, caplog: pytest.LogCaptureFixture, crops: np.ndarray
) -> None:
    shorter = initial_model(dataclasses.replace(SPEC, embedding_dim=128), str(weights))
    assert "--embedding-dim 512" in caplog.text
    assert embed(shorter, crops).shape == (3, 128)


def test_a_step_of_training_moves_the_weights_and_not_the_frozen_stages(weights: Path) -> None:
    trained = initial_model(SPEC, str(weights))
    freeze_stages(trained, 2)
    before = {name: each.clone() for name, each in trained.named_parameters()}
    learned = [each for each in trained.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.1)
    trained(torch.randn(4, 3, 112, 112))[:, 0].sum().backward()
    optimizer.step()
    moved = {name for name, each in trained.named_parameters() if not torch.equal(each, before[name])}
    assert {"head.0.weight", "backbone.fc.weight", "backbone.layer2.0.conv1.weight"} <= moved
    assert "backbone.features.weight" not in moved
    assert not any(name.startswith(("backbone.conv1", "backbone.layer1")) for name in moved)


def test_a_saved_model_and_its_onnx_file_give_the_same_vectors(
    model: EmbeddingModel, crops: np.ndarray, tmp_path: Path
) -> None:
    vectors_ND = embed(model, crops)
    save_model(model, str(tmp_path / "model"))
    np.testing.assert_array_equal(embed(load_model(str(tmp_path / "model")), crops), vectors_ND)
    (tmp_path / "model.onnx").write_bytes(onnx_bytes(model, "0" * 16, "eyes"))
    exported = OnnxModel(str(tmp_path / "model.onnx"), OnnxInput())
    np.testing.assert_allclose(exported.embed(crops), vectors_ND, atol=1e-4)


def test_timm_knows_the_networks_beside_its_own() -> None:
    assert timm.is_model("iresnet100")
