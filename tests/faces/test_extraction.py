import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from retinaface.weights import WEIGHTS

from lib.errors import UserError
from lib.faces import table
from lib.faces.alignment import Alignment, align, alignment_matrix
from lib.faces.detection import Detections
from lib.faces.extraction import (
    ExtractionSettings,
    FaceExtractor,
    fingerprint,
    fingerprint_differences,
)
from lib.faces.images import Photo
from lib.faces.search import most_prominent
from lib.faces.table import faces_table
from lib.sample.sample_job import SamplePlan, draw_photo

PLAN = SamplePlan(identities=50, photos_per_identity=3, seed=1)


@lru_cache
def extractor(policy: str = "prominent") -> FaceExtractor:
    return FaceExtractor(ExtractionSettings(policy=policy))


def first_of(kind: str) -> tuple[bytes, list[dict[str, Any]]]:
    return draw_photo(PLAN, next(photo for photo in range(len(PLAN)) if PLAN.special(photo)[0] == kind))


def faces(*found: tuple[float, tuple[float, float, float, float]]) -> Detections:
    """Return detections of given scores and boxes, eyes and all in the usual places."""
    boxes = np.array([box for _, box in found], np.float32).reshape(-1, 4)
    shares = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.75], [0.65, 0.75]])
    landmarks = boxes[:, None, :2] + shares * (boxes[:, None, 2:] - boxes[:, None, :2])
    return Detections(boxes, np.array([score for score, _ in found], np.float32), landmarks)


