"""Mirror averaging: one rule for model folders, ONNX files of ours and of others, and those who use them."""

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch

from lib import storage
from lib.errors import UserError
from lib.recognition.embedder import load_embedder
from lib.recognition.embeddings_table import schema
from lib.recognition.export_job import ExportConfig, export, onnx_bytes
from lib.recognition.gallery import known_people
from lib.recognition.initial_weights import initial_model
from lib.recognition.model import (
    EmbeddingModel,
    ModelSpec,
    embed,
    keep_threshold,
    load_model,
    model_card,
    normalized_images,
    save_model,
)
from lib.recognition.onnx_model import OnnxInput
from lib.recognition.recognizer import FaceRecognizer
from tests.recognition.test_onnx_model import PLAIN, foreign_file


@pytest.fixture(scope="module")
def crops() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (70, 64, 64, 3), np.uint8)


@pytest.fixture
def flipped_url(model_url: str, tmp_path: Path) -> str:
    model = load_model(model_url)
    save_model(model, str(tmp_path / "run é" / "model"), dataclasses.replace(model.spec, flip=True))
    return str(tmp_path / "run é" / "model")


def summed(first_ND: np.ndarray, second_ND: np.ndarray) -> np.ndarray:
    sum_ND = first_ND.astype(np.float64) + second_ND
    return sum_ND / np.linalg.norm(sum_ND, axis=1, keepdims=True)


def raw(model: EmbeddingModel, crops_NHWC: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(normalized_images(torch.from_numpy(crops_NHWC), model.spec), raw=True).numpy()


def mirrored(crops_NHWC: np.ndarray) -> np.ndarray:
    return np.stack([cv2.flip(crop, 1) for crop in crops_NHWC])


def test_an_embedding_is_the_sum_of_both_raw_vectors_at_length_1(flipped_url: str, crops: np.ndarray) -> None:
    model = load_model(flipped_url)
    wanted_ND = summed(raw(model, crops), raw(model, mirrored(crops)))
    np.testing.assert_allclose(embed(model, crops), wanted_ND, atol=1e-5)
    embedder = load_embedder(flipped_url)
    np.testing.assert_allclose(embedder.embed(crops), wanted_ND, atol=1e-5)
    np.testing.assert_allclose(embedder.embed(mirrored(crops)), wanted_ND, atol=1e-5)
    block = embedder.buffer(len(crops))
    block[:] = crops
    np.testing.assert_allclose(embedder.launch(block)(), wanted_ND, atol=1e-5)


def test_a_flag_overrules_the_model_and_then_no_threshold_is_known(
    model_url: str, flipped_url: str, crops: np.ndarray
) -> None:
    plain, asked = load_embedder(model_url), load_embedder(model_url, flip=True)
    own, dropped = load_embedder(flipped_url), load_embedder(flipped_url, flip=False)
    np.testing.assert_array_equal(asked.embed(crops), own.embed(crops))
    np.testing.assert_array_equal(dropped.embed(crops), plain.embed(crops))
    assert [each.flip for each in (plain, asked, own, dropped)] == [False, True, True, False]
    assert (plain.digest, own.digest) == (dropped.digest, asked.digest)
    assert plain.digest != own.digest
    assert plain.threshold == own.threshold == 0.1
    assert asked.threshold is dropped.threshold is None
    assert load_embedder(model_url, flip=False).threshold == 0.1


def test_models_of_before_have_no_mirror_images_and_keep_their_digest(model_url: str) -> None:
    content = json.loads(Path(model_url, "model.json").read_text())
    assert "flip" not in content
    spec = ModelSpec.from_json(content)
    assert not spec.flip
    assert ModelSpec.from_json({**content, "flip": True}).to_json()["flip"]
    with pytest.raises(UserError, match="wrong type: flip='yes'"):
        ModelSpec.from_json({**content, "flip": "yes"})
    with pytest.raises(UserError, match="always has length 1"):
        ModelSpec(flip=True, normalize=False)


def test_training_on_from_such_a_model_without_the_flag_is_told(
    flipped_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    spec = dataclasses.replace(load_model(flipped_url).spec, threshold=None)
    assert initial_model(spec, flipped_url).spec.flip
    assert "--flip" not in caplog.text
    assert not initial_model(dataclasses.replace(spec, flip=False), flipped_url).spec.flip
    assert "adds mirror images, and the model that starts from it does not: --flip keeps that" in caplog.text


def test_a_threshold_takes_its_mirror_images_into_the_model(model_url: str, tmp_path: Path) -> None:
    url = str(tmp_path / "model")
    save_model(load_model(model_url), url)
    for flip in (True, None, False):
        keep_threshold(url, 0.5, {}, flip=flip)
        assert load_model(url).spec.flip is (flip is not False)
        assert ("mirror image" in (tmp_path / "model" / "README.md").read_text()) is (flip is not False)
    assert "flip" not in json.loads((tmp_path / "model" / "model.json").read_text())


def test_a_file_of_export_has_the_mirror_images_in_its_graph(
    flipped_url: str, faces_url: str, crops: np.ndarray
) -> None:
    result = export(ExportConfig(model=flipped_url, faces=faces_url))
    assert result["max_difference"] < 1e-5
    url = flipped_url.removesuffix("model") + "model.onnx"
    assert result["onnx"] == url
    file, folder = load_embedder(url), load_embedder(flipped_url)
    assert (file.flip, file.digest, file.threshold) == (True, folder.digest, folder.threshold)
    for num in (1, 2, 70):
        np.testing.assert_allclose(file.embed(crops[:num]), folder.embed(crops[:num]), atol=1e-5)
    np.testing.assert_array_equal(load_embedder(url, flip=True).embed(crops), file.embed(crops))
    with pytest.raises(UserError, match="--no-flip") as caught:
        load_embedder(url, flip=False)
    assert "\n" not in str(caught.value)


def test_export_follows_the_flags(model_url: str, flipped_url: str, faces_url: str, tmp_path: Path) -> None:
    with_url, without_url = str(tmp_path / "with.onnx"), str(tmp_path / "without.onnx")
    export(ExportConfig(model=model_url, faces=faces_url, output=with_url, flip=True))
    export(ExportConfig(model=flipped_url, faces=faces_url, output=without_url, no_flip=True))
    assert load_embedder(with_url).digest == load_embedder(flipped_url).digest
    assert load_embedder(without_url).digest == load_embedder(model_url).digest
    assert not load_embedder(without_url).flip
    assert load_embedder(with_url).threshold is None
    with pytest.raises(UserError, match="both given"):
        ExportConfig(flip=True, no_flip=True)


@pytest.mark.parametrize(
    "backbone",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("test_efficientnet", "test_vit")), "iresnet18"],
)
def test_other_backbones_are_exported_with_mirror_images(tmp_path: Path, backbone: str) -> None:
    torch.manual_seed(0)
    size = {"test_vit": 160, "iresnet18": 112}.get(backbone, 48)
    model = EmbeddingModel(ModelSpec(backbone=backbone, image_size=size, flip=True)).eval()
    (tmp_path / "m.onnx").write_bytes(onnx_bytes(model, "0" * 16, "eyes"))
    crops_NHWC = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
    file = load_embedder(str(tmp_path / "m.onnx"))
    np.testing.assert_allclose(file.embed(crops_NHWC), embed(model, crops_NHWC), atol=1e-5)


