import dataclasses
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from retinaface.weights import WEIGHTS

from lib.errors import UserError
from lib.faces import table
from lib.faces.alignment import Alignment, align, alignment_matrix
from lib.faces.extraction import ExtractionSettings, FaceExtractor, fingerprint, fingerprint_differences
from lib.faces.images import Photo
from lib.faces.search import most_prominent
from lib.faces.table import faces_table
from lib.sample.sample_job import draw_photo
from tests.faces.scripted_faces import PLAN, Scripted, blank, extractor, faces, rows_for, statuses


def first_of(kind: str) -> tuple[bytes, list[dict[str, Any]]]:
    return draw_photo(PLAN, next(photo for photo in range(len(PLAN)) if PLAN.special(photo)[0] == kind))


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
