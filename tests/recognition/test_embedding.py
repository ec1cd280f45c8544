"""Crops on their way into a model: batches, another alignment, what is no picture; which model and folder are meant."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from lib.errors import UserError
from lib.faces import table
from lib.faces.aligned import ARCFACE_SIDE, UNKNOWN, AlignedCrops
from lib.faces.alignment import ARCFACE, EYES, Alignment, align
from lib.faces.images import Photo
from lib.layout import Layout
from lib.recognition.embed_job import model_name
from lib.recognition.embed_worker import BATCH_SIZE, EmbedWorker, embed_faces
from lib.recognition.embedder import find_model
from lib.recognition.face_source import FacesSource, check_source
from lib.recognition.model import SPEC_NAME
from lib.recognition.recognizer import decoded_crop


class Recorder:
    """An `Embedder` that keeps the crops and gives their means."""

    url, digest, embedding_dim = "a model", "0", 3
    threshold: float | None = None
    fingerprint: Mapping[str, Any] = {}

    def __init__(self, template: str, value: float = 1.0) -> None:
        self.template = template
        self.value = value
        self.batches: list[np.ndarray] = []

    def embed(self, crops_NHWC: np.ndarray) -> np.ndarray:
        """Return the mean of each channel."""
        self.batches.append(crops_NHWC)
        return crops_NHWC.mean(axis=(1, 2)).astype(np.float32) * np.float32(self.value)


@pytest.fixture(scope="module")
def faces(faces_url: str) -> list[dict]:
    """Return the aligned rows of the drawn people."""
    rows = [
        row for path in sorted(Path(faces_url).glob("split=*/*")) for row in pq.ParquetFile(path).read().to_pylist()
    ]
    return [row for row in rows if row["status"] == table.ALIGNED]


def test_a_worker_refuses_another_model_than_the_job_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.recognition.embed_worker.load_embedder", lambda *_, **__: Recorder(EYES))
    about = {"digest": "1", "embedding_dim": 3, "template": EYES}
    with pytest.raises(UserError, match="a model changed since this job began"):
        EmbedWorker(("a model", None), "out", None, {}, about, False)
    EmbedWorker(("a model", None), "out", None, {}, {**about, "digest": "0"}, False)


def test_crops_go_through_in_batches_and_in_order(faces: list[dict]) -> None:
    model = Recorder(EYES)
    embeddings_ND = embed_faces(model, faces, Alignment())
    assert [len(batch) for batch in model.batches] == [BATCH_SIZE, len(faces) - BATCH_SIZE]
    for row, embedding_D in zip(faces, embeddings_ND, strict=True):
        np.testing.assert_allclose(embedding_D, decoded_crop(row["crop"]).mean(axis=(0, 1)), rtol=1e-4)


def test_a_model_of_another_template_gets_crops_turned_to_it(faces: list[dict], sample_data: Path) -> None:
    model = Recorder(ARCFACE)
    embed_faces(model, faces[:20], Alignment())
    wanted = Alignment(template=ARCFACE, image_size=112)
    differences = []
    for row, crop_HWC in zip(faces[:20], model.batches[0], strict=True):
        photo = Photo((sample_data / "photos" / row["photo"]).read_bytes(), max_pixels=10**8)
        direct_HWC = align(photo, np.array(row["box"]), np.array(row["landmarks"]).reshape(5, 2), wanted)[..., ::-1]
        middle = slice(24, 88)
        differences.append(np.abs(crop_HWC[middle, middle].astype(int) - direct_HWC[middle, middle]).mean())
    assert np.median(differences) < 4  # twice resampled and once compressed


def _crops(template: str) -> FacesSource:
    made = ARCFACE if template == ARCFACE else EYES
    how = AlignedCrops(template=template, alignment=Alignment(template=made, image_size=ARCFACE_SIDE))
    return FacesSource(url="faces", run_id="0", fingerprint=how.fingerprint(), file_names=[], num_rows=[])


@pytest.mark.parametrize("template", [EYES, UNKNOWN])
def test_crops_without_landmarks_are_refused_before_any_work_where_the_model_wants_them_turned(template: str) -> None:
    with pytest.raises(UserError, match=f"wants faces aligned as arcface-112, .* --aligned {template} have no landm"):
        check_source(_crops(template), Recorder(ARCFACE), strict=False)


@pytest.mark.parametrize(("template", "wanted"), [(EYES, EYES), (UNKNOWN, EYES), (ARCFACE, ARCFACE), (ARCFACE, EYES)])
def test_crops_of_the_models_template_or_with_landmarks_are_taken(template: str, wanted: str) -> None:
    assert check_source(_crops(template), Recorder(wanted), strict=True) == []


def test_a_crop_that_is_no_picture_is_told() -> None:
    with pytest.raises(UserError, match="a crop of the faces table is no picture"):
        embed_faces(Recorder(EYES), [{"crop": b"?"}], Alignment())


def test_embeddings_that_are_not_finite_are_told(faces: list[dict]) -> None:
    with pytest.raises(UserError, match="'a model' gives NaN or infinity for 5 of 5 faces"):
        embed_faces(Recorder(EYES, float("nan")), faces[:5], Alignment())


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://b/runs/first é/model", "first é"),
        ("/m/mobile.onnx", "mobile"),
        ("/runs/first é/model.onnx", "first é"),
        ("/my model/", "my model"),
        ("model", "model"),
    ],
)
def test_a_model_is_called_after_its_run(url: str, name: str) -> None:
    assert model_name(url) == name


def test_the_one_run_with_a_model_is_the_default(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a model yet"):
        find_model(Layout(str(tmp_path)), None)
    for run in ("a b", "c"):
        (tmp_path / "runs" / run / "model").mkdir(parents=True)
        (tmp_path / "runs" / run / "model" / SPEC_NAME).write_text("{}")
        if run == "a b":
            assert find_model(Layout(str(tmp_path)), None) == str(tmp_path / "runs" / "a b" / "model")
    with pytest.raises(UserError, match=r"2 runs in .* have a model \(a b, c\): name one by --model"):
        find_model(Layout(str(tmp_path)), None)
    assert find_model(Layout(str(tmp_path)), str(tmp_path / "runs" / "c")) == str(tmp_path / "runs" / "c" / "model")