class Scripted:
    """A detect function that answers what it is told and remembers which sizes it saw."""

    def __init__(self, *answers: Detections) -> None:
        self.answers = list(answers)
        self.sizes: list[tuple[int, int]] = []

    def __call__(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        (picture,) = pictures
        self.sizes.append((picture.shape[1], picture.shape[0]))
        return [self.answers[min(len(self.sizes), len(self.answers)) - 1]]


def blank(width: int, height: int) -> bytes:
    return cv2.imencode(".jpg", np.full((height, width, 3), 80, np.uint8))[1].tobytes()


def rows_for(found: Detections, *, size: tuple[int, int] = (400, 300), **settings: Any) -> list[dict[str, Any]]:
    return FaceExtractor(ExtractionSettings(**settings), Scripted(found)).rows(blank(*size))


def statuses(rows: list[dict[str, Any]]) -> list[str]:
    return [row["status"] for row in rows]


# Alignment against the truth


def test_drawn_faces_are_aligned_to_where_their_eyes_were_drawn() -> None:
    rolls_deg, offsets = [], []
    for photo in range(len(PLAN)):
        data, truth = draw_photo(PLAN, photo)
        (row,) = extractor().rows(data)
        if truth[0]["kind"] != "one":
            continue
        assert row["status"] == table.ALIGNED
        eyes = np.reshape(truth[0]["landmarks"], (5, 2))[:2]
        matrix = alignment_matrix(row["box"], row["landmarks"].reshape(5, 2), Alignment())
        left, right = np.column_stack([eyes, np.ones(2)]) @ matrix.T
        rolls_deg.append(abs(np.degrees(np.arctan2(*(right - left)[::-1]))))
        offsets.append(np.linalg.norm((left + right) / 2 - [119.5, 95.5]) / 240)
    assert len(rolls_deg) > 130
    assert np.median(rolls_deg) < 1
    assert np.median(offsets) < 0.02
    assert np.percentile(offsets, 95) < 0.06


def test_the_crop_is_the_aligned_photo_as_jpeg() -> None:
    data, _ = first_of("one")
    (row,) = extractor().rows(data)
    crop = cv2.imdecode(np.frombuffer(row["crop"], np.uint8), cv2.IMREAD_COLOR)
    wanted = align(Photo(data, max_pixels=10**8), row["box"], row["landmarks"].reshape(5, 2), Alignment())
    assert crop.shape == (240, 240, 3)
    assert np.abs(crop.astype(int) - wanted).mean() < 2
    assert row["crop"].startswith(b"\xff\xd8")


def test_a_large_photo_gives_the_face_of_the_small_one_in_its_own_pixels() -> None:
    data, _ = first_of("one")
    small = Photo(data, max_pixels=10**8).pixels()
    large = cv2.resize(small, None, fx=5, fy=5, interpolation=cv2.INTER_CUBIC)
    (row,) = extractor().rows(cv2.imencode(".png", small)[1].tobytes())
    (large_row,) = extractor().rows(cv2.imencode(".jpg", large)[1].tobytes())
    eyes = np.linalg.norm(row["landmarks"][:2] - row["landmarks"][2:4])
    assert np.abs((large_row["landmarks"] + 0.5) / 5 - 0.5 - row["landmarks"]).max() < 0.06 * eyes
    assert large_row["status"] == table.ALIGNED


# Statuses


def test_a_photo_with_a_face_is_aligned() -> None:
    (row,) = extractor().rows(first_of("one")[0])
    assert row["status"] == table.ALIGNED
    assert row["num_faces"] == 1
    assert 0.9 < row["score"] <= 1
    assert faces_table([row | {"photo": "a.jpg", "identity": None}], "{}").num_rows == 1


def test_a_photo_without_a_face_has_none() -> None:
    assert extractor().rows(first_of("none")[0]) == [{"status": table.NO_FACE, "num_faces": 0}]


def test_broken_files_are_corrupt_rows() -> None:
    broken = [photo for photo in range(len(PLAN)) if PLAN.special(photo)[0] == "broken"]
    assert {PLAN.special(photo)[1] for photo in broken} == {"truncated", "text", "nothing"}
    for photo in broken:
        (row,) = extractor().rows(draw_photo(PLAN, photo)[0])
        assert (row["status"], row.keys()) == (table.CORRUPT, {"status", "reason"})
        assert row["reason"]


def test_a_photo_over_the_limit_is_too_large() -> None:
    settings = ExtractionSettings(max_megapixels=0.1)
    detect = Scripted(faces())
    assert FaceExtractor(settings, detect).rows(blank(400, 300)) == [
        {"status": table.TOO_LARGE, "reason": "400x300 is over 100000 pixels"}
    ]
    assert detect.sizes == []


def test_a_doubtful_face_keeps_its_place_and_gets_no_crop() -> None:
    (row,) = rows_for(faces((0.89, (100, 50, 250, 250))))
    assert row["status"] == table.LOW_SCORE
    assert row["num_faces"] == 0
    assert row["box"].tolist() == [100, 50, 250, 250]
    assert "crop" not in row


@pytest.mark.parametrize(("side", "status"), [(19.5, table.TOO_SMALL), (20.5, table.ALIGNED)])
def test_the_long_side_of_the_box_decides_what_is_too_small(side: float, status: str) -> None:
    (row,) = rows_for(faces((0.95, (100, 50, 105, 50 + side))))
    assert row["status"] == status
    assert ("crop" in row) == (status == table.ALIGNED)
    assert row["num_faces"] == 1


@pytest.mark.parametrize("size", [(1, 1), (19, 400), (400, 19)])
def test_a_photo_smaller_than_the_smallest_face_is_too_small(size: tuple[int, int]) -> None:
    assert rows_for(faces(), size=size) == [{"status": table.TOO_SMALL, "num_faces": 0}]


def test_min_face_is_measured_in_the_photo_and_not_where_it_was_detected() -> None:
    # At 640 the face is 10 pixels long, in the photo 50.
    assert statuses(rows_for(faces((0.95, (100, 100, 108, 110))), size=(3200, 2400))) == [table.ALIGNED]


# The second look


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


# Which face


def test_of_two_drawn_faces_the_prominent_policy_takes_one_and_all_takes_both() -> None:
    data, truth = first_of("two")
    (row,) = extractor().rows(data)
    both = extractor("all").rows(data)
    assert row["num_faces"] == 2
    assert statuses(both) == [table.ALIGNED, table.ALIGNED]
    assert [face["num_faces"] for face in both] == [2, 2]
    meant = np.reshape(truth[0]["landmarks"], (5, 2))
    eyes = np.linalg.norm(meant[1] - meant[0])
    errors = [np.linalg.norm(face["landmarks"].reshape(5, 2) - meant, axis=1).mean() for face in both]
    assert min(errors) < 0.2 * eyes < max(errors)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        # The larger of two at the same distance from the middle.
        ([(0.99, (50, 100, 100, 150)), (0.95, (280, 80, 370, 170))], 1),
        # The one in the middle of two of a size.
        ([(0.99, (0, 0, 100, 100)), (0.95, (150, 100, 250, 200))], 1),
        # A large one at the edge goes before a small one in the middle.
        ([(0.99, (190, 140, 210, 160)), (0.95, (0, 0, 150, 150))], 1),
        # Of two alike, the one of higher score.
        ([(0.99, (50, 100, 150, 200)), (0.91, (250, 100, 350, 200))], 0),
        # None that is doubtful before one that is sure, large as it may be.
        ([(0.95, (0, 0, 22, 22)), (0.89, (100, 50, 300, 250))], 0),
        # Of doubtful ones, the prominent.
        ([(0.8, (0, 0, 22, 22)), (0.7, (100, 50, 300, 250))], 1),
    ],
)
def test_the_face_a_photo_is_of(found: list[tuple[float, tuple[float, float, float, float]]], wanted: int) -> None:
    assert most_prominent(faces(*found), 400, 300, 0.9) == wanted
    (row,) = rows_for(faces(*found))
    assert row["box"].tolist() == list(found[wanted][1])


