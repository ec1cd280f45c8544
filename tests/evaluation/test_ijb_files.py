"""Sets in the format of IJB: what is read and refused, and templates against loops that follow the description."""

import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from lib import storage
from lib.errors import UserError
from lib.evaluation.ijb_embedding import PART_IMAGES, IjbWorker, _write_plan, aligned, file_names
from lib.evaluation.ijb_files import IjbSet, read_ijb
from lib.evaluation.ijb_identification import identification
from lib.evaluation.ijb_verification import people_of
from lib.evaluation.templates import template_vectors
from lib.faces.alignment import ARCFACE, ARCFACE_52
from lib.recognition.embed_worker import Computing
from lib.recognition.embedder import load_embedder
from lib.recognition.recognizer import decoded_crop
from tests.evaluation.ijb_sets import (
    HandMade,
    hand_made,
    hand_made_again,
    template_reference,
)


@pytest.fixture(scope="module")
def ijb_folder(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    return made_once("ijb é", hand_made)


@pytest.fixture
def changed(ijb_folder: Path, tmp_path: Path) -> HandMade:
    """Return a copy of the set whose files a test may write anew."""
    shutil.copytree(ijb_folder, tmp_path / "ijb")
    made = hand_made_again(ijb_folder)
    made.folder = tmp_path / "ijb"
    return made


def refused(made: HandMade) -> str:
    made.write()
    with pytest.raises(UserError) as caught:
        read_ijb(str(made.folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_set_is_read_as_it_is_written(ijb_folder: Path) -> None:
    one, made = read_ijb(str(ijb_folder)), hand_made_again(ijb_folder)
    rows = [
        (one.images[int(image)].as_py(), int(one.templates_T[template]), int(media))
        for image, template, media in zip(one.image_R, one.template_R, one.media_R, strict=True)
    ]
    assert rows == made.rows
    assert (one.name, len(one.images)) == ("ijbc", len(made.points))
    pairs = zip(one.templates_T[one.a_P], one.templates_T[one.b_P], one.same_P, strict=True)
    assert [(int(a), int(b), int(same)) for a, b, same in pairs] == made.pairs
    for n, image in enumerate(one.images.to_pylist()):
        assert [*one.landmarks_NX[n], one.score_N[n]] == pytest.approx(made.points[image], abs=1e-4)
    assert set(one.galleries) == {"G1", "G2"}
    assert one.probes is not None
    assert one.templates_T[one.probes.template_E].tolist() == sorted(template for template, _ in made.probes)


def test_images_that_are_not_there_are_told(changed: HandMade) -> None:
    (changed.folder / "loose_crop" / "7.jpg").unlink()
    told = refused(changed)
    assert "1 of the 72 images that" in told
    assert "are not in" in told
    assert told.count("7.jpg") == 1
    changed.rows[0] = ("other.jpg", 1, 1)
    assert "has no landmarks of 1 images of templates, such as other.jpg" in refused(changed)


def test_templates_that_are_not_there_are_told(changed: HandMade) -> None:
    changed.pairs[3:5] = [(1, 999, 0), (998, 2, 0)]
    assert "ijbc_template_pair_label.txt names 1 templates that have no image" in refused(changed)
    changed.pairs[3:5] = []
    changed.galleries["G1"][0] = (555, "S0")
    changed.rows.append((changed.rows[0][0], 555, 1))
    changed.write()
    changed.rows.pop()
    changed._lines(changed.folder / "meta" / "ijbc_face_tid_mid.txt", changed.rows)
    with pytest.raises(UserError, match=r"gallery_G1\.csv names 1 templates that have no image in .* such as 555"):
        read_ijb(str(changed.folder))


def test_folders_that_are_no_set_are_told(changed: HandMade, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder of IJB-B or IJB-C"):
        read_ijb(str(tmp_path / "nothing"))
    (changed.folder / "meta" / "ijbc_template_pair_label.txt").unlink()
    with pytest.raises(UserError, match=r"meta lacks ijbc_template_pair_label\.txt: copy the whole set"):
        read_ijb(str(changed.folder))
    changed.write()
    (changed.folder / "meta" / "ijbb_face_tid_mid.txt").write_text("1.jpg 1 1\n")
    with pytest.raises(UserError, match=r"several sets \(ijbb, ijbc\)"):
        read_ijb(str(changed.folder))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("face_tid_mid.txt", "1.jpg 1\n", "a line is 'image template media', parted by single spaces"),
        ("face_tid_mid.txt", "1.jpg one 1\n", "a line is 'image template media'"),
        ("face_tid_mid.txt", "", "is empty: copy the set again"),
        ("template_pair_label.txt", "1 2 3\n", "a label is 1 for one person or 0"),
        ("template_pair_label.txt", "1 2\n", "a line is 'template template label'"),
        ("1N_probe_mixed.csv", "TEMPLATE_ID,SUBJECT_ID\n2,a\n2,b\n", "a template has two subjects"),
        ("1N_probe_mixed.csv", "TEMPLATE_ID\n2\n", "a line is 'template,subject,…'"),
    ],
)
def test_damaged_files_are_told_in_one_line(changed: HandMade, name: str, content: str, said: str) -> None:
    (changed.folder / "meta" / f"ijbc_{name}").write_text(content)
    with pytest.raises(UserError, match=r".") as caught:
        read_ijb(str(changed.folder))
    assert said in str(caught.value)
    assert f"ijbc_{name}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_landmarks_that_are_no_numbers_are_told(changed: HandMade) -> None:
    changed.points["3.jpg"][4] = float("nan")
    assert "some landmarks or scores are not finite numbers" in refused(changed)


def embedded(one: IjbSet, model_url: str, output: Path, folder: Path) -> list[str]:
    """Embed the images by the worker, in this process, and return the files."""
    embedder = load_embedder(model_url)
    about = {"digest": embedder.digest, "embedding_dim": embedder.embedding_dim, "template": embedder.template}
    fingerprint = {"template": ARCFACE, "image_size": 112}
    _write_plan(one, str(output / "plan.parquet"))
    source = (model_url, None, embedder.flip)
    arguments = (source, str(output), None, fingerprint, about, Computing())
    worker = IjbWorker(str(folder / "loose_crop"), str(output / "plan.parquet"), arguments)
    names = file_names(one, embedder)
    for part, name in enumerate(names):
        assert worker({"part": part, "name": name})["failure"] == ""
    return [str(output / name) for name in names]


@pytest.mark.parametrize("by_score", [False, True])
def test_templates_are_means_of_media(
    changed: HandMade, model_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_score: bool
) -> None:
    monkeypatch.setattr("lib.evaluation.ijb_embedding.PART_IMAGES", 7)
    crop_folder = changed.folder / "loose_crop"
    broken = [image for image, template, _ in changed.rows if template == 12]
    for image in [*broken, "1.jpg"]:
        (crop_folder / image).write_bytes(b"no picture")
    one = read_ijb(str(changed.folder))
    files = embedded(one, model_url, tmp_path / "out", changed.folder)
    assert len(files) == 11
    vectors_TD, failed_T, failed = template_vectors(one, files, by_score=by_score)

    embedder = load_embedder(model_url)
    vector_of = {}
    for image, values in changed.points.items():
        status, crop = aligned(str(crop_folder), image, np.float32(values[:10]).tolist())
        if crop is not None:
            vector_of[image] = embedder.embed(decoded_crop(crop)[None])[0]
        assert status == ("corrupt" if image in {*broken, "1.jpg"} else "aligned")
    expected = template_reference(changed, vector_of, by_score=by_score)
    assert failed == {"corrupt": 3}
    assert [int(one.templates_T[n]) for n in np.flatnonzero(failed_T)] == [12]
    for n, template in enumerate(one.templates_T.tolist()):
        if template != 12:
            np.testing.assert_allclose(vectors_TD[n], expected[template], atol=2e-5)


def test_a_face_is_aligned_by_its_five_points(ijb_folder: Path) -> None:
    made = hand_made_again(ijb_folder)
    for image in ("1.jpg", "20.jpg", "50.jpg"):
        crop = aligned(str(ijb_folder / "loose_crop"), image, made.points[image][:10])[1]
        assert crop is not None
        points = np.array(made.points[image][:10]).reshape(5, 2)
        # The similarity a x - b y + c, b x + a y + d by least squares.
        rows = [[x, -y, 1, 0] for x, y in points] + [[y, x, 0, 1] for x, y in points]
        a, b, c, d = np.linalg.lstsq(np.array(rows), ARCFACE_52.T.ravel(), rcond=None)[0]
        pixels = cv2.imread(str(ijb_folder / "loose_crop" / image))
        scale = np.hypot(a, b)
        blurred = cv2.GaussianBlur(pixels, (0, 0), max(0.3, 0.3 / scale))
        wanted = cv2.warpAffine(blurred, np.array([[a, -b, c], [b, a, d]]), (112, 112))
        difference = np.abs(decoded_crop(crop)[:, :, ::-1].astype(int) - wanted.astype(int)).mean()
        assert difference < 6


def test_other_images_points_and_models_are_other_files(changed: HandMade, model_url: str) -> None:
    embedder = load_embedder(model_url)
    before = file_names(read_ijb(str(changed.folder)), embedder)
    assert file_names(read_ijb(str(changed.folder)), embedder) == before
    assert len(before) == -(-len(changed.points) // PART_IMAGES)
    changed.points["5.jpg"][0] += 1
    moved = file_names(read_ijb(str(changed.write().folder)), embedder)
    assert moved != before
    (changed.folder / "loose_crop" / "5.jpg").write_bytes(b"another")
    assert file_names(read_ijb(str(changed.folder)), embedder) not in (before, moved)


def test_a_set_in_a_bucket_is_read_like_a_local_one(ijb_folder: Path, s3_bucket: str) -> None:
    for path in ijb_folder.rglob("*.*"):
        storage.write_bytes(f"{s3_bucket}/ijb ü/{path.relative_to(ijb_folder)}", path.read_bytes())
    there, here = read_ijb(f"{s3_bucket}/ijb ü"), read_ijb(str(ijb_folder))
    assert there.images == here.images
    np.testing.assert_array_equal(there.a_P, here.a_P)
    np.testing.assert_array_equal(there.landmarks_NX, here.landmarks_NX)
    assert there.marks[0] != here.marks[0]


def test_a_set_without_galleries_has_no_identification(changed: HandMade) -> None:
    for path in (changed.folder / "meta").glob("*1N*"):
        path.unlink()
    one = read_ijb(str(changed.folder))
    assert one.probes is None
    assert identification(np.zeros((36, 2), np.float32), np.zeros(36, bool), one, "ours") is None
    links = people_of(one)
    assert len(np.unique(links)) == 12
