import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, UnidentifiedImageError
from sklearn.neighbors import NearestCentroid

from lib.errors import UserError
from lib.sample.drawing import Pen, curve, mirrored
from lib.sample.people import Moment, Person
from lib.sample.portrait import draw_person
from lib.sample.sample_job import KINDS, SampleConfig, SamplePlan, draw_photo, make_sample

REPOSITORY = Path(__file__).parents[2]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fotos d'été 写真 ") / "data"
    make_sample(SampleConfig(data=str(folder), identities=10, photos_per_identity=10, seed=3))
    return folder


def test_every_photo_is_listed_once_with_its_identity(sample: Path) -> None:
    lines = (sample / "identities.txt").read_text().splitlines()
    names, identities = zip(*(line.rsplit(" ", 1) for line in lines), strict=True)
    assert sorted(names) == sorted(path.name for path in (sample / "photos").iterdir())
    assert {identity: identities.count(identity) for identity in identities} == {str(i): 10 for i in range(1, 11)}


def test_landmarks_tell_of_every_photo_what_identities_txt_tells(sample: Path) -> None:
    rows = pq.read_table(sample / "landmarks.parquet").to_pylist()
    listed = dict(line.rsplit(" ", 1) for line in (sample / "identities.txt").read_text().splitlines())
    assert {row["photo"] for row in rows} == set(listed)
    first_rows = [row for row in rows if row["face_index"] in (0, None)]
    assert len(first_rows) == len(listed)
    assert all(str(row["identity"]) == listed[row["photo"]] for row in first_rows)
    num_faces = {"one": 1, "two": 2, "none": 0, "broken": 0}
    for photo, group in itertools.groupby(rows, key=lambda row: row["photo"]):
        faces = [row for row in group if row["landmarks"] is not None]
        kind = next(row["kind"] for row in rows if row["photo"] == photo)
        assert [face["face_index"] for face in faces] == list(range(num_faces[kind]))


@pytest.mark.parametrize("seed", [0, 3, 11])
def test_a_hundred_photos_hold_every_kind_and_every_encoding(seed: int) -> None:
    plan = SamplePlan(identities=20, photos_per_identity=5, seed=seed)
    kinds, encodings = zip(*(plan.special(photo) for photo in range(len(plan))), strict=True)
    assert set(kinds) == set(KINDS)
    assert {kind: kinds.count(kind) for kind in KINDS} == {"one": 92, "two": 3, "none": 2, "broken": 3}
    assert {"jpeg", "progressive", "greyscale", "exif", "png", "webp", "truncated", "text", "nothing"} == set(encodings)


def test_readable_photos_have_the_stated_size_and_the_broken_ones_do_not_open(sample: Path) -> None:
    for row in pq.read_table(sample / "landmarks.parquet").to_pylist():
        data = (sample / "photos" / row["photo"]).read_bytes()
        if row["kind"] == "broken":
            with pytest.raises((UnidentifiedImageError, OSError)):
                Image.open(io.BytesIO(data)).load()
            continue
        upright = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        assert upright.shape[:2] == (row["height"], row["width"])


def test_special_files_are_what_they_are_meant_to_be() -> None:
    plan = SamplePlan(identities=20, photos_per_identity=5, seed=0)
    photos = {plan.special(photo)[1]: photo for photo in range(len(plan))}
    opened = {
        encoding: Image.open(io.BytesIO(draw_photo(plan, photos[encoding])[0]))
        for encoding in ("progressive", "greyscale", "exif", "png", "webp")
    }
    assert opened["progressive"].info["progressive"]
    assert opened["greyscale"].mode == "L"
    assert opened["exif"].getexif()[0x0112] == 6
    assert (opened["png"].format, opened["webp"].format) == ("PNG", "WEBP")
    assert plan.name(photos["png"]).endswith(".png")
    assert plan.name(photos["webp"]).endswith(".webp")


def test_landmarks_lie_inside_the_photo_and_the_labelled_face_is_the_most_prominent() -> None:
    plan = SamplePlan(identities=40, photos_per_identity=5, seed=1)
    num_pairs = 0
    for photo in range(len(plan)):
        if plan.special(photo)[0] == "broken":
            continue
        faces = [row for row in draw_photo(plan, photo)[1] if "landmarks" in row]
        points_F52 = np.array([face["landmarks"] for face in faces]).reshape(-1, 5, 2)
        for face, points_52 in zip(faces, points_F52, strict=True):
            assert (points_52 >= 0).all()
            assert (points_52 < (face["width"], face["height"])).all()
        if len(faces) == 2:
            num_pairs += 1
            spans = [np.linalg.norm(points_52[1] - points_52[0]) for points_52 in points_F52]
            middle = np.array([faces[0]["width"], faces[0]["height"]]) / 2
            offsets = [np.linalg.norm(points_52.mean(axis=0) - middle) for points_52 in points_F52]
            assert spans[0] > spans[1]
            assert offsets[0] < offsets[1]
    assert num_pairs == 6


