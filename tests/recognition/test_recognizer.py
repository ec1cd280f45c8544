"""The model on single photos: the same crops as preprocess, verification, the README's lines, and what is refused."""

import dataclasses
import logging
import os
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lib import storage
from lib.errors import UserError
from lib.faces import table
from lib.faces.extraction import settings_from_fingerprint
from lib.recognition.model import embed, load_model, save_model
from lib.recognition.recognizer import FaceRecognizer, decoded_crop
from tests.job_runner import ROOT

UPRIGHT, TRANSPOSED = 1, 6


@pytest.fixture(scope="module")
def recognizer(model_url: str) -> FaceRecognizer:
    return FaceRecognizer.load(model_url)


@pytest.fixture(scope="module")
def aligned(faces_url: str) -> list[dict]:
    """Return the aligned rows of the faces table."""
    rows = [
        row for path in Path(faces_url).glob("split=*/*.parquet") for row in pq.ParquetFile(path).read().to_pylist()
    ]
    return [row for row in rows if row["status"] == table.ALIGNED]


@pytest.fixture(scope="module")
def single(sample_data: Path, aligned: list[dict]) -> list[Path]:
    """Return photos with one face, of two people and more."""
    return [sample_data / "photos" / row["photo"] for row in aligned if row["num_faces"] == 1]


@pytest.fixture(scope="module")
def double(sample_data: Path, aligned: list[dict]) -> Path:
    """Return a photo with two faces."""
    return next(sample_data / "photos" / row["photo"] for row in aligned if row["num_faces"] > 1)


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """Return a photo without a face."""
    Image.new("RGB", (320, 240), (90, 120, 90)).save(tmp_path / "meadow.jpg")
    return tmp_path / "meadow.jpg"


def test_the_first_face_is_bit_for_bit_the_crop_of_preprocess(
    recognizer: FaceRecognizer, sample_data: Path, aligned: list[dict]
) -> None:
    for row in aligned[::3]:
        face = recognizer.faces(sample_data / "photos" / row["photo"])[0]
        assert np.array_equal(face.crop_HWC, decoded_crop(row["crop"])), row["photo"]
        assert face.box_4.tolist() == row["box"]
        assert face.landmarks_52.reshape(-1).tolist() == row["landmarks"]
        assert face.score == pytest.approx(row["score"])


def test_the_embedding_is_that_of_the_crop(recognizer: FaceRecognizer, model_url: str, single: list[Path]) -> None:
    face = recognizer.faces(single[0])[0]
    assert np.array_equal(face.embedding_D, embed(load_model(model_url), face.crop_HWC[None])[0])


@pytest.mark.parametrize("orientation", [UPRIGHT, TRANSPOSED])
def test_files_images_and_arrays_give_the_same_face(
    recognizer: FaceRecognizer, single: list[Path], tmp_path: Path, orientation: int
) -> None:
    pixels = cv2.cvtColor(cv2.imread(str(single[0])), cv2.COLOR_BGR2RGB)
    stored = Image.fromarray(pixels if orientation == UPRIGHT else np.ascontiguousarray(np.rot90(pixels)))
    stored.getexif()[0x0112] = orientation
    stored.save(tmp_path / "é a.png", exif=stored.getexif())
    with Image.open(tmp_path / "é a.png") as image:
        faces = [recognizer.faces(source)[0] for source in (str(tmp_path / "é a.png"), image, pixels)]
    for face in faces[1:]:
        assert np.array_equal(face.crop_HWC, faces[0].crop_HWC)
        assert np.array_equal(face.embedding_D, faces[0].embedding_D)


def test_every_face_of_a_photo_is_found(recognizer: FaceRecognizer, double: Path) -> None:
    faces = recognizer.faces(double)
    assert len(faces) == 2
    assert recognizer.distance(faces[0], faces[1]) > 0


def test_verify_compares_the_distance_with_the_threshold(
    recognizer: FaceRecognizer, model_url: str, single: list[Path]
) -> None:
    same = recognizer.verify(single[0], single[0])
    assert same
    assert same.distance == 0
    assert same.threshold == 0.1
    distance = recognizer.distance(single[0], single[-1])
    first, last = (recognizer.faces(path)[0].embedding_D for path in (single[0], single[-1]))
    assert distance == pytest.approx(float(np.sqrt(((first - last) ** 2).sum())))
    assert FaceRecognizer.load(model_url, threshold=distance).verify(single[0], single[-1]).same
    assert not FaceRecognizer.load(model_url, threshold=distance * 0.999).verify(single[0], single[-1])


