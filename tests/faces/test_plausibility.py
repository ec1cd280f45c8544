"""Landmarks that can be those of a face, and those that a detector makes up where a face is turned."""

import numpy as np
import pytest

from lib.faces.plausibility import are_plausible, fault, in_own_frame, roll_deg

BOX_4 = np.array([100.0, 50.0, 180.0, 150.0])
FACE_52 = np.array([[120, 90], [160, 90], [141, 110], [125, 125], [155, 125]], float)
ANGLES_DEG = [-170, -90, -30, 0, 7, 45, 90, 135, 180]


def turned(points: np.ndarray, angle_deg: float) -> np.ndarray:
    """Return points turned clockwise about the middle of `BOX_4`."""
    cos, sin = np.cos(np.radians(angle_deg)), np.sin(np.radians(angle_deg))
    return (points - [140, 100]) @ np.array([[cos, sin], [-sin, cos]]) + [140, 100]


def with_points(**moved: tuple[float, float]) -> np.ndarray:
    """Return `FACE_52` with some of its landmarks moved by so many pixels."""
    face_52 = FACE_52.copy()
    for name, by in moved.items():
        face_52[["eye_left", "eye_right", "nose", "mouth_left", "mouth_right"].index(name)] += by
    return face_52


@pytest.mark.parametrize("angle_deg", ANGLES_DEG)
def test_the_roll_is_the_angle_by_which_a_face_is_turned(angle_deg: float) -> None:
    difference = roll_deg(turned(FACE_52, angle_deg)) - angle_deg
    assert abs((difference + 180) % 360 - 180) < 1e-6


@pytest.mark.parametrize("angle_deg", ANGLES_DEG)
@pytest.mark.parametrize("scale", [0.1, 1, 37])
def test_in_its_own_frame_a_face_is_upright_and_of_one_size(angle_deg: float, scale: float) -> None:
    points = in_own_frame(BOX_4 * scale, turned(FACE_52, angle_deg) * scale)
    wanted = [(-0.2, 0), (0.2, 0), (0.01, 0.2), (-0.15, 0.35), (0.15, 0.35)]
    np.testing.assert_allclose(points, wanted, atol=1e-9)


@pytest.mark.parametrize("angle_deg", ANGLES_DEG)
def test_a_face_is_plausible_however_it_is_turned_and_its_mirror_image_is_not(angle_deg: float) -> None:
    assert fault(BOX_4, turned(FACE_52, angle_deg)) is None
    upside_down_52 = FACE_52 * [1, -1] + [0, 200]  # the eyes below, and the left one still on the left
    assert fault(BOX_4, turned(upside_down_52, angle_deg)) == "the mouth was found above the eyes"


@pytest.mark.parametrize(
    ("face_52", "reason"),
    [
        (with_points(mouth_left=(0, -70), mouth_right=(0, -70)), "the mouth was found above the eyes"),
        (with_points(mouth_left=(0, -12), mouth_right=(0, -12)), "eyes and mouth were found too near to each other"),
        (with_points(mouth_left=(0, 15), mouth_right=(0, 15)), "eyes and mouth were found too far from each other"),
        (with_points(nose=(0, -20)), "the nose was not found between eyes and mouth"),
        (with_points(nose=(0, 15)), "the nose was not found between eyes and mouth"),
        (
            with_points(mouth_left=(30, 0), mouth_right=(-30, 0)),
            "the corners of the mouth were found in the wrong order",
        ),
        (with_points(mouth_left=(0, -3), mouth_right=(0, 3)), "eyes and mouth were not found parallel"),
    ],
)
def test_what_is_wrong_with_a_face_is_said(face_52: np.ndarray, reason: str) -> None:
    for angle_deg in ANGLES_DEG:
        assert fault(BOX_4, turned(face_52, angle_deg)) == reason


def test_a_face_seen_from_the_side_is_plausible() -> None:
    profile_52 = with_points(eye_left=(28, 0), nose=(25, 0), mouth_left=(24, 0), mouth_right=(-2, 0))
    assert fault(BOX_4, profile_52) is None


def test_landmarks_at_one_place_are_no_face_and_no_error() -> None:
    assert fault(np.zeros(4), np.zeros((5, 2))) == "the mouth was found above the eyes"


def test_many_faces_are_judged_each_by_itself() -> None:
    faces = np.stack([FACE_52, with_points(nose=(0, 15)), turned(FACE_52, 90)])
    assert are_plausible(np.stack([BOX_4] * 3), faces).tolist() == [True, False, True]
    assert are_plausible(np.zeros((0, 4)), np.zeros((0, 5, 2))).tolist() == []
