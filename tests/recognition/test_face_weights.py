"""Published weights of iResNet in use: the vectors that they stand for, under the names of InsightFace and CVLface."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn
from torch.nn import functional

from lib.errors import UserError
from lib.faces.alignment import ARCFACE, EYES
from lib.recognition import export_job, iresnet
from lib.recognition.embed_job import model_name
from lib.recognition.embedder import TorchEmbedder, extraction_settings, load_embedder
from lib.recognition.export_job import ExportConfig, export
from lib.recognition.initial_weights import initial_model
from lib.recognition.iresnet_names import DEPTHS, backbone_of, under_our_names
from lib.recognition.model import ModelSpec, embed
from lib.recognition.onnx_model import OnnxInput, OnnxModel
from lib.recognition.recognizer import FaceRecognizer
from tests.recognition.random_tensors import Tensors, random_like


def cvlface_shapes(depths: tuple[int, ...]) -> Tensors:
    """Return zeros under the names that CVLface's `Backbone` gives its tensors, written from its description."""
    made: Tensors = {}

    def norm(at: str, width: int, *, affine: bool = True) -> None:
        kinds = ("weight", "bias", "running_mean", "running_var") if affine else ("running_mean", "running_var")
        made.update({f"{at}.{kind}": torch.zeros(width) for kind in kinds})
        made[f"{at}.num_batches_tracked"] = torch.tensor(0)

    made["input_layer.0.weight"] = torch.zeros(64, 3, 3, 3)
    norm("input_layer.1", 64)
    made["input_layer.2.weight"] = torch.zeros(64)
    norm("output_layer.0", 512)
    made["output_layer.3.weight"], made["output_layer.3.bias"] = torch.zeros(512, 512 * 49), torch.zeros(512)
    norm("output_layer.4", 512, affine=False)
    before, block = 64, 0
    for width, depth in zip((64, 128, 256, 512), depths, strict=True):
        for _ in range(depth):
            at = f"body.{block}"
            if before != width:
                made[f"{at}.shortcut_layer.0.weight"] = torch.zeros(width, before, 1, 1)
                norm(f"{at}.shortcut_layer.1", width)
            norm(f"{at}.res_layer.0", before)
            made[f"{at}.res_layer.1.weight"] = torch.zeros(width, before, 3, 3)
            norm(f"{at}.res_layer.2", width)
            made[f"{at}.res_layer.3.weight"] = torch.zeros(width)
            made[f"{at}.res_layer.4.weight"] = torch.zeros(width, width, 3, 3)
            norm(f"{at}.res_layer.5", width)
            before, block = width, block + 1
    return made


def cvlface_reference(tensors: Tensors, images_NCHW: torch.Tensor) -> np.ndarray:
    """Compute what CVLface's network of 18 layers does, from the names alone; vectors as they are."""

    def norm(x: torch.Tensor, at: str) -> torch.Tensor:
        mean, var = tensors[f"{at}.running_mean"], tensors[f"{at}.running_var"]
        return functional.batch_norm(x, mean, var, tensors.get(f"{at}.weight"), tensors.get(f"{at}.bias"))

    x = norm(functional.conv2d(images_NCHW, tensors["input_layer.0.weight"], padding=1), "input_layer.1")
    x = functional.prelu(x, tensors["input_layer.2.weight"])
    for block in range(8):
        at, stride = f"body.{block}", 2 if block % 2 == 0 else 1
        made = functional.conv2d(norm(x, f"{at}.res_layer.0"), tensors[f"{at}.res_layer.1.weight"], padding=1)
        made = functional.prelu(norm(made, f"{at}.res_layer.2"), tensors[f"{at}.res_layer.3.weight"])
        made = functional.conv2d(made, tensors[f"{at}.res_layer.4.weight"], stride=stride, padding=1)
        if f"{at}.shortcut_layer.0.weight" in tensors:
            x = functional.conv2d(x, tensors[f"{at}.shortcut_layer.0.weight"], stride=stride)
            x = norm(x, f"{at}.shortcut_layer.1")
        else:
            x = x[:, :, ::stride, ::stride]
        x = x + norm(made, f"{at}.res_layer.5")
    x = norm(x, "output_layer.0").flatten(1)
    return norm(x @ tensors["output_layer.3.weight"].T + tensors["output_layer.3.bias"], "output_layer.4").numpy()


def unit(vectors_ND: np.ndarray) -> np.ndarray:
    return vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)


def as_input(crops_NHWC: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(crops_NHWC.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture(scope="module")
def crops() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), np.uint8)