def test_the_line_through_the_eyes_has_the_roll_that_was_drawn() -> None:
    for number in range(50):
        rng = np.random.default_rng(number)
        moment = Moment.random(rng)
        picture, mask = np.zeros((300, 300, 3), np.uint8), np.zeros((300, 300), np.uint8)
        points_52 = draw_person(picture, mask, Person.random(rng), moment, np.array([150.0, 140.0]), 40.0)
        across, down = points_52[1] - points_52[0]
        assert np.arctan2(down, across) == pytest.approx(moment.roll, abs=1e-9)
        upright = (points_52 - points_52[:2].mean(axis=0)) @ np.array(
            [[np.cos(moment.roll), -np.sin(moment.roll)], [np.sin(moment.roll), np.cos(moment.roll)]]
        )
        left_eye, right_eye, nose, mouth_left, mouth_right = upright
        assert left_eye[0] < nose[0] < right_eye[0]
        assert 0 < nose[1] < min(mouth_left[1], mouth_right[1])


def test_the_pupil_is_drawn_where_the_eye_landmark_says() -> None:
    rng = np.random.default_rng(5)
    person = Person.random(rng)
    moment = Moment(
        roll=0.3, yaw=0.2, pitch=0.0, smile=0.0, mouth_open=0.0, eyes_open=1.0, brows_raised=0.0, gaze=0.0,
        clothes=(9.0, 9.0, 9.0), collar=0,
    )  # fmt: skip
    picture, mask = np.full((700, 700, 3), 200, np.uint8), np.zeros((700, 700), np.uint8)
    eyes_52 = draw_person(picture, mask, person, moment, np.array([350.0, 300.0]), 150.0)[:2]
    for x, y in np.rint(eyes_52).astype(int):
        assert picture[y, x].max() < 30
        assert mask[y, x] == 255


def test_a_turned_head_shows_its_nose_to_that_side() -> None:
    canvas, mask = np.zeros((10, 10, 3), np.uint8), np.zeros((10, 10), np.uint8)
    middle_12 = np.array([[0.0, 0.6]])
    turned = [
        Pen(canvas, mask, np.zeros(2), 1.0, 0.0, yaw, 0.0).turned(middle_12, lift=0.3)[0, 0] for yaw in (-0.3, 0, 0.3)
    ]
    assert turned[0] == pytest.approx(-turned[2])
    assert turned[1] == 0
    assert turned[2] > 0.2


def test_a_smooth_line_passes_through_its_points_and_a_mirrored_one_is_symmetric() -> None:
    knots_K2 = np.array([(0.0, 0.0), (1.0, 2.0), (3.0, 1.0), (4.0, 4.0)])
    assert np.allclose(curve(knots_K2, steps=5)[::5], knots_K2)
    both = mirrored([(0.0, 1.0), (2.0, 3.0), (0.0, 5.0)])
    assert both.tolist() == [[0, 1], [2, 3], [0, 5], [-2, 3]]


def test_the_same_seed_gives_the_same_bytes_in_any_order() -> None:
    plan = SamplePlan(identities=5, photos_per_identity=4, seed=7)
    forwards = [draw_photo(plan, photo)[0] for photo in range(len(plan))]
    backwards = [draw_photo(plan, photo)[0] for photo in reversed(range(len(plan)))]
    assert forwards == backwards[::-1]
    assert forwards != [draw_photo(SamplePlan(identities=5, photos_per_identity=4, seed=8), i)[0] for i in range(20)]


