"""Aligns a face by one `warpAffine` from the photo: eyes level and at a fixed position, scale from the face box.

Points are in pixels, with the centre of the top left pixel at (0, 0), as in OpenCV.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from lib.errors import UserError
from lib.faces.images import Photo, reduction_for

EYES = "eyes"
ARCFACE = "arcface-112"
TEMPLATES = (EYES, ARCFACE)

ARCFACE_52 = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""Positions of the five landmarks in a crop of 112 pixels, for ArcFace (Deng et al. 2019) and most public models."""


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Position and scale of a face in its crop."""

    image_size: int = 240
    """Side of the square crop, in pixels."""
    eye_height: float = 0.4
    """Height of the eye midpoint, as a share of the crop's side from the top (0.5: the middle)."""
    margin: float = 0.1
    """How much longer the crop's side is than the long side of the face box, as a share of the latter."""
    template: str = EYES
    """`eyes`: by the fields above. `arcface-112`: all five landmarks at the positions of public models, scaled."""

    def __post_init__(self) -> None:
        if not 16 <= self.image_size <= 4096:
            raise UserError(f"--image-size is {self.image_size}: allowed are 16 to 4096 pixels")
        if not 0.1 <= self.eye_height <= 0.9:
            raise UserError(f"--eye-height is {self.eye_height}: allowed are 0.1 to 0.9 of the crop's side")
        if not 0.0 <= self.margin <= 2.0:
            raise UserError(f"--margin is {self.margin}: allowed are 0 to 2 of the face box's side")
        if self.template not in TEMPLATES:
            raise UserError(f"--alignment is {self.template!r}: allowed are {', '.join(TEMPLATES)}")


def alignment_matrix(box_4: np.ndarray, landmarks_52: np.ndarray, alignment: Alignment) -> np.ndarray:
    """Return the similarity [2, 3] float64 that maps points of the photo to points of the crop.

    The rotation levels the line through the eyes. The scale fits the box's long side plus the margin. The midpoint of
    the eyes moves to the vertical centre line at `eye_height`. The template `arcface-112` ignores the box: it fits the
    five landmarks to their positions by least squares.
    """
    if alignment.template == ARCFACE:
        return _similarity(np.asarray(landmarks_52, np.float64), ARCFACE_52 * (alignment.image_size / 112))
    left_eye, right_eye = np.asarray(landmarks_52[:2], np.float64)
    box = np.asarray(box_4, np.float64)
    side = max(box[2] - box[0], box[3] - box[1], 1.0) * (1.0 + alignment.margin)
    scale = alignment.image_size / side
    angle = np.arctan2(right_eye[1] - left_eye[1], right_eye[0] - left_eye[0])
    rotation = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    place = np.array([0.5, alignment.eye_height]) * alignment.image_size - 0.5
    return np.column_stack([rotation, place - rotation @ ((left_eye + right_eye) / 2)])


def _similarity(from_52: np.ndarray, to_52: np.ndarray) -> np.ndarray:
    """Return the similarity [2, 3] with the least squared error: a * z + b over the complex numbers."""
    from_5, to_5 = (points[:, 0] + 1j * points[:, 1] for points in (from_52, to_52))
    centred_5 = from_5 - from_5.mean()
    a = (centred_5.conj() @ to_5) / max((centred_5.conj() @ centred_5).real, 1e-9)
    b = to_5.mean() - a * from_5.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def realign(
    crop_HWC: np.ndarray, box_4: np.ndarray, landmarks_52: np.ndarray, *, made: Alignment, wanted: Alignment
) -> np.ndarray:
    """Return a crop `made` with one alignment, changed to the alignment `wanted`, black outside of the crop.

    Box and landmarks are in pixels of the photo. A wider alignment would show more if it were made from the photo.
    """
    matrix = alignment_matrix(box_4, landmarks_52, made)
    moved_52 = np.asarray(landmarks_52, np.float64) @ matrix[:, :2].T + matrix[:, 2]
    size = (wanted.image_size, wanted.image_size)
    # The box fills the crop, except for the margin.
    side = made.image_size / (1 + made.margin)
    centre = made.image_size / 2
    moved_4 = np.array([centre - side / 2, centre - side / 2, centre + side / 2, centre + side / 2])
    return cv2.warpAffine(crop_HWC, alignment_matrix(moved_4, moved_52, wanted), size, flags=cv2.INTER_LINEAR)


def reduction_wanted(box_4: np.ndarray, landmarks_52: np.ndarray, alignment: Alignment) -> int:
    """Return the largest n for which a photo at 1/n of its size still has a pixel for each pixel of the crop."""
    matrix = alignment_matrix(box_4, landmarks_52, alignment)
    return reduction_for(float(np.hypot(matrix[0, 0], matrix[0, 1])))


def align(
    photo: Photo, box_4: np.ndarray, landmarks_52: np.ndarray, alignment: Alignment, *, reduction: int | None = None
) -> np.ndarray:
    """Return the aligned crop, [S, S, 3] uint8 BGR, black only where the photo ends.

    The photo is read at 1/`reduction` of its size, by default `reduction_wanted`: so a large face is averaged, not
    sampled with gaps. Box and landmarks are pixels of the upright photo at full scale.
    """
    matrix = alignment_matrix(box_4, landmarks_52, alignment)
    reduction = max(reduction or reduction_wanted(box_4, landmarks_52, alignment), photo.finest)
    # The point x of the photo is at (x + 0.5) / n - 0.5 in the reduced photo.
    to_photo = np.array([[reduction, 0, (reduction - 1) / 2], [0, reduction, (reduction - 1) / 2], [0, 0, 1.0]])
    size = (alignment.image_size, alignment.image_size)
    return cv2.warpAffine(photo.pixels(reduction), matrix @ to_photo, size, flags=cv2.INTER_LINEAR)
