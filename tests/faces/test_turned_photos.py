import cv2
import numpy as np
import pytest

from lib.faces import table
from lib.faces.detection import Detections
from lib.faces.extraction import ExtractionSettings, FaceExtractor
from lib.faces.images import Photo
from lib.faces.table import faces_table
from lib.sample.sample_job import draw_photo
from tests.faces.scripted_faces import PLAN, Scripted, blank, extractor, faces, statuses


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