def test_several_processes_write_what_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"identities": 3, "photos_per_identity": 4, "seed": 2}
    make_sample(SampleConfig(data=str(tmp_path / "alone"), **settings))
    monkeypatch.setattr("lib.sample.sample_job._PHOTOS_A_PROCESS", 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    make_sample(SampleConfig(data=str(tmp_path / "together"), **settings))
    assert snapshot(tmp_path / "alone") == snapshot(tmp_path / "together")


def test_people_are_not_told_apart_by_mean_colour() -> None:
    """A classifier on the mean colour of the face, trained on half of the photos, hardly ever names the right one."""
    plan = SamplePlan(identities=40, photos_per_identity=10, seed=4)
    colours, identities = [], []
    for photo in range(len(plan)):
        kind, encoding = plan.special(photo)
        if kind != "one" or encoding == "greyscale":
            continue
        data, [row] = draw_photo(plan, photo)
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        eyes_22 = row["landmarks"].reshape(5, 2)[:2]
        x, y = eyes_22.mean(axis=0)
        reach = np.linalg.norm(eyes_22[1] - eyes_22[0])
        top, bottom, left, right = (
            max(0, round(v)) for v in (y - reach, y + 1.7 * reach, x - 1.2 * reach, x + 1.2 * reach)
        )
        colours.append(picture[top:bottom, left:right].mean(axis=(0, 1)))
        identities.append(row["identity"])
    classifier = NearestCentroid().fit(colours[::2], identities[::2])
    assert classifier.score(colours[1::2], identities[1::2]) < 0.2


def test_a_finished_sample_is_left_as_it_is(sample: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in sample.rglob("*")}
    result = make_sample(SampleConfig(data=str(sample), identities=10, photos_per_identity=10, seed=3))
    assert (result["drawn"], result["photos"], result["one"]) == (0, 100, 92)
    assert before == {path: path.stat().st_mtime_ns for path in sample.rglob("*")}


def test_other_settings_are_refused_and_overwrite_replaces_every_file(tmp_path: Path) -> None:
    make_sample(SampleConfig(data=str(tmp_path / "data"), identities=4, photos_per_identity=3))
    with pytest.raises(UserError, match=r"identities 4 there, 2 asked for.*--overwrite"):
        make_sample(SampleConfig(data=str(tmp_path / "data"), identities=2, photos_per_identity=3))
    make_sample(SampleConfig(data=str(tmp_path / "data"), identities=2, photos_per_identity=3, overwrite=True))
    make_sample(SampleConfig(data=str(tmp_path / "fresh"), identities=2, photos_per_identity=3))
    assert snapshot(tmp_path / "data") == snapshot(tmp_path / "fresh")


def test_an_interrupted_sample_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SampleConfig(data=str(tmp_path / "data"), identities=2, photos_per_identity=5)

    def stop_at_seven(plan: SamplePlan, photo: int) -> object:
        if photo == 7:
            raise KeyboardInterrupt
        return draw_photo(plan, photo)

    monkeypatch.setattr("lib.sample.sample_job.draw_photo", stop_at_seven)
    with pytest.raises(KeyboardInterrupt):
        make_sample(config)
    monkeypatch.undo()
    assert make_sample(config)["drawn"] == 10
    make_sample(SampleConfig(data=str(tmp_path / "fresh"), identities=2, photos_per_identity=5))
    assert snapshot(tmp_path / "data") == snapshot(tmp_path / "fresh")


def test_a_deleted_photo_is_drawn_again(tmp_path: Path) -> None:
    config = SampleConfig(data=str(tmp_path), identities=2, photos_per_identity=2)
    make_sample(config)
    before = snapshot(tmp_path)
    (tmp_path / "photos" / "00001_001.jpg").unlink()
    assert make_sample(config)["drawn"] == 4
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "stranger", ["photos/my holiday.jpg", "identities.txt", "photos/nested/é.jpg", "landmarks.parquet"]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_someone_else_are_never_touched(tmp_path: Path, stranger: str, overwrite: bool) -> None:
    (tmp_path / stranger).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / stranger).write_bytes(b"precious")
    with pytest.raises(UserError, match=r"nothing was touched|no whole Parquet file"):
        make_sample(SampleConfig(data=str(tmp_path), identities=1, photos_per_identity=1, overwrite=overwrite))
    assert snapshot(tmp_path) == {stranger: b"precious"}


def test_a_strange_photo_among_a_samples_own_stops_an_overwrite(tmp_path: Path) -> None:
    make_sample(SampleConfig(data=str(tmp_path), identities=1, photos_per_identity=2))
    (tmp_path / "photos" / "mine.jpg").write_bytes(b"precious")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"1 files.*mine\.jpg.*nothing was touched"):
        make_sample(SampleConfig(data=str(tmp_path), identities=1, photos_per_identity=1, overwrite=True))
    assert snapshot(tmp_path) == before


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    result = make_sample(SampleConfig(data=str(tmp_path), identities=10, photos_per_identity=10, dry_run=True))
    assert (result["photos"], result["to_draw"], result["to_delete"]) == (100, 100, 0)
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("wrong", [{"identities": 0}, {"photos_per_identity": -1}, {"seed": -1}])
def test_impossible_settings_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="allowed"):
        SampleConfig(data=str(tmp_path), **wrong)


def test_the_job_ends_with_one_line_of_json(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "jobs/sample.py", "--identities", "2", "--photos-per-identity", "2"],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": ".", "DATA_URL": str(tmp_path / "a b é")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    result = json.loads(line)
    assert (result["photos"], result["identities"], result["drawn"]) == (4, 2, 4)
    assert sum(result[kind] for kind in KINDS) == 4
    assert result["photos_per_s"] > 0
    assert "drawing" in done.stderr
