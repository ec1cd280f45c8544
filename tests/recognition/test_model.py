"""The embedding model: what comes out of it, what a saved one is, and what is refused."""

import copy
import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import UserError
from lib.recognition.initial_weights import initial_model
from lib.recognition.model import (
    EmbeddingModel,
    ModelSpec,
    embed,
    keep_threshold,
    load_model,
    normalized_images,
    resized_crops,
    save_model,
)

SPEC = ModelSpec(backbone="test_convnext", image_size=64)


def drawn_crops(num: int, size: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num, size, size, 3), np.uint8)


@pytest.fixture(scope="module")
def model() -> EmbeddingModel:
    torch.manual_seed(0)
    return EmbeddingModel(SPEC).eval()


@pytest.fixture
def folder(tmp_path: Path, model: EmbeddingModel) -> Path:
    url = tmp_path / "run of 'Zoë' – ñ" / "model"
    save_model(model, str(url))
    return url


@pytest.mark.parametrize(
    ("backbone", "image_size"),
    [
        ("convnext_tiny", 64),
        ("efficientnet_b1", 64),
        ("tf_efficientnet_lite0", 64),
        ("convnext_atto", 64),
        ("mobilenetv4_conv_small", 64),
        ("test_convnext", 112),
        ("vit_tiny_patch16_224", 112),
    ],
)
def test_any_backbone_gives_unit_vectors_of_the_embedding_dimension(backbone: str, image_size: int) -> None:
    model = EmbeddingModel(ModelSpec(backbone=backbone, image_size=image_size)).eval()
    with torch.inference_mode():
        embeddings_ND = model(torch.rand(2, 3, image_size, image_size))
    assert embeddings_ND.shape == (2, 128)
    assert torch.allclose(embeddings_ND.norm(dim=1), torch.ones(2), atol=1e-6)


@pytest.mark.parametrize(
    ("head", "widths"), [((), [64, 8]), ((8,), [64, 8]), ((32, 8), [64, 32, 8]), ((32, 16), [64, 32, 16, 8])]
)
def test_head_ends_in_the_embedding_dimension(head: tuple[int, ...], widths: list[int]) -> None:
    model = EmbeddingModel(dataclasses.replace(SPEC, head=head, embedding_dim=8))
    layers = [layer for layer in model.head if isinstance(layer, torch.nn.Linear)]
    assert [layers[0].in_features, *(layer.out_features for layer in layers)] == widths
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 8)


def test_without_normalize_the_vectors_are_the_raw_output_of_the_head(model: EmbeddingModel) -> None:
    raw_model = EmbeddingModel(dataclasses.replace(SPEC, normalize=False)).eval()
    raw_model.load_state_dict(model.state_dict())
    raw_ND = embed(raw_model, drawn_crops(3))
    lengths_N1 = np.linalg.norm(raw_ND, axis=1, keepdims=True)
    assert np.abs(lengths_N1 - 1).max() > 0.01
    np.testing.assert_allclose(raw_ND / lengths_N1, embed(model, drawn_crops(3)), atol=1e-6)


def test_unknown_backbone_names_near_ones() -> None:
    with pytest.raises(UserError, match="convnext_tiny"):
        EmbeddingModel(ModelSpec(backbone="convnxt-tiny"))


@pytest.mark.parametrize(("backbone", "image_size"), [("test_convnext.no_such_tag", 64), ("hf-hub:a/b", 64)])
def test_backbone_that_cannot_be_built_is_refused(backbone: str, image_size: int) -> None:
    with pytest.raises(UserError, match="backbone"):
        EmbeddingModel(ModelSpec(backbone=backbone, image_size=image_size))


def test_images_are_normalized_as_numpy_computes_it() -> None:
    spec = dataclasses.replace(SPEC, mean=(0.1, 0.5, 0.9), std=(0.2, 0.4, 1.6))
    crops = drawn_crops(5)
    expected_NHWC = (crops.astype(np.float64) / 255 - np.array(spec.mean)) / np.array(spec.std)
    images_NCHW = normalized_images(torch.from_numpy(crops), spec)
    assert images_NCHW.dtype == torch.float32
    assert images_NCHW.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(images_NCHW.numpy(), expected_NHWC.transpose(0, 3, 1, 2), atol=1e-6)


def area_weights(size_in: int, size_out: int) -> np.ndarray:
    """Share of each input pixel (columns) in each output pixel (rows) when both rulers span the same length."""
    edges = np.linspace(0, size_in, size_out + 1)
    left, right = edges[:-1, None], edges[1:, None]
    pixels = np.arange(size_in)[None]
    covered = np.clip(np.minimum(right, pixels + 1) - np.maximum(left, pixels), 0, None)
    return covered / (right - left)