def test_two_faces_must_be_told_apart_by_the_caller(
    recognizer: FaceRecognizer, single: list[Path], double: Path
) -> None:
    with pytest.raises(UserError, match=f"2 faces were found in '{double}'"):
        recognizer.verify(single[0], double)
    assert recognizer.verify(recognizer.faces(double)[1], recognizer.faces(double)[1]).same


def test_a_photo_without_a_face_has_none_and_cannot_be_verified(
    recognizer: FaceRecognizer, single: list[Path], empty: Path
) -> None:
    assert recognizer.faces(empty) == []
    with pytest.raises(UserError, match=r"no face was found in .*meadow"):
        recognizer.verify(empty, single[0])


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        ("/nowhere/a.jpg", "/nowhere/a.jpg"),
        (str(ROOT / "README.md"), "README.md' is no photo"),
        (np.zeros((40, 40), np.uint8), r"uint8 array of shape \(40, 40\) is no photo"),
        (np.zeros((40, 40, 3), np.float32), "float32 array"),
        (np.zeros((0, 40, 3), np.uint8), "no photo"),
        (7, "int is no photo"),
    ],
)
def test_what_is_no_photo_is_named(recognizer: FaceRecognizer, picture: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        recognizer.faces(picture)  # type: ignore[arg-type]


def test_a_model_without_a_threshold_asks_for_one(model_url: str, single: list[Path], tmp_path: Path) -> None:
    model = load_model(model_url)
    model.spec = dataclasses.replace(model.spec, threshold=None)
    save_model(model, str(tmp_path / "model"))
    recognizer = FaceRecognizer.load(tmp_path)  # a run folder, the model is in it
    assert recognizer.distance(single[0], single[0]) == 0
    with pytest.raises(UserError, match=r"no threshold yet.*jobs/evaluate.py"):
        recognizer.verify(single[0], single[0])


def test_the_detector_and_alignment_are_those_of_the_model(model_url: str, single: list[Path], tmp_path: Path) -> None:
    model = load_model(model_url)
    changed = settings_from_fingerprint({**model.spec.fingerprint, "image_size": 96, "eye_height": 0.5})
    assert (changed.alignment.image_size, changed.alignment.eye_height, changed.policy) == (96, 0.5, "prominent")
    model.spec = dataclasses.replace(model.spec, fingerprint={**model.spec.fingerprint, "image_size": 96})
    save_model(model, str(tmp_path))
    assert FaceRecognizer.load(tmp_path).faces(single[0])[0].crop_HWC.shape == (96, 96, 3)


def test_other_faces_than_the_models_are_warned_of_or_refused(
    model_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(model_url)
    model.spec = dataclasses.replace(model.spec, fingerprint={**model.spec.fingerprint, "detector_sha256": "beef"})
    save_model(model, str(tmp_path))
    with caplog.at_level(logging.WARNING):
        FaceRecognizer.load(tmp_path)
    assert "detector_sha256" in caplog.text
    with pytest.raises(UserError, match=r"detector_sha256: \w+ here, beef there"):
        FaceRecognizer.load(tmp_path, strict=True)


def test_a_model_is_loaded_from_a_bucket(s3_bucket: str, model_url: str, single: list[Path]) -> None:
    for info in storage.list_files(model_url):
        storage.write_bytes(f"{s3_bucket}/m ü/{info.path}", storage.read_bytes(f"{model_url}/{info.path}"))
    storage.write_bytes(f"{s3_bucket}/one.jpg", single[0].read_bytes())
    assert FaceRecognizer.load(f"{s3_bucket}/m ü").verify(f"{s3_bucket}/one.jpg", single[0]).same


def test_no_model_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model at .*jobs/train.py"):
        FaceRecognizer.load(tmp_path)


def test_the_lines_of_the_model_card_on_photos_run(
    model_url: str, single: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (Path(model_url) / "README.md").read_text().split("```python\n")[2].split("```")[0]
    os.link(single[0], tmp_path / "one.jpg")
    os.link(single[0], tmp_path / "other.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("URL of this folder", model_url), names)  # noqa: S102
    assert names["verification"].same
    assert names["embedding_D"].shape == (16,)


def test_the_lines_of_the_documentation_run(
    model_url: str, single: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pages = (ROOT / "README.md", ROOT / "docs" / "verify.md")  # the second has more of the same
    short, code = (each for page in pages for each in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    shutil.copytree(model_url, tmp_path / "runs" / "first" / "model")
    os.link(single[0], tmp_path / "one.jpg")
    os.link(single[-1], tmp_path / "other.jpg")
    monkeypatch.chdir(tmp_path)
    exec(short, {})  # noqa: S102
    exec(code, {})  # noqa: S102
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == printed[-2]
    assert printed[-3].split()[0] == printed[-2]
    assert float(printed[-3].split()[1]) == float(printed[-1])