def test_files_of_others_get_mirror_images_at_the_length_of_their_vectors(tmp_path: Path) -> None:
    url = foreign_file(tmp_path / "a.onnx", PLAIN)
    plain, added = load_embedder(url, OnnxInput(normalize=False)), load_embedder(url, flip=True)
    crops_NHWC = np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), np.uint8)
    wanted_ND = summed(plain.embed(crops_NHWC), plain.embed(mirrored(crops_NHWC)))
    np.testing.assert_allclose(added.embed(crops_NHWC), wanted_ND, atol=1e-5)
    assert added.digest != load_embedder(url).digest
    assert (added.flip, load_embedder(url).flip) == (True, False)
    with pytest.raises(UserError, match="drop one"):
        load_embedder(url, OnnxInput(normalize=False), flip=True)


def test_an_unflipped_file_of_ours_gets_them_too(model_url: str, faces_url: str, tmp_path: Path) -> None:
    url = str(tmp_path / "m.onnx")
    export(ExportConfig(model=model_url, faces=faces_url, output=url))
    crops_NHWC = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    plain, added = load_embedder(url), load_embedder(url, flip=True)
    wanted_ND = summed(plain.embed(crops_NHWC), plain.embed(mirrored(crops_NHWC)))
    np.testing.assert_allclose(added.embed(crops_NHWC), wanted_ND, atol=1e-5)
    assert added.threshold is None
    assert len({plain.digest, added.digest}) == 2


def test_raw_vectors_get_no_mirror_images(tmp_path: Path) -> None:
    spec = ModelSpec(backbone="test_convnext", image_size=32, normalize=False)
    save_model(EmbeddingModel(spec), str(tmp_path / "m"))
    with pytest.raises(UserError, match="raw ones"):
        load_embedder(str(tmp_path / "m"), flip=True)


def test_direct_use_follows_the_model(flipped_url: str, sample_data: Path, aligned: list[dict]) -> None:
    photo = sample_data / "photos" / aligned[0]["photo"]
    recognizer = FaceRecognizer.load(flipped_url)
    (face, *_) = recognizer.faces(photo)
    crop_NHWC = np.ascontiguousarray(face.crop_HWC[None])
    model = load_model(flipped_url)
    np.testing.assert_allclose(face.embedding_D, embed(model, crop_NHWC)[0], atol=1e-5)
    (plain, *_) = FaceRecognizer.load(flipped_url, flip=False).faces(photo)
    assert np.abs(plain.embedding_D - face.embedding_D).max() > 1e-4
    assert "of the face and of its mirror image" in model_card(model.spec)


def test_a_gallery_of_the_other_kind_is_refused(model_url: str, flipped_url: str, tmp_path: Path) -> None:
    plain = load_embedder(model_url)

    about = {"digest": plain.digest, "embedding_dim": 16, "template": "eyes"}  # an older table, which does not say
    row = {"photo": "a", "identity": "A", "status": "aligned", "embedding": [0.0] * 16}
    rows = pa.Table.from_pylist([row], schema=schema(16, "{}", json.dumps(about)))
    storage.write_parquet(str(tmp_path / "split=test" / "part-000000.parquet"), rows)
    storage.write_json(str(tmp_path / "_SUCCESS"), {"run_id": "1", "fingerprint": {}, "counts": {}})
    assert len(known_people(str(tmp_path), plain)) == 1
    with pytest.raises(UserError, match=r"embedded without mirror images.*give --no-flip"):
        known_people(str(tmp_path), load_embedder(flipped_url))
    assert len(known_people(str(tmp_path), load_embedder(flipped_url, flip=False))) == 1