def test_all_keeps_every_sure_face_with_a_status_of_its_own() -> None:
    found = faces(
        (0.99, (10, 10, 90, 90)), (0.98, (200, 10, 212, 22)), (0.97, (300, 100, 390, 190)), (0.5, (0, 200, 50, 250))
    )
    rows = rows_for(found, policy="all")
    assert statuses(rows) == [table.ALIGNED, table.TOO_SMALL, table.ALIGNED]
    assert [row["num_faces"] for row in rows] == [3, 3, 3]


def test_all_leaves_one_row_where_no_face_is_sure() -> None:
    assert statuses(rows_for(faces((0.5, (0, 0, 60, 60)), (0.4, (100, 100, 160, 160))), policy="all")) == [
        table.LOW_SCORE
    ]
    assert statuses(rows_for(faces(), policy="all")) == [table.NO_FACE]


# Turned photos


def portraits(num: int) -> list[np.ndarray]:
    """Return the pixels of drawn photos of one person each."""
    ones = [photo for photo in range(len(PLAN)) if PLAN.special(photo)[0] == "one"][:num]
    return [Photo(draw_photo(PLAN, photo)[0], max_pixels=10**8).pixels() for photo in ones]


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_a_photo_that_lies_or_stands_on_its_head_gives_the_crop_of_the_upright_one(quarter_turns: int) -> None:
    for pixels in portraits(12):
        turned = cv2.imencode(".png", np.rot90(pixels, quarter_turns))[1].tobytes()
        (wanted,) = extractor().rows(cv2.imencode(".png", pixels)[1].tobytes())
        (row,) = extractor().rows(turned)
        assert row["status"] == wanted["status"] == table.ALIGNED
        ours, theirs = (cv2.imdecode(np.frombuffer(each["crop"], np.uint8), 1) for each in (row, wanted))
        assert cv2.absdiff(ours, theirs).mean() < 8
        # The left eye is the one on the left when the face is upright: turned with the photo, it is the same eye.
        found = Detections(row["box"][None], np.ones(1), row["landmarks"].reshape(1, 5, 2))
        height, width = pixels.shape[:2]
        back = found.turned_back(quarter_turns, width, height)
        eyes = np.linalg.norm(wanted["landmarks"][:2] - wanted["landmarks"][2:4])
        assert np.abs(back.landmarks_N52[0] - wanted["landmarks"].reshape(5, 2)).max() < 0.1 * eyes
        assert np.abs(back.boxes_N4[0] - wanted["box"]).max() < 0.1 * eyes


def upside_down(found: Detections) -> Detections:
    """Return faces whose eyes lie below the mouth, the left one still on the left."""
    middle_y = (found.boxes_N4[:, 1] + found.boxes_N4[:, 3])[:, None] / 2
    landmarks_N52 = found.landmarks_N52.copy()
    landmarks_N52[..., 1] = 2 * middle_y - landmarks_N52[..., 1]
    return Detections(found.boxes_N4, found.scores_N, landmarks_N52)