@pytest.fixture(scope="module")
def cvlface() -> Tensors:
    return random_like(cvlface_shapes(DEPTHS["18"]), 4)


@pytest.fixture(scope="module")
def cvlface_url(cvlface: Tensors, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a file as CVLface saves it, `model.pt`."""
    torch.save({f"net.{name}": each for name, each in cvlface.items()}, path := tmp_path_factory.mktemp("é") / "m.pt")
    return str(path)


@pytest.fixture(scope="module")
def insightface() -> nn.Module:
    network = iresnet.iresnet18()
    network.load_state_dict(random_like(network.state_dict(), 3))
    return network.eval()


@pytest.fixture(scope="module")
def insightface_url(insightface: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a file as InsightFace saves it, `backbone.pth`."""
    torch.save(insightface.state_dict(), path := tmp_path_factory.mktemp("glint é") / "backbone.pth")
    return str(path)


@pytest.fixture(scope="module")
def converted_url(insightface: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return an ONNX file that somebody made of the network."""
    sink, example = io.BytesIO(), torch.zeros(2, 3, 112, 112)
    dynamic = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(insightface, (example,), sink, dynamic_shapes=dynamic, opset_version=18, dynamo=True)
    path = tmp_path_factory.mktemp("converted") / "converted.onnx"
    path.write_bytes(sink.getvalue())
    return str(path)


def test_vectors_of_cvlfaces_file_are_those_of_its_network(
    cvlface: Tensors, cvlface_url: str, crops: np.ndarray, tmp_path: Path
) -> None:
    wanted_ND = unit(cvlface_reference(cvlface, as_input(crops)))
    np.testing.assert_allclose(load_embedder(cvlface_url).embed(crops), wanted_ND, atol=1e-5)
    safetensors.torch.save_file(
        {f"model.net.{name}": each for name, each in cvlface.items()}, tmp_path / "model.safetensors"
    )
    inside = {f"model.{name}": each for name, each in cvlface.items()} | {"head.kernel": torch.zeros(512, 9)}
    torch.save({"state_dict": inside}, tmp_path / "adaface.pt")
    for name in ("model.safetensors", "adaface.pt"):
        np.testing.assert_allclose(load_embedder(str(tmp_path / name)).embed(crops), wanted_ND, atol=1e-5)


def test_a_file_of_weights_is_a_model_that_says_what_it_needs(insightface_url: str, insightface: nn.Module) -> None:
    embedder = load_embedder(insightface_url)
    assert isinstance(embedder, TorchEmbedder)
    assert (embedder.embedding_dim, embedder.template, embedder.flip, embedder.threshold) == (512, ARCFACE, False, None)
    settings = extraction_settings(embedder)
    assert (settings.alignment.template, settings.alignment.image_size) == (ARCFACE, 112)
    assert load_embedder(insightface_url, OnnxInput(alignment="faces")).template == EYES
    assert model_name("s3://bucket/glint é/backbone.pth") == "backbone"
    digests = {
        load_embedder(insightface_url, *wanted, flip=flip).digest
        for wanted, flip in (((), None), ((OnnxInput(color="bgr"),), None), ((), True), ((), False))
    }
    assert len(digests) == 3


@pytest.mark.parametrize("color", ["rgb", "bgr"])
@pytest.mark.parametrize("flip", [False, True])
def test_a_converted_onnx_file_gives_the_same_vectors(
    insightface_url: str, converted_url: str, crops: np.ndarray, color: str, flip: bool
) -> None:
    wanted = OnnxInput(color=color, mean=(127.5, 120.0, 110.0), std=(127.5, 120.0, 130.0))  # type: ignore[arg-type]
    converted = OnnxModel(converted_url, wanted, flip=flip)
    ours = load_embedder(insightface_url, wanted, flip=flip)
    np.testing.assert_allclose(ours.embed(crops), converted.embed(crops), atol=1e-4)
    block = ours.buffer(3)
    block[:] = crops
    np.testing.assert_allclose(ours.launch(block)(), converted.embed(crops), atol=1e-4)


def test_the_exported_file_stands_in_for_the_weights(
    cvlface_url: str, crops: np.ndarray, faces_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_job, "NUM_CROPS", 4)
    result = export(ExportConfig(model=cvlface_url, faces=faces_url, flip=True))
    assert result["onnx"] == cvlface_url.removesuffix("pt") + "onnx"
    file, weights = load_embedder(result["onnx"]), load_embedder(cvlface_url, flip=True)
    assert (file.digest, file.template, file.flip) == (weights.digest, ARCFACE, True)
    np.testing.assert_allclose(file.embed(crops), weights.embed(crops), atol=1e-5)


def test_direct_use_takes_the_file(cvlface_url: str, sample_data: Path, aligned: list[dict]) -> None:
    photo = sample_data / "photos" / aligned[0]["photo"]
    (face, *_) = FaceRecognizer.load(cvlface_url).faces(photo)
    assert face.crop_HWC.shape == (112, 112, 3)
    assert np.linalg.norm(face.embedding_D) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("layers", list(DEPTHS))
def test_the_network_is_known_by_its_names(layers: str) -> None:
    with torch.device("meta"):
        theirs = under_our_names({f"net.{name}": each for name, each in cvlface_shapes(DEPTHS[layers]).items()})
        ours = f"ir{'101' if layers == '100' else layers}"
        network = timm.create_model(ours)
        wanted = {name: each.shape for name, each in network.state_dict().items()}
        assert {name: each.shape for name, each in theirs.items()} == wanted
        assert backbone_of(theirs) == ours
        theirs = timm.create_model(f"iresnet{layers}").state_dict()
        theirs = under_our_names({f"module.{name}": each for name, each in theirs.items()})
        assert backbone_of(theirs) == f"iresnet{layers}"


def test_training_starts_from_the_vectors_of_cvlfaces_file(
    cvlface: Tensors, cvlface_url: str, crops: np.ndarray
) -> None:
    spec = ModelSpec(backbone="ir18", embedding_dim=512, image_size=112)
    model = initial_model(spec, cvlface_url).eval()
    np.testing.assert_allclose(embed(model, crops), unit(cvlface_reference(cvlface, as_input(crops))), atol=1e-5)
    with pytest.raises(UserError, match=r"is missing.*these are weights of ir18: --backbone ir18$"):
        initial_model(ModelSpec(backbone="iresnet50", embedding_dim=512, image_size=112), cvlface_url)


class Harmful:
    """What a hostile pickle does when it is loaded."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("/tmp/must never be there"),))


def test_bad_files_are_refused_in_one_line(cvlface: Tensors, insightface_url: str, tmp_path: Path) -> None:
    def refused(name: str, tensors: object, wanted: OnnxInput | None = None) -> str:
        torch.save(tensors, tmp_path / name)
        with pytest.raises(UserError) as caught:
            load_embedder(str(tmp_path / name), wanted)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    convnext = timm.create_model("test_convnext").state_dict()
    told = refused("a b.pth", convnext)
    assert "is no iResNet of 18, 34, 50 or 100 layers by InsightFace or CVLface: it holds stem.0.weight" in told
    assert "train from the file with --init" in told
    with_se = {**cvlface, "body.0.res_layer.se_block.fc1.weight": torch.zeros(4, 64, 1, 1)}
    assert "body.0.res_layer.se_block.fc1.weight is not part of the model" in refused("se.pt", with_se)
    assert "is no iResNet" in refused("deep.pt", cvlface_shapes((3, 8, 36, 3)))
    without = {name: each for name, each in cvlface.items() if name != "output_layer.3.bias"}
    assert "fc.bias is missing" in refused("less.pt", without)
    wide = {**cvlface, "output_layer.3.weight": torch.zeros(512, 512 * 14 * 14)}
    assert "fc.weight is (512, 100352), the model needs (512, 25088)" in refused("224.pt", wide)
    broken = {**cvlface, "input_layer.1.bias": torch.full((64,), torch.nan)}
    assert "bn1.bias holds NaN" in refused("nan.pt", broken)
    evil = refused("evil.pt", {"input_layer.0.weight": Harmful()})
    assert "it wants 'getattr', and only tensors are ever unpickled; save its state_dict() alone" in evil
    assert "trust" not in evil
    assert not Path("/tmp/must never be there").exists()
    (tmp_path / "cut.pth").write_bytes(Path(insightface_url).read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be read as PyTorch weights"):
        load_embedder(str(tmp_path / "cut.pth"))
    (tmp_path / "plain.pt").write_bytes(pickle.dumps([1, 2], 2))
    with pytest.raises(UserError, match=r"not named tensors|cannot be read"):
        load_embedder(str(tmp_path / "plain.pt"))
    with pytest.raises(UserError, match="does not exist"):
        load_embedder(str(tmp_path / "gone.pth"))
    for wanted in (OnnxInput(layout="nhwc"), OnnxInput(input_size=224), OnnxInput(model_output="fc1")):
        with pytest.raises(UserError, match="takes 112 pixels"):
            load_embedder(insightface_url, wanted)
