"""Photos of any format go into embed, identify and evaluate as into preprocess, by the same flags and readers."""

import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.errors import UserError
from lib.evaluation.evaluate_config import EvaluateConfig
from lib.faces.aligned import aligned_tables
from lib.faces.alignment import ARCFACE, EYES, Alignment
from lib.faces.extraction import ExtractionSettings
from lib.faces.manifest import read_manifest
from lib.faces.part_plan import plan_parts
from lib.faces.photo_flags import PhotoFlags
from lib.faces.photo_parts import part_item
from lib.faces.preprocess_config import PreprocessConfig
from lib.recognition import photo_faces
from lib.recognition.crops import read_crops
from lib.recognition.embed_job import EmbedConfig
from lib.recognition.embed_worker import Computing, EmbedWorker
from lib.recognition.face_source import PhotosSource, check_source, photos_source
from lib.recognition.photo_faces import PhotoFaces
from lib.recognition.recognizer import decoded_crop
from tests.faces.sources.test_recordio import insightface
from tests.recognition.test_embedding import Recorder

PEOPLE = ["Ada Quill", "Ada Quill", "Ben Fjord"]
AS_ARCFACE = ExtractionSettings(alignment=Alignment(template=ARCFACE, image_size=112))


def crop(number: int, side: int = 112) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (side, side, 3), np.uint8)
    return bytes(cv2.imencode(".jpg", cv2.GaussianBlur(pixels, (0, 0), 3))[1])


def as_folder(folder: Path) -> tuple[str, PhotoFlags]:
    for number, person in enumerate(PEOPLE):
        (folder / "photos" / person).mkdir(parents=True, exist_ok=True)
        (folder / "photos" / person / f"{number}.jpg").write_bytes(crop(number))
    return str(folder / "photos"), PhotoFlags()


def as_records(folder: Path) -> tuple[str, PhotoFlags]:
    insightface(folder / "train.rec", [crop(number) for number in range(3)], [0, 0, 1])
    return str(folder / "train.rec"), PhotoFlags(photos_format="rec")


def as_tar(folder: Path) -> tuple[str, PhotoFlags]:
    as_folder(folder)
    with tarfile.open(folder / "a 000.tar", "w") as archive:
        archive.add(folder / "photos", arcname="")
    return str(folder / "a {000..000}.tar"), PhotoFlags()


def as_zip(folder: Path) -> tuple[str, PhotoFlags]:
    with zipfile.ZipFile(folder / "lfw é.zip", "w") as archive:
        for number, person in enumerate(PEOPLE):
            archive.writestr(f"{person}/{number}.jpg", crop(number))
    return str(folder / "lfw é.zip"), PhotoFlags()


def as_parquet(folder: Path) -> tuple[str, PhotoFlags]:
    columns = {"jpg": [crop(number) for number in range(3)], "who": PEOPLE, "key": ["a", "b", "c"]}
    (folder / "files").mkdir()
    pq.write_table(pa.table(columns), folder / "files" / "a.parquet")
    return str(folder / "files"), PhotoFlags(image_column="jpg", identity_column="who", photo_column="key")


def as_list(folder: Path) -> tuple[str, PhotoFlags]:
    as_folder(folder)
    lines = [f"{n}\t{int(person == PEOPLE[-1])}\tphotos/{person}/{n}.jpg\n" for n, person in enumerate(PEOPLE)]
    (folder / "train.lst").write_text("".join(lines))
    return str(folder / "train.lst"), PhotoFlags()


FORMATS = (as_folder, as_records, as_tar, as_zip, as_parquet, as_list)


@pytest.mark.parametrize("write", FORMATS)
def test_photos_to_embed_are_those_of_preprocess_whatever_their_format(
    write: Callable[[Path], tuple[str, PhotoFlags]], tmp_path: Path
) -> None:
    url, reading = write(tmp_path)
    config = PreprocessConfig(data=str(tmp_path / "data"), photos=url, reading=reading)
    preprocessed = read_manifest(config.source(), None, identities_required=True).photos
    source = photos_source(url, None, ExtractionSettings(), reading=reading)
    names = ["photo", "identity", "split", "source", "row"]
    assert source.manifest.photos.select(names).to_pylist() == preprocessed.select(names).to_pylist()
    identities = source.manifest.photos["identity"].to_pylist()
    assert len(set(identities)) == 2
    assert sorted(identities.count(one) for one in set(identities)) == [1, 2]


