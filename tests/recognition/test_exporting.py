"""The ONNX file of a model: the same embeddings, in any batch, by this project and by ONNX Runtime alone."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from lib.errors import JobError, UserError
from lib.faces.table import SCHEMA
from lib.recognition import export_job
from lib.recognition.embedder import TorchEmbedder, load_embedder
from lib.recognition.export_job import ExportConfig, export, onnx_bytes, real_crops
from lib.recognition.model import EmbeddingModel, ModelSpec, embed, load_model, save_model
from lib.recognition.onnx_model import METADATA_KEY
from lib.recognition.recognizer import FaceRecognizer
from lib.storage import write_json, write_parquet
from tests.job_runner import run_here


@pytest.fixture(scope="module")
def exported(model_url: str, faces_url: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """Return the file that the job makes, and what it says."""
    output = str(tmp_path_factory.mktemp("out é") / "model 1.onnx")
    done = run_here("export.py", "--model", model_url, "--faces", faces_url, "--output", output)
    assert done.status == 0, done.errors
    return output, done.result


def test_the_job_tells_the_difference_and_the_speeds(exported: tuple[str, dict]) -> None:
    output, result = exported
    assert result["onnx"] == output
    assert result["faces_checked"] == 64
    assert 0 <= result["max_difference"] < 1e-4
    assert result["pytorch_faces_per_s"] > 0
    assert result["onnxruntime_faces_per_s"] > 0
    assert result["bytes"] == Path(output).stat().st_size


@pytest.mark.parametrize("num", [1, 2, 7])
def test_onnx_runtime_alone_gives_the_embeddings(
    exported: tuple[str, dict], model_url: str, faces_url: str, num: int
) -> None:
    model = load_model(model_url)
    crops_NHWC = export_job.resized_crops(real_crops(faces_url, num), model.spec.image_size)
    session = onnxruntime.InferenceSession(exported[0], providers=["CPUExecutionProvider"])
    (embeddings_ND,) = session.run(["embeddings"], {"faces": crops_NHWC})
    np.testing.assert_allclose(embeddings_ND, embed(model, crops_NHWC), atol=1e-4)


def test_the_file_says_what_it_is(exported: tuple[str, dict], model_url: str) -> None:
    model = onnx.load(exported[0])
    onnx.checker.check_model(model)
    about = json.loads({each.key: each.value for each in model.metadata_props}[METADATA_KEY])
    spec = load_model(model_url).spec
    assert (about["threshold"], about["image_size"]) == (spec.threshold, spec.image_size)
    assert about["fingerprint"] == spec.fingerprint
    (taken,) = model.graph.input
    assert [dim.dim_value or dim.dim_param for dim in taken.type.tensor_type.shape.dim] == ["num_faces", 64, 64, 3]


def test_the_file_stands_in_for_the_model(
    exported: tuple[str, dict], model_url: str, sample_data: Path, aligned: list[dict]
) -> None:
    file, folder = load_embedder(exported[0]), TorchEmbedder(model_url)
    for name in ("digest", "embedding_dim", "threshold", "fingerprint", "template"):
        assert getattr(file, name) == getattr(folder, name)
    photo = sample_data / "photos" / aligned[0]["photo"]
    ours, theirs = (FaceRecognizer.load(url).faces(photo)[0].embedding_D for url in (exported[0], model_url))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("backbone", ["test_efficientnet", "test_vit", "test_resnet"])
def test_backbones_of_other_kinds_are_exported(tmp_path: Path, backbone: str) -> None:
    torch.manual_seed(0)
    size = 160 if backbone == "test_vit" else 48
    model = EmbeddingModel(ModelSpec(backbone=backbone, image_size=size, normalize=False, head=(32,))).eval()
    (tmp_path / "m.onnx").write_bytes(onnx_bytes(model, "0" * 16, "eyes"))
    crops_NHWC = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
    file = load_embedder(str(tmp_path / "m.onnx"))
    np.testing.assert_allclose(file.embed(crops_NHWC), embed(model, crops_NHWC), atol=1e-3)


def test_slow_models_are_timed_in_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[int] = []
    assert export_job._rate(lambda: rounds.append(1), 64) > 0
    assert len(rounds) == export_job.TIMED_ROUNDS
    monkeypatch.setattr(export_job, "TIMED_SECONDS", 1e-9)
    export_job._rate(lambda: rounds.append(1), 64)
    assert len(rounds) == export_job.TIMED_ROUNDS + 1


def test_a_file_that_differs_is_not_written(
    exported: tuple[str, dict], model_url: str, faces_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = Path(exported[0]).read_bytes()
    monkeypatch.setattr(export_job, "onnx_bytes", lambda *_: content)
    monkeypatch.setattr(export_job, "MAX_MIRRORED_DIFFERENCE", -1.0)
    with pytest.raises(JobError, match="nothing was written; give --no-flip"):
        export(ExportConfig(model=model_url, faces=faces_url, output=str(tmp_path / "model.onnx"), flip=True))
    monkeypatch.setattr(export_job, "MAX_DIFFERENCE", -1.0)
    output = tmp_path / "model.onnx"
    with pytest.raises(JobError, match=r"differ by .* from the model's"):
        export(ExportConfig(model=model_url, faces=faces_url, output=str(output)))
    assert not output.exists()


def test_bad_input_is_refused_in_one_line(model_url: str, faces_url: str, tmp_path: Path) -> None:
    def refused(**settings: str) -> str:
        with pytest.raises(UserError) as caught:
            export(ExportConfig(**{"model": model_url, "faces": faces_url, "dry_run": True, **settings}))  # type: ignore[arg-type]
        return str(caught.value)

    assert "the file name must end in .onnx" in refused(output=str(tmp_path / "m.pt"))
    assert "no model at" in refused(model=str(tmp_path))
    assert "is an ONNX file already" in refused(model=str(tmp_path / "a.onnx"))
    assert "no finished faces at" in refused(faces=str(tmp_path))
    empty = tmp_path / "faces"
    write_parquet(str(empty / "split=test" / "part-000000.parquet"), SCHEMA.empty_table())
    write_json(str(empty / "_SUCCESS"), {"run_id": "1", "fingerprint": {}, "counts": {}})
    assert "holds no aligned face" in refused(faces=str(empty))


def test_without_output_the_file_lies_in_the_run(model_url: str, faces_url: str, tmp_path: Path) -> None:
    save_model(load_model(model_url), str(tmp_path / "runs" / "first" / "model"))
    result = export(ExportConfig(data=str(tmp_path), faces=faces_url, dry_run=True))
    assert result["onnx"] == str(tmp_path / "runs" / "first" / "model.onnx")