BOX = (100.0, 50.0, 250.0, 250.0)
SURE = faces((0.999, BOX))


def rolled(roll_deg: float) -> Detections:
    cos, sin = np.cos(np.radians(roll_deg)), np.sin(np.radians(roll_deg))
    middle = np.array([175, 150])
    turned = (SURE.landmarks_N52 - middle) @ np.array([[cos, sin], [-sin, cos]]) + middle
    return Detections(SURE.boxes_N4, SURE.scores_N, turned)


ROUND = [(400, 300), (300, 400), (400, 300), (300, 400)]


@pytest.mark.parametrize(
    ("first", "is_trusted"),
    [
        (SURE, True),
        (faces((0.985, BOX)), True),
        (faces((0.98, BOX)), False),
        (rolled(39), True),
        (rolled(-39), True),
        (rolled(41), False),
        (rolled(180), False),
        (upside_down(SURE), False),
        (faces(), False),
        # The face the photo is of decides, not one in the background.
        (faces((0.999, BOX), (0.91, (0, 0, 30, 30))), True),
        (faces((0.999, (0, 0, 30, 30)), (0.91, BOX)), False),
    ],
)
def test_a_photo_is_turned_where_its_face_cannot_be_trusted_to_be_upright(first: Detections, is_trusted: bool) -> None:
    detect = Scripted(first, faces())
    FaceExtractor(ExtractionSettings(), detect).find(Photo(blank(400, 300), max_pixels=10**6))
    searched = [(320, 240)] if not len(first) else []
    assert detect.sizes == ([(400, 300)] if is_trusted else [ROUND[0], *searched, *ROUND[1:]])


def test_of_all_looks_the_one_with_the_surest_plausible_face_counts() -> None:
    looks = [upside_down(SURE), faces((0.93, BOX)), faces((0.998, (50, 50, 130, 150))), upside_down(SURE)]
    detect = Scripted(*looks)
    (row,) = FaceExtractor(ExtractionSettings(), detect).rows(blank(400, 300))
    assert detect.sizes[:4] == ROUND
    assert row["status"] == table.ALIGNED
    assert row["score"] == pytest.approx(0.998)
    assert row["box"].tolist() == [269, 149, 349, 249]
    left, right = row["landmarks"].reshape(5, 2)[:2]
    assert left[0] > right[0]  # it stands on its head in the photo


@pytest.mark.parametrize(("score", "status"), [(0.99, table.ALIGNED), (0.95, table.NO_FACE)])
def test_where_no_face_was_found_a_turned_look_must_be_one_to_trust(score: float, status: str) -> None:
    nothing = [faces()] * 2  # at either size
    detect = Scripted(*nothing, faces(), faces((score, BOX)), faces())
    (row,) = FaceExtractor(ExtractionSettings(), detect).rows(blank(400, 300))
    assert row["status"] == status


def test_a_face_that_is_plausible_at_no_look_is_a_status_that_says_why() -> None:
    (row,) = FaceExtractor(ExtractionSettings(), Scripted(upside_down(SURE))).rows(blank(400, 300))
    assert (row["status"], row["reason"]) == (table.IMPLAUSIBLE, "the mouth was found above the eyes")
    assert row["box"].tolist() == list(BOX)
    assert row["num_faces"] == 1
    assert "crop" not in row
    assert faces_table([row | {"photo": "a.jpg", "identity": None}], "{}").num_rows == 1


def test_a_plausible_face_goes_before_a_larger_one_that_is_not() -> None:
    doubtful = upside_down(faces((0.999, (20, 20, 40, 40)), (0.999, BOX)))
    both = Detections(doubtful.boxes_N4, doubtful.scores_N, doubtful.landmarks_N52.copy())
    both.landmarks_N52[0] = faces((0.999, (20, 20, 40, 40))).landmarks_N52[0]
    detect = Scripted(both, faces())
    (row,) = FaceExtractor(ExtractionSettings(), detect).rows(blank(400, 300))
    assert detect.sizes == ROUND
    assert row["box"].tolist() == [20, 20, 40, 40]
    rows = FaceExtractor(ExtractionSettings(policy="all"), Scripted(both, faces())).rows(blank(400, 300))
    assert statuses(rows) == [table.ALIGNED, table.IMPLAUSIBLE]