def test_photos_of_a_format_that_is_named_are_read_beside_others(tmp_path: Path) -> None:
    as_records(tmp_path)
    url, _ = as_folder(tmp_path)
    with pytest.raises(UserError, match="give --photos-format"):
        photos_source(str(tmp_path), None, ExtractionSettings())
    for name, num in (("rec", 3), ("folder", 3)):
        source = photos_source(str(tmp_path), None, ExtractionSettings(), reading=PhotoFlags(photos_format=name))
        assert len(source.manifest) == num
    assert len(photos_source(url, None, ExtractionSettings()).manifest) == 3


def aligned_source(folder: Path, aligned: str = ARCFACE, settings: ExtractionSettings = AS_ARCFACE) -> PhotosSource:
    url, _ = as_records(folder)
    return photos_source(url, None, settings, reading=PhotoFlags(aligned=aligned))


def test_aligned_crops_are_embedded_as_they_are_and_no_detector_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise AssertionError("the detector is loaded")

    model = Recorder(ARCFACE)
    monkeypatch.setattr("lib.recognition.embed_worker.load_embedder", lambda *_, **__: model)
    monkeypatch.setattr(photo_faces, "FaceExtractor", refuse)
    source = aligned_source(tmp_path)
    about = {"digest": model.digest, "embedding_dim": 3, "template": ARCFACE}
    output = str(tmp_path / "out")
    worker = EmbedWorker(("a model", None, False), output, source.how(), source.fingerprint, about, Computing())
    items = source.items(model.digest)
    done = [worker(item) for item, _, _ in items]
    assert [each["failure"] for each in done] == [""] * len(items)
    assert sum(each["count"] for each in done) == 3
    files = [name for _, names, _ in items for name in names]
    made = pa.concat_tables([pq.ParquetFile(tmp_path / "out" / name).read() for name in files]).to_pylist()
    expected = {
        f"train.rec#{row['row']}": decoded_crop(crop(number)).mean(axis=(0, 1))
        for number, row in enumerate(source.manifest.photos.to_pylist())
    }
    assert sorted(row["photo"] for row in made) == sorted(expected)
    for row in made:
        np.testing.assert_allclose(row["embedding"], expected[row["photo"]], rtol=1e-4)
    crops = read_crops(source, sorted(expected)[:2])
    assert sorted(crops) == sorted(expected)[:2]
    assert set(crops.values()) <= {crop(number) for number in range(3)}


def test_the_faces_are_the_rows_that_preprocess_writes(tmp_path: Path) -> None:
    source = aligned_source(tmp_path)
    reading = PhotoFlags(aligned=ARCFACE)
    config = PreprocessConfig(data=str(tmp_path), photos=source.url, reading=reading)
    how = config.aligned_crops()
    assert how is not None
    assert source.fingerprint == config.fingerprint()
    plan = source.parts()
    assert [part.file_names() for part in plan.parts] == [part.file_names() for part in config_parts(config)]
    for part in plan.parts:
        item = part_item(plan, part)
        written = {split: rows for split, (rows, _) in aligned_tables(source.files, item, how, 100).items()}
        for split, rows, num_photos in PhotoFaces(*source.how()).tables(item):
            assert rows.equals(written[split].select(rows.column_names))
            assert num_photos == len(rows)


def config_parts(config: PreprocessConfig) -> list:
    return plan_parts(read_manifest(config.source(), None, identities_required=True), config.content()).parts


@pytest.mark.parametrize("aligned", ["eyes", "none"])
def test_crops_without_landmarks_do_not_fit_a_model_of_another_template(tmp_path: Path, aligned: str) -> None:
    source = aligned_source(tmp_path, aligned)
    with pytest.raises(UserError, match="no landmarks to align them by: give --aligned arcface-112 if the crops are"):
        check_source(source, Recorder(ARCFACE), strict=False)  # type: ignore[arg-type]
    check_source(source, Recorder(EYES), strict=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [EmbedConfig, EvaluateConfig])
def test_flags_about_photos_need_photos(config: type) -> None:
    reading = PhotoFlags(aligned="eyes", image_column="jpg")
    with pytest.raises(UserError, match=r"^--image-column, --aligned: how to read --photos, which is not given"):
        config(reading=reading)
    config(reading=reading, photos="there")


def test_values_that_cannot_be_are_told() -> None:
    with pytest.raises(UserError, match="--photos-format is 'rar': allowed are auto, folder"):
        PhotoFlags(photos_format="rar")
    with pytest.raises(UserError, match="--aligned is 'mtcnn': allowed are arcface-112, eyes, none"):
        PhotoFlags(aligned="mtcnn")
    with pytest.raises(UserError, match="--verify is for --aligned"):
        PhotoFlags(verify=True)
