import cv2
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lib.errors import UserError
from lib.faces.alignment import Alignment, align, alignment_matrix, realign
from lib.faces.images import Photo

MAX_PIXELS = 100_000_000
coordinates = st.floats(-2000, 6000)


def photo_of(pixels: np.ndarray) -> Photo:
    return Photo(cv2.imencode(".bmp", pixels)[1].tobytes(), max_pixels=MAX_PIXELS)


def face(left_eye: tuple[float, float], right_eye: tuple[float, float], side: float) -> tuple[np.ndarray, np.ndarray]:
    """Return a square box around the eyes, and landmarks of which only the eyes are meant."""
    centre_x, centre_y = (np.array(left_eye) + right_eye) / 2
    box = np.array([centre_x - side / 2, centre_y - side * 0.4, centre_x + side / 2, centre_y + side * 0.6])
    return box, np.array([left_eye, right_eye, *[(centre_x, centre_y)] * 3])


@given(
    left_eye=st.tuples(coordinates, coordinates),
    right_eye=st.tuples(coordinates, coordinates),
    width=st.floats(5, 4000),
    height=st.floats(5, 4000),
    image_size=st.integers(16, 512),
    eye_height=st.floats(0.1, 0.9),
    margin=st.floats(0, 2),
)
def test_the_eyes_come_level_to_their_place_at_the_scale_of_the_box(
    left_eye: tuple[float, float],
    right_eye: tuple[float, float],
    width: float,
    height: float,
    image_size: int,
    eye_height: float,
    margin: float,
) -> None:
    distance = float(np.hypot(*np.subtract(right_eye, left_eye)))
    assume(distance > 1)
    alignment = Alignment(image_size=image_size, eye_height=eye_height, margin=margin)
    matrix = alignment_matrix(
        np.array([10, 20, 10 + width, 20 + height]), np.array([left_eye, right_eye, *[left_eye] * 3]), alignment
    )
    left, right = (matrix @ [*eye, 1.0] for eye in (left_eye, right_eye))
    scale = image_size / (max(width, height) * (1 + margin))
    # Pixel centres are whole numbers: the middle of a crop of 240 is 119.5.
    middle = np.array([0.5, eye_height]) * image_size - 0.5
    assert np.allclose((left + right) / 2, middle, atol=1e-6 * image_size * max(1, scale))
    assert np.allclose(right - left, [scale * distance, 0], rtol=1e-6, atol=1e-6)
    assert np.linalg.det(matrix[:, :2]) == pytest.approx(scale**2)


def test_eyes_on_one_point_leave_the_photo_as_it_stands() -> None:
    matrix = alignment_matrix(np.array([0, 0, 100, 100]), np.full((5, 2), 50.0), Alignment(margin=0))
    assert np.allclose(matrix[:, :2], 2.4 * np.eye(2))


def test_a_face_upside_down_is_turned_upright() -> None:
    pixels = np.full((400, 400, 3), 128, np.uint8)
    # Upside down, the person's eye that comes out on the left of the crop is on the right of the photo.
    cv2.circle(pixels, (240, 260), 8, (255, 0, 0), -1)
    cv2.circle(pixels, (160, 260), 8, (0, 0, 255), -1)
    cv2.circle(pixels, (200, 180), 8, (0, 255, 0), -1)
    box, landmarks = face((240, 260), (160, 260), 200)
    crop = align(photo_of(pixels), box, landmarks, Alignment(image_size=200, margin=0))
    blue, green, red = (
        np.argwhere((crop[..., channel] > 200) & (np.delete(crop, channel, 2).max(2) < 90)).mean(0)
        for channel in range(3)
    )
    assert np.allclose(blue, [79.5, 59.5], atol=0.6)
    assert np.allclose(red, [79.5, 139.5], atol=0.6)
    assert np.allclose(green, [159.5, 99.5], atol=0.6)