# Detection size


def test_photos_are_searched_at_the_detection_size_and_small_ones_as_they_are() -> None:
    sure = faces((0.99, (20, 20, 80, 80)))
    for size, wanted in [
        ((5616, 3744), (640, 427)),
        ((641, 100), (640, 100)),
        ((640, 480), (640, 480)),
        ((99, 133), (99, 133)),
    ]:
        detect = Scripted(sure)
        FaceExtractor(ExtractionSettings(), detect).rows(blank(*size))
        assert detect.sizes == [wanted]


def test_a_photo_without_a_sure_face_is_searched_again_smaller_and_larger() -> None:
    detect = Scripted(faces(), faces((0.5, (20, 20, 80, 80))), faces((0.99, (100, 100, 200, 200))))
    (row,) = FaceExtractor(ExtractionSettings(), detect).rows(blank(2560, 1280))
    assert detect.sizes == [(640, 320), (320, 160), (1280, 640)]
    assert row["status"] == table.ALIGNED
    assert row["box"].tolist() == [200.5, 200.5, 400.5, 400.5]


def test_the_search_ends_with_the_first_sure_face() -> None:
    detect = Scripted(faces(), faces((0.99, (20, 20, 80, 80))))
    FaceExtractor(ExtractionSettings(), detect).rows(blank(2560, 1280))
    assert detect.sizes == [(640, 320), (320, 160)]


# Settings and fingerprint

CHANGES: dict[str, Any] = {
    "detector_weights": "other",
    "detector": "batch-face",
    "detection_size": 800,
    "min_score": 0.8,
    "min_face": 30,
    "policy": "all",
    "alignment": [
        Alignment(image_size=112),
        Alignment(eye_height=0.5),
        Alignment(margin=0.2),
        Alignment(template="arcface-112"),
    ],
}


def test_the_fingerprint_follows_every_setting_that_decides_a_crop(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"other weights")
    ids = {fingerprint(ExtractionSettings())["id"]}
    num_changes = 0
    for field in dataclasses.fields(ExtractionSettings):
        if field.name == "max_megapixels":  # decides whether there is a crop, not what it holds
            continue
        change = CHANGES[field.name]
        for value in change if isinstance(change, list) else [change]:
            values = {field.name: value}
            if field.name in ("detector", "detector_weights"):
                values["detector_weights"] = str(tmp_path / "other")
            ids.add(fingerprint(ExtractionSettings(**values))["id"])
            num_changes += 1
    assert len(ids) == num_changes + 1
    assert len(dataclasses.fields(Alignment)) == len(CHANGES["alignment"])


def test_the_fingerprint_does_not_follow_where_the_weights_lie(tmp_path: Path) -> None:
    path = tmp_path / "copied poids.onnx"
    path.write_bytes(bytes(WEIGHTS))
    assert fingerprint(ExtractionSettings(detector_weights=str(path))) == fingerprint(ExtractionSettings())
    assert fingerprint(ExtractionSettings(max_megapixels=5)) == fingerprint(ExtractionSettings())


def test_fingerprints_tell_in_what_they_differ() -> None:
    ours = fingerprint(ExtractionSettings())
    theirs = fingerprint(ExtractionSettings(alignment=Alignment(image_size=112)))
    assert fingerprint_differences(ours, ours) == []
    assert fingerprint_differences(ours, theirs) == ["image_size: 240 here, 112 there"]
    assert fingerprint_differences(ours, {}) != []


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"detector": "yolo"}, "--detector is 'yolo': allowed are retinaface, batch-face"),
        ({"detection_size": 63}, "--detection-size"),
        ({"min_score": 0.0}, "--min-score"),
        ({"min_score": 1.0}, "--min-score"),
        ({"min_face": 0}, "--min-face"),
        ({"policy": "largest"}, "--faces-policy"),
        ({"max_megapixels": 0}, "--max-megapixels"),
        ({"max_megapixels": 179}, "--max-megapixels"),
    ],
)
def test_settings_out_of_range_are_named(values: dict[str, Any], flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        ExtractionSettings(**values)
