from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest

from lib.faces import table
from lib.faces.detection import Detections
from lib.faces.extraction import ExtractionSettings, FaceExtractor
from lib.faces.images import Photo
from tests.faces.scripted_faces import Scripted, blank, faces


class Dots:
    """Finds the dots of `dotted`, every right eye `lean` times the eyes' distance too low; notes what it was shown."""

    def __init__(self, lean: float) -> None:
        self.lean = lean
        self.seen: list[np.ndarray] = []

    def __call__(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        self.seen.extend(pictures)
        return [self.find(picture) for picture in pictures]

    def find(self, picture: np.ndarray) -> Detections:
        dots = []
        for channel in range(3):  # eyes, nose, mouth
            _, _, _, centres = cv2.connectedComponentsWithStats((picture[..., channel] > 128).astype(np.uint8))
            dots.extend(sorted(centres[1:].tolist()))
        landmarks = np.array(dots).reshape(1, 5, 2)
        landmarks[0, 1, 1] += self.lean * np.linalg.norm(landmarks[0, 1] - landmarks[0, 0])
        middle, side = landmarks[0].mean(axis=0), 2.5 * np.linalg.norm(landmarks[0, 1] - landmarks[0, 0])
        box = np.concatenate([middle - side / 2, middle + side / 2])
        return Detections(box[None], np.array([0.99], np.float32), landmarks)


def dotted(*, roll_deg: float) -> tuple[Photo, np.ndarray]:
    """Return a photo of 400x300 with five dots for a face, and where they are."""
    upright = np.array([[-40, -20], [40, -20], [8, 10], [-30, 50], [30, 50]], float)
    cos, sin = np.cos(np.radians(roll_deg)), np.sin(np.radians(roll_deg))
    points = upright @ np.array([[cos, sin], [-sin, cos]]) + [210, 150]
    pixels = np.zeros((300, 400, 3), np.uint8)
    for point, channel in zip(points, (0, 0, 1, 2, 2), strict=True):
        colour = [255 * (channel == i) for i in range(3)]
        cv2.circle(pixels, np.round(point * 16).astype(int).tolist(), 5 * 16, colour, -1, cv2.LINE_AA, shift=4)
    return Photo(cv2.imencode(".png", pixels)[1].tobytes(), max_pixels=10**6), points


def roll_of(points_52: np.ndarray) -> float:
    across = points_52[1] - points_52[0]
    return float(np.degrees(np.arctan2(across[1], across[0])))


def looked_at(detect: Any, photo: Photo) -> dict[str, Any]:
    extractor = FaceExtractor(ExtractionSettings(), detect)
    return extractor.face_row(photo, extractor.find(photo), 0)


@pytest.mark.parametrize("roll_deg", [8, 20, -35])
def test_a_second_look_sees_the_face_levelled_and_mirrored(roll_deg: float) -> None:
    detect = Dots(lean=0.0)
    photo, points = dotted(roll_deg=roll_deg)
    row = looked_at(detect, photo)
    assert np.abs(row["landmarks"].reshape(5, 2) - points).max() < 0.3
    _, mirrored = detect.seen
    left, right, nose, mouth_left, mouth_right = detect.find(mirrored).landmarks_N52[0]
    assert abs(left[1] - right[1]) < 1
    assert abs((left[0] + right[0]) / 2 - 79.5) < 1
    # The nose of `dotted` lies to the right of its middle.
    assert nose[0] < (mouth_left[0] + mouth_right[0]) / 2 - 1


@pytest.mark.parametrize("roll_deg", [8, 20, -35])
def test_a_detector_that_leans_to_one_side_is_set_right_by_the_second_look(roll_deg: float) -> None:
    photo, points = dotted(roll_deg=roll_deg)
    detect = Dots(lean=0.05)
    once, refined = detect.find(photo.pixels()).landmarks_N52[0], looked_at(detect, photo)["landmarks"].reshape(5, 2)
    wrong_deg = [abs(roll_of(found) - roll_of(points)) for found in (once, refined)]
    assert wrong_deg[0] > 2
    assert wrong_deg[1] < 0.15 * wrong_deg[0]


def test_a_level_face_is_looked_at_once() -> None:
    for roll_deg, num_looks in ((4, 1), (-4, 1), (6, 2), (-6, 2)):
        detect = Dots(lean=0.0)
        looked_at(detect, dotted(roll_deg=roll_deg)[0])
        assert len(detect.seen) == num_looks


@pytest.mark.parametrize("again", [faces(), faces((0.99, (0, 0, 60, 60)))])
def test_landmarks_stay_where_the_second_look_sees_no_face_or_another(again: Detections) -> None:
    first = faces((0.99, (100, 50, 250, 250)))
    first.landmarks_N52[0] += 0.16 * (first.landmarks_N52[0] - [175, 150])[:, ::-1] * [-1, 1]  # by 9 degrees
    detect = Scripted(first, again)
    (row,) = FaceExtractor(ExtractionSettings(), detect).rows(blank(400, 300))
    assert detect.sizes == [(400, 300), (160, 160)]
    assert np.abs(row["landmarks"].reshape(5, 2) - first.landmarks_N52[0]).max() < 1e-3
    assert row["status"] == table.ALIGNED