@pytest.mark.parametrize("roll_deg", [0, 17, -63, 90, 158])
@pytest.mark.parametrize("side", [150, 300, 700, 1500])
def test_the_crop_equals_the_scene_drawn_at_the_crops_own_points(roll_deg: float, side: float) -> None:
    def scene(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        waves = [np.sin(x / 61) * np.cos(y / 47), np.cos((x + y) / 83), np.sin((x - 2 * y) / 101)]
        return 127.5 + 100 * np.stack(waves, axis=-1)

    y, x = np.mgrid[0:1700, 0:1800].astype(float)
    photo = photo_of(np.rint(scene(x, y)).astype(np.uint8))
    roll, middle = np.radians(roll_deg), np.array([903.3, 798.8])
    half = 0.2 * side * np.array([np.cos(roll), np.sin(roll)])
    box, landmarks = face(tuple(middle - half), tuple(middle + half), side)
    crop = align(photo, box, landmarks, Alignment(image_size=120, margin=0.2, eye_height=0.4))

    row, column = np.mgrid[0:120, 0:120].astype(float)
    step = 1.2 * side / 120
    right, down = (column - 59.5) * step, (row - 47.5) * step
    source_x = middle[0] + right * np.cos(roll) - down * np.sin(roll)
    source_y = middle[1] + right * np.sin(roll) + down * np.cos(roll)
    inside = (source_x > 8) & (source_x < 1791) & (source_y > 8) & (source_y < 1691)
    # Averaging over blocks of 8 pixels flattens these waves by less than 3 grey values.
    assert np.abs(crop - scene(source_x, source_y))[inside].max() < 3.5


@pytest.mark.parametrize("side", [100, 1600])
def test_black_stands_only_where_the_photo_ends(side: float) -> None:
    photo = photo_of(np.full((1000, 1000, 3), 200, np.uint8))
    box, landmarks = face((20.0, 100.0), (60.0, 120.0), side)
    alignment = Alignment(image_size=160)
    crop = align(photo, box, landmarks, alignment)
    inverse = cv2.invertAffineTransform(alignment_matrix(box, landmarks, alignment))
    row, column = np.mgrid[0:160, 0:160]
    points = np.stack([column, row, np.ones_like(row)], axis=-1) @ inverse.T
    outside = np.maximum(-0.5 - points, points - 999.5).max(axis=-1)
    edge = 1.1 * side / 160 + 8
    assert (crop[outside > edge] == 0).all()
    assert (crop[outside < -edge] == 200).all()
    assert (outside > edge).any()


class RecordingPhoto(Photo):
    """A photo that tells at which scales it was decoded."""

    def pixels(self, reduction: int = 1) -> np.ndarray:
        self.asked = [*getattr(self, "asked", []), reduction]
        return super().pixels(reduction)


@pytest.mark.parametrize(("side", "reduction"), [(90, 1), (199, 1), (201, 2), (399, 2), (401, 4), (801, 8), (5000, 8)])
def test_the_photo_is_read_once_at_the_coarsest_scale_that_has_the_pixels(side: float, reduction: int) -> None:
    photo = RecordingPhoto(cv2.imencode(".jpg", np.zeros((64, 64, 3), np.uint8))[1].tobytes(), max_pixels=MAX_PIXELS)
    box, landmarks = face((20.0, 30.0), (40.0, 30.0), side)
    align(photo, box, landmarks, Alignment(image_size=100, margin=0.0))
    assert photo.asked == [reduction]


def test_a_large_face_is_averaged_down_instead_of_sampled_with_holes() -> None:
    stripes = np.zeros((1600, 1600, 3), np.uint8)
    stripes[:, ::2] = 255
    box, landmarks = face((600.0, 600.0), (1000.0, 600.0), 1600)
    crop = align(photo_of(stripes), box, landmarks, Alignment(image_size=100, margin=0.0, eye_height=0.4))
    assert np.abs(crop[10:90, 10:90].astype(int) - 127).max() <= 2


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"image_size": 15}, "--image-size"),
        ({"image_size": 4097}, "--image-size"),
        ({"eye_height": 0.05}, "--eye-height"),
        ({"eye_height": float("nan")}, "--eye-height"),
        ({"margin": -0.1}, "--margin"),
        ({"margin": 2.1}, "--margin"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, float], flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        Alignment(**settings)


def test_the_arcface_template_is_the_similarity_of_least_error() -> None:
    rng = np.random.default_rng(3)
    wanted = np.array(
        [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
    )
    for size in (112, 224):
        points_52 = wanted @ [[0.8, 0.6], [-0.6, 0.8]] * 2.5 + [300, 40] + rng.normal(0, 3, (5, 2))
        alignment = Alignment(template="arcface-112", image_size=size)
        matrix = alignment_matrix(np.zeros(4), points_52, alignment)
        # a x - b y + c, b x + a y + d, solved as plain least squares
        x, y = points_52.T
        zero, one = np.zeros(5), np.ones(5)
        rows = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
        a, b, c, d = np.linalg.lstsq(rows, (wanted * size / 112).T.ravel(), rcond=None)[0]
        np.testing.assert_allclose(matrix, [[a, -b, c], [b, a, d]], atol=1e-6)


def test_a_crop_is_realigned_as_its_photo_would_be() -> None:
    ramp = np.add.outer(np.arange(400), np.arange(400)).astype(np.float32) / 800 * 255
    pixels = np.repeat(ramp.astype(np.uint8)[..., None], 3, axis=2)
    photo = Photo.of_pixels(pixels, max_pixels=10**6)
    box_4 = np.array([120, 100, 280, 300.0])
    landmarks_52 = np.array([[165, 180], [235, 170], [205, 215], [175, 255], [235, 250.0]])
    made, wanted = Alignment(image_size=240), Alignment(template="arcface-112", image_size=112)
    again = realign(align(photo, box_4, landmarks_52, made), box_4, landmarks_52, made=made, wanted=wanted)
    direct = align(photo, box_4, landmarks_52, wanted)
    # At its edge a crop fades into black.
    inside = cv2.erode((again.min(axis=2) > 0).astype(np.uint8), np.ones((5, 5)), borderValue=0) > 0
    assert inside.mean() > 0.85
    assert np.abs(again.astype(int) - direct)[inside].max() <= 4