@settings(max_examples=30, deadline=None)
@given(size_in=st.integers(40, 90), size_out=st.integers(32, 40), seed=st.integers(0, 99))
def test_smaller_crops_are_area_means(size_in: int, size_out: int, seed: int) -> None:
    crops = drawn_crops(2, size_in, seed)
    weights = area_weights(size_in, size_out)
    expected_NHWC = np.einsum("yh,xw,nhwc->nyxc", weights, weights, crops.astype(np.float64))
    resized_NHWC = resized_crops(crops, size_out)
    assert resized_NHWC.dtype == np.uint8
    assert np.abs(resized_NHWC - expected_NHWC).max() <= 0.51


def test_embed_resizes_crops_of_another_size(model: EmbeddingModel) -> None:
    crops = drawn_crops(3, 240)
    np.testing.assert_array_equal(embed(model, crops), embed(model, resized_crops(crops, 64)))


def test_embed_repeats_to_the_last_bit_and_does_not_depend_on_the_batch(model: EmbeddingModel) -> None:
    crops = drawn_crops(7)
    embeddings_ND = embed(model, crops, batch_size=3)
    assert embeddings_ND.dtype == np.float32
    np.testing.assert_array_equal(embeddings_ND, embed(model, crops, batch_size=3))
    np.testing.assert_allclose(embeddings_ND, embed(model, crops), atol=1e-6)
    np.testing.assert_allclose(embeddings_ND[::-1], embed(model, crops[::-1]), atol=1e-6)


def test_embed_agrees_with_a_plain_forward(model: EmbeddingModel) -> None:
    crops = drawn_crops(4)
    images_NCHW = torch.tensor((crops / 255 - SPEC.mean) / SPEC.std, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected_ND = model(images_NCHW.contiguous()).numpy()
    np.testing.assert_allclose(embed(model, crops), expected_ND, atol=1e-6)


def test_embed_in_bf16_stays_close_and_float32(model: EmbeddingModel) -> None:
    embeddings_ND = embed(model, drawn_crops(4), precision="bf16")
    assert embeddings_ND.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings_ND, axis=1), 1, atol=1e-6)
    assert (embeddings_ND * embed(model, drawn_crops(4))).sum(axis=1).min() > 0.99


def test_embed_takes_read_only_crops_and_none_at_all(model: EmbeddingModel) -> None:
    crops = np.frombuffer(drawn_crops(2).tobytes(), np.uint8).reshape(2, 64, 64, 3)
    assert embed(model, crops).shape == (2, 128)
    assert embed(model, crops[:0]).shape == (0, 128)


def test_a_model_can_be_trained_on_after_embed() -> None:
    model = EmbeddingModel(SPEC).train()
    embed(model, drawn_crops(2))
    assert model.training
    model(normalized_images(torch.from_numpy(drawn_crops(2)), SPEC)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("crops", [drawn_crops(2)[0], drawn_crops(2)[..., :1], drawn_crops(2) / 255])
def test_crops_of_another_kind_are_refused(model: EmbeddingModel, crops: np.ndarray) -> None:
    with pytest.raises(UserError, match="uint8 RGB"):
        embed(model, crops)


def test_a_saved_model_loads_bit_for_bit(folder: Path, model: EmbeddingModel) -> None:
    loaded = load_model(str(folder))
    assert not loaded.training
    assert loaded.spec == model.spec
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    np.testing.assert_array_equal(embed(loaded, drawn_crops(2)), embed(model, drawn_crops(2)))


def test_a_model_in_channels_last_is_saved_alike(tmp_path: Path, folder: Path, model: EmbeddingModel) -> None:
    other = EmbeddingModel(SPEC)
    other.load_state_dict(model.state_dict())
    save_model(other.to(memory_format=torch.channels_last), str(tmp_path / "other"))
    assert (tmp_path / "other/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@settings(max_examples=50, deadline=None)
@given(
    head=st.lists(st.integers(1, 512), max_size=3).map(tuple),
    normalize=st.booleans(),
    threshold=st.none() | st.floats(0, 2),
    numbers=st.dictionaries(st.text(), st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()),
)
def test_a_spec_survives_json(
    head: tuple[int, ...], normalize: bool, threshold: float | None, numbers: dict[str, float]
) -> None:
    spec = ModelSpec(
        head=head, normalize=normalize, threshold=threshold, metrics=numbers, fingerprint=numbers, training=numbers
    )
    assert ModelSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99"),
        ({"colour": "red", "size": 3}, r"unknown keys \['colour', 'size'\]"),
        ({"embedding_dim": "128"}, "embedding_dim='128'"),
        ({"head": ["wide"]}, "wrong type"),
        ({"std": [0.2, 0.2, 0.0]}, "std"),
        ({"image_size": 3}, "image_size=3"),
        ({"threshold": float("nan")}, "threshold"),
    ],
)
def test_a_spec_with_bad_values_is_refused(folder: Path, change: dict[str, object], message: str) -> None:
    content = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(content | change))
    with pytest.raises(UserError, match=message):
        load_model(str(folder))


@pytest.mark.parametrize("content", ["[]", "null", '{"version": 1}'])
def test_json_that_is_no_spec_is_refused(folder: Path, content: str) -> None:
    (folder / "model.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.json"):
        load_model(str(folder))


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        load_model(str(folder))


