"""The measures of a face's quality: each goes the way of what it measures, and missing crops have none."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from lib.faces import quality, table
from lib.faces.images import to_jpeg
from lib.sample.people import Moment, Person
from lib.sample.scenery import take_photo

GOOD = {"eye_distance": 60.0, "sharpness": 400.0, "brightness": 130.0, "contrast": 45.0, "yaw": 0.0, "pitch": 0.0}


def drawn_crop(seed: int) -> np.ndarray:
    """Return a crop [240, 240, 3] around the face of a drawn person."""
    rng = np.random.default_rng(seed)
    pixels_HW3, [landmarks_52] = take_photo([(Person.random(rng), Moment.random(rng))], 640, 640, rng)
    (x, y), side = landmarks_52[2], 4 * np.linalg.norm(landmarks_52[1] - landmarks_52[0])
    crop = cv2.getRectSubPix(pixels_HW3, (round(side), round(side)), (float(x), float(y)))
    return cv2.resize(crop, (240, 240), interpolation=cv2.INTER_AREA)


def projected(yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """Return the landmarks [5, 2] of the average face, turned and seen from far away."""
    y, p, r = np.radians([yaw, pitch, roll])
    turn = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    bow = np.array([[1, 0, 0], [0, np.cos(p), np.sin(p)], [0, -np.sin(p), np.cos(p)]])
    tilt = np.array([[np.cos(r), -np.sin(r)], [np.sin(r), np.cos(r)]])
    seen_52 = (quality._FACE_53 @ (turn @ bow).T)[:, :2] @ tilt.T
    return np.asarray(seen_52 * scale + [320, 200])


@given(st.floats(-60, 60), st.floats(-90, 90), st.floats(0.2, 20))
def test_yaw_and_roll_are_those_of_the_head(yaw: float, roll: float, scale: float) -> None:
    found = quality.pose_deg(projected(yaw=yaw, roll=roll, scale=scale))
    assert found == pytest.approx((yaw, 0, roll), abs=1e-4)


@given(st.floats(-40, 40), st.floats(0.2, 20))
def test_pitch_is_that_of_the_head(pitch: float, scale: float) -> None:
    assert quality.pose_deg(projected(pitch=pitch, scale=scale)) == pytest.approx((0, pitch, 0), abs=1e-4)


def test_pose_grows_with_the_angle_when_several_angles_meet() -> None:
    yaws = [quality.pose_deg(projected(yaw=yaw, pitch=15, roll=20))[0] for yaw in range(-50, 51, 5)]
    pitches = [quality.pose_deg(projected(yaw=20, pitch=pitch, roll=-10))[1] for pitch in range(-30, 31, 5)]
    assert yaws == sorted(yaws)
    assert pitches == sorted(pitches)


def test_sharpness_ranks_blurred_faces_as_the_laplacian_of_the_whole_crop_does() -> None:
    ours, theirs = [], []
    for seed in range(8):
        luma = cv2.cvtColor(drawn_crop(seed), cv2.COLOR_RGB2GRAY)
        for sigma in (0.5, 1, 1.5, 2, 3, 5, 8):
            blurred = cv2.GaussianBlur(luma, (0, 0), sigma)
            ours.append(quality.luma_measures(blurred)["sharpness"])
            theirs.append(cv2.Laplacian(blurred, cv2.CV_64F).var())
    assert spearmanr(ours, theirs).statistic >= 0.8


def test_brightness_and_contrast_are_of_the_face() -> None:
    crop = np.full((240, 240), 90, np.uint8)
    crop[:48], crop[-48:] = 255, 255  # what lies around the face
    measures = quality.luma_measures(crop)
    assert measures == {"sharpness": 0, "brightness": 90, "contrast": 0}


@pytest.mark.parametrize(
    ("name", "value", "score"),
    [
        ("eye_distance", 10, 0.25),
        ("contrast", 5, 0.2),
        ("brightness", 30, 0.5),
        ("yaw", 60, 0.5),
        ("sharpness", 50, 0.5),
    ],
)
def test_a_face_is_as_good_as_its_worst_measure(name: str, value: float, score: float) -> None:
    assert quality.quality_score(GOOD, 1.0) == 1
    assert quality.quality_score({**GOOD, name: value}, 1.0) == pytest.approx(score)
    assert quality.quality_score(GOOD, 0.9) == pytest.approx(0.8)


def test_rows_of_the_table_have_the_measures_where_they_have_a_face() -> None:
    landmarks = projected(yaw=10).reshape(10).astype(np.float32)
    crop = to_jpeg(np.ascontiguousarray(drawn_crop(0)[:, :, ::-1]), 95)
    face = {"photo": "a.jpg", "status": "aligned", "score": 1.0, "landmarks": landmarks, "crop": crop}
    none = {"photo": "b.jpg", "status": "no_face"}
    damaged = {**face, "photo": "c.jpg", "crop": b"no picture"}
    rows = table.faces_table([face, none, damaged], "{}").to_pylist()
    assert rows[0]["yaw"] == pytest.approx(10, abs=1e-3)
    assert 0 < rows[0]["quality"] <= 1
    assert rows[0]["eye_distance"] == pytest.approx(63 * np.cos(np.radians(10)), abs=1e-3)
    assert all(rows[1][column.name] is None and rows[2][column.name] is None for column in quality.COLUMNS)
