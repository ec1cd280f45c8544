"""Faces are taken by ranges of the columns of quality."""

import math

import pyarrow as pa
import pytest

from lib.errors import UserError
from lib.faces.face_filter import EVERY_FACE, face_filter


def test_faces_within_all_ranges_are_taken_and_their_ends_are_inside() -> None:
    rows = pa.table(
        {
            "quality": pa.array([0.25, 0.5, 1.0, None, 0.75], pa.float32()),
            "yaw": pa.array([0.0, -30.0, 30.5, 0.0, 30.0], pa.float32()),
        }
    )
    assert face_filter(0.5, "yaw=-30:30").keeps(rows).to_pylist() == [False, True, False, False, True]
    assert face_filter(0, "quality=:0.5").keeps(rows).to_pylist() == [True, True, False, False, False]
    assert EVERY_FACE.keeps(rows).to_pylist() == [True] * 5


def test_flags_become_ranges() -> None:
    assert not face_filter(0, "")
    assert face_filter(0, " ,") == EVERY_FACE
    taken = face_filter(0.3, " yaw=-30:30 , sharpness=50:,quality=0.1:0.9")
    assert taken.ranges == {"yaw": (-30, 30), "sharpness": (50, math.inf), "quality": (0.3, 0.9)}
    assert str(taken) == "quality=0.3:0.9,sharpness=50:,yaw=-30:30"
    assert face_filter(0, str(taken)) == taken


@pytest.mark.parametrize(
    ("min_quality", "where", "message"),
    [
        (1.5, "", "--min-quality is 1.5"),
        (math.nan, "", "--min-quality is nan"),
        (0, "jaw=1:2", "no such column; there are eye_distance"),
        (0, "yaw", "is no range"),
        (0, "yaw=3", "is no range"),
        (0, "yaw=5:1", "is no range"),
        (0, "yaw=a:1", "is no range"),
        (0, "yaw=nan:1", "is no range"),
        (0, "yaw=1:,yaw=:2", "names yaw twice"),
    ],
)
def test_other_flags_are_refused(min_quality: float, where: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        face_filter(min_quality, where)


def test_a_table_without_the_columns_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"faces/part has no column quality.*jobs/preprocess.py") as caught:
        face_filter(0.5, "").check(pa.schema([("photo", pa.string())]), "faces/part")
    assert "\n" not in str(caught.value)