def test_a_path_that_does_not_exist_says_where_models_come_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"jobs/train\.py"):
        load_model(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_refused(folder: Path, share: float) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: int(len(weights) * share)])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_model(str(folder))


def test_weights_with_nan_are_refused(folder: Path, model: EmbeddingModel) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.head[0].bias[3] = float("nan")  # type: ignore[index, operator]
    save_model(broken, str(folder))
    with pytest.raises(UserError, match=r"head\.0\.bias holds NaN"):
        load_model(str(folder))


@pytest.fixture
def other_weights(folder: Path, model: EmbeddingModel, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Return the weights of another model of this kind; a reader waits for hardly any time."""
    monkeypatch.setattr("lib.recognition.model.REPLACED_WITHIN_S", (0.0, 0.0))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head[0].bias += 1  # type: ignore[index, operator]
    save_model(other, str(folder.parent / "other"))
    return (folder.parent / "other" / "model.safetensors").read_bytes()


def test_weights_of_another_model_are_noticed(folder: Path, other_weights: bytes) -> None:
    (folder / "model.safetensors").write_bytes(other_weights)
    with pytest.raises(UserError, match=r"describes other weights than model\.safetensors"):
        load_model(str(folder))


def test_a_model_that_is_being_replaced_is_read_once_it_is_whole(
    folder: Path, other_weights: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "model.safetensors").write_bytes(other_weights)
    replaced = (folder.parent / "other" / "model.json").read_bytes()
    monkeypatch.setattr("time.sleep", lambda _: (folder / "model.json").write_bytes(replaced))
    loaded, other = load_model(str(folder)), load_model(str(folder.parent / "other"))
    np.testing.assert_array_equal(embed(loaded, drawn_crops(2)), embed(other, drawn_crops(2)))


def test_a_threshold_leaves_the_weights_their_own(folder: Path, other_weights: bytes) -> None:
    keep_threshold(str(folder), 0.5, {})
    assert load_model(str(folder)).spec.threshold == 0.5
    (folder / "model.safetensors").write_bytes(other_weights)
    with pytest.raises(UserError, match="describes other weights"):
        load_model(str(folder))


def test_a_folder_of_an_older_version_is_read(folder: Path) -> None:
    content = json.loads((folder / "model.json").read_text())
    del content["weights_sha256"]
    (folder / "model.json").write_text(json.dumps(content))
    assert load_model(str(folder)).spec == SPEC


def test_the_model_card_tells_what_it_was_made_from(tmp_path: Path, model: EmbeddingModel) -> None:
    told = EmbeddingModel(
        dataclasses.replace(
            SPEC,
            threshold=0.4321,
            metrics={"accuracy": 0.915, "num_pairs": 6000},
            training={"num_identities": 504, "num_photos": 4096},
            fingerprint={"detector": "retinaface-mobilenet0.25"},
        )
    )
    save_model(told, str(tmp_path))
    card = (tmp_path / "README.md").read_text()
    for text in ("0.4321", "accuracy: 0.915", "num_identities: 504", "retinaface-mobilenet0.25", "biometric"):
        assert text in card
    save_model(model, str(tmp_path))
    assert "No threshold has been chosen" in (tmp_path / "README.md").read_text()


def test_the_three_lines_of_the_model_card_run(folder: Path, model: EmbeddingModel) -> None:
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {"crops_NHWC": drawn_crops(2)}
    exec(code.replace('"URL of this folder"', repr(str(folder))), names)  # noqa: S102
    np.testing.assert_array_equal(names["embeddings_ND"], embed(model, drawn_crops(2)))


@pytest.mark.parametrize("where", ["model folder", "run folder"])
def test_training_goes_on_from_an_earlier_run(folder: Path, model: EmbeddingModel, where: str) -> None:
    spec = dataclasses.replace(SPEC, image_size=96, mean=(0.0, 0.0, 0.0))
    started = initial_model(spec, str(folder if where == "model folder" else folder.parent))
    assert started.training
    assert started.spec == dataclasses.replace(SPEC, image_size=96)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in started.state_dict().items())


def test_a_head_of_other_layers_starts_anew(
    folder: Path, model: EmbeddingModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        started = initial_model(dataclasses.replace(SPEC, embedding_dim=32), str(folder))
    assert "head starts from random weights" in caplog.text
    assert started.head[0].out_features == 32
    assert torch.equal(started.backbone.stem[0].weight, model.backbone.stem[0].weight)


def test_an_earlier_run_of_another_backbone_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="--backbone test_convnext"):
        initial_model(ModelSpec(backbone="test_efficientnet", image_size=64), str(folder))


def test_an_init_that_is_nothing_lists_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="efficientnet-lite0"):
        initial_model(SPEC, str(tmp_path))


def test_random_initial_weights_follow_the_seed() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(initial_model(SPEC, "none"))
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not models[0].is_pretrained
