import numpy as np
import pytest

from lib.faces.detection import SCORE_FLOOR, Detections, RetinaFace
from lib.faces.detector_runtimes import Network, Outputs
from lib.faces.images import Photo
from lib.sample.sample_job import SamplePlan, draw_photo
from tests.faces.detector_pictures import SURE, float32_network, packaged, pictures


def restless_network(pictures_BHW3: np.ndarray) -> Outputs:
    """Return outputs that see many faces, overlapping in every degree."""
    rng = np.random.default_rng(0)
    num_anchors = sum(2 * (pictures_BHW3[0, ::stride, ::stride].size // 3) for stride in (8, 16, 32))
    scores = rng.uniform(size=(1, num_anchors, 1)) ** 2
    shapes = rng.normal(size=(1, num_anchors, 4)), rng.normal(size=(1, num_anchors, 10))
    return (
        shapes[0].astype(np.float32),
        np.dstack([1 - scores, scores]).astype(np.float32),
        shapes[1].astype(np.float32),
    )


def overlap(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def faces_one_by_one(
    picture: np.ndarray, network: Network, *, voting: bool
) -> list[tuple[float, list[float], list[float]]]:
    """Return (score, box, landmarks) of a picture from a network's outputs, anchor by anchor in plain Python."""
    longest = max(picture.shape)
    height, width = (
        -(-side // step) * step
        for side in picture.shape[:2]
        for step in [32 if longest <= 160 else 128 if side == longest < 640 else 64]
    )
    canvas = np.zeros((1, height, width, 3), np.uint8)
    canvas[0, : picture.shape[0], : picture.shape[1]] = picture
    offsets, probabilities, points = (output[0] for output in network(canvas))
    faces = []
    place = 0
    for stride, sizes in ((8, (16, 32)), (16, (64, 128)), (32, (256, 512))):
        for row in range(height // stride):
            for column in range(width // stride):
                for size in sizes:
                    score = float(probabilities[place, 1])
                    if score > SCORE_FLOOR:
                        x, y = (column + 0.5) * stride, (row + 0.5) * stride
                        dx, dy, dw, dh = map(float, offsets[place])
                        centre_x, centre_y = x + 0.1 * dx * size, y + 0.1 * dy * size
                        half_w, half_h = size * np.exp(0.2 * dw) / 2, size * np.exp(0.2 * dh) / 2
                        box = [centre_x - half_w, centre_y - half_h, centre_x + half_w, centre_y + half_h]
                        marks = [(x, y)[i % 2] + 0.1 * float(p) * size for i, p in enumerate(points[place])]
                        faces.append((score, box, marks))
                    place += 1
    assert place == len(offsets)
    faces.sort(key=lambda face: -face[0])
    kept: list[tuple[float, list[float], list[float]]] = []
    for face in faces:
        if all(overlap(face[1], other[1]) <= 0.4 for other in kept):
            kept.append(face)
    results = []
    for score, box, marks in kept:
        voters = [face for face in faces if overlap(face[1], box) >= 0.5] if voting else [(score, box, marks)]
        total = sum(voter[0] for voter in voters)
        voted_box = [sum(v[0] * v[1][i] for v in voters) / total - 0.5 for i in range(4)]
        voted_marks = [sum(v[0] * v[2][i] for v in voters) / total - 0.5 for i in range(10)]
        results.append((score, voted_box, voted_marks))
    return results


def assert_same_sure_faces(found: Detections, wanted: Detections, tolerance: float) -> None:
    """Compare the faces both are sure of; the tolerance is a share of the distance between the eyes."""
    num_sure = int((wanted.scores_N >= SURE).sum())
    assert int((found.scores_N >= SURE).sum()) == num_sure
    for face in range(num_sure):
        middles = found.landmarks_N52[:num_sure].mean(axis=1)
        match = int(np.argmin(np.linalg.norm(middles - wanted.landmarks_N52[face].mean(axis=0), axis=1)))
        eyes = np.linalg.norm(np.diff(wanted.landmarks_N52[face, :2], axis=0))
        assert np.abs(found.landmarks_N52[match] - wanted.landmarks_N52[face]).max() < tolerance * eyes
        assert np.abs(found.boxes_N4[match] - wanted.boxes_N4[face]).max() < 2 * tolerance * eyes


def assert_equals_one_by_one(picture: np.ndarray, network: Network) -> int:
    """Compare every face of a picture, and return how many there are."""
    (found,) = RetinaFace(network, "").detect([picture])
    wanted = faces_one_by_one(picture, network, voting=True)
    assert np.allclose(found.scores_N, [score for score, _, _ in wanted], atol=1e-6)
    assert np.allclose(found.boxes_N4, np.reshape([box for _, box, _ in wanted], (-1, 4)), atol=0.01)
    assert np.allclose(found.landmarks_N52.reshape(-1, 10), np.reshape([m for *_, m in wanted], (-1, 10)), atol=0.01)
    return len(wanted)


def test_faces_equal_those_worked_out_anchor_by_anchor() -> None:
    assert sum(assert_equals_one_by_one(picture, float32_network()) for picture in pictures()[:10]) >= 10


def test_faces_that_overlap_in_every_degree_equal_those_worked_out_anchor_by_anchor() -> None:
    assert assert_equals_one_by_one(np.zeros((150, 120, 3), np.uint8), restless_network) > 50


def test_voting_moves_a_face_a_little_and_never_to_another() -> None:
    moved = 0
    for picture in pictures()[:10]:
        best = faces_one_by_one(picture, float32_network(), voting=False)
        voted = faces_one_by_one(picture, float32_network(), voting=True)
        for (score, box, marks), (voted_score, voted_box, voted_marks) in zip(best, voted, strict=True):
            assert score == voted_score
            assert overlap(box, voted_box) > 0.7
            moved += marks != voted_marks
    assert moved >= 8


def test_faces_lie_where_they_were_drawn() -> None:
    plan = SamplePlan(identities=24, photos_per_identity=1, seed=5)
    for photo in range(len(plan)):
        if plan.special(photo)[0] != "two":
            continue
        data, rows = draw_photo(plan, photo)
        (found,) = packaged().detect([Photo(data, max_pixels=10**8).pixels()])
        for row in rows:
            drawn = np.reshape(row["landmarks"], (5, 2))
            errors = np.linalg.norm(found.landmarks_N52 - drawn, axis=2).mean(axis=1)
            assert errors.min() < 0.2 * np.linalg.norm(drawn[1] - drawn[0])


def test_the_fast_runtime_finds_the_same_faces_as_float32() -> None:
    exact = RetinaFace(float32_network(), "")
    for picture in pictures():
        assert_same_sure_faces(packaged().detect([picture])[0], exact.detect([picture])[0], tolerance=0.02)


def test_a_batch_of_many_sizes_finds_what_one_by_one_finds() -> None:
    exact = RetinaFace(float32_network(), "")
    several = pictures()[:6]
    assert len({picture.shape for picture in several}) > 3
    for picture, found in zip(several, exact.detect(several), strict=True):
        # The canvas is larger, so that what lies behind the picture's edge is black for longer.
        assert_same_sure_faces(found, exact.detect([picture])[0], tolerance=0.05)


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (31, 33), (64, 64)])
def test_small_and_narrow_pictures_without_faces_have_none(shape: tuple[int, int]) -> None:
    (found,) = packaged().detect([np.full((*shape, 3), 90, np.uint8)])
    assert len(found) == 0
    assert found.boxes_N4.shape == (0, 4)
    assert found.landmarks_N52.shape == (0, 5, 2)


def test_no_pictures_give_no_detections() -> None:
    assert packaged().detect([]) == []


def test_scaling_keeps_pixel_centres() -> None:
    # A pixel that becomes 4 x 4 has its centre between the second and the third of them.
    found = Detections(np.array([[0.0, 0, 1, 1]]), np.ones(1), np.zeros((1, 5, 2))).scaled(4)
    assert found.boxes_N4.tolist() == [[1.5, 1.5, 5.5, 5.5]]
    assert (found.landmarks_N52 == 1.5).all()


@pytest.mark.parametrize("quarter_turns", range(4))
def test_faces_of_a_turned_picture_lie_where_they_are_in_the_picture(quarter_turns: int) -> None:
    picture = np.zeros((30, 50), int)
    points = [(0, 0), (7, 5), (40, 5), (22, 15), (9, 20), (38, 21), (3, 2), (45, 25)]  # five landmarks, two corners
    for number, (x, y) in enumerate(points[1:], start=1):
        picture[y, x] = number
    turned = np.rot90(picture, quarter_turns)
    seen = [tuple(int(i) for i in np.argwhere(turned == number)[0][::-1]) for number in range(1, 8)]
    corners = np.array(seen[5:])
    boxes_N4 = np.concatenate([corners.min(axis=0), corners.max(axis=0)])[None].astype(float)
    found = Detections(boxes_N4, np.array([0.99]), np.array(seen[:5], float)[None])
    back = found.turned_back(quarter_turns, 50, 30)
    assert back.landmarks_N52[0].tolist() == [list(point) for point in points[1:6]]
    assert back.boxes_N4[0].tolist() == [3, 2, 45, 25]
    none = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros((0, 5, 2))).turned_back(quarter_turns, 50, 30)
    assert (none.boxes_N4.shape, none.landmarks_N52.shape) == ((0, 4), (0, 5, 2))
