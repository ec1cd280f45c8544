"""The second look at a tilted face, which corrects the landmarks of the first."""

from dataclasses import dataclass

import cv2
import numpy as np

from lib.faces.alignment import Alignment, alignment_matrix, reduction_wanted
from lib.faces.detection import CLOSE_UP_SIDE, Detections
from lib.faces.plausibility import roll_deg

CLOSE_UP = Alignment(image_size=CLOSE_UP_SIDE, eye_height=0.45, margin=0.0)
"""Alignment of a face for its second look."""

_TILTED_DEG = 5.0
"""Roll from which a face gets a second look."""

_MIRRORED = [1, 0, 2, 4, 3]
"""Order of the landmarks in a mirrored face: left and right are exchanged."""

_SAME_FACE = 0.1
"""Largest distance between the landmarks of the two looks at a face, as a share of the close-up's side."""


def is_tilted(landmarks_52: np.ndarray) -> bool:
    """Return whether a face needs a second look because of its roll."""
    return abs(roll_deg(landmarks_52)) >= _TILTED_DEG


@dataclass(frozen=True)
class SecondLook:
    """The second look at a tilted face, levelled and mirrored.

    A detector underestimates roll, and its estimate is biased to one side. The levelled face has no roll, and mirroring
    reverses the bias.

    Attributes:
        landmarks_52: of the first look, in pixels of the photo.
        to_close_up_23: matrix from the photo to the levelled close-up.
        reduction: the close-up is made from the photo at 1/`reduction` of its size.
    """

    landmarks_52: np.ndarray
    to_close_up_23: np.ndarray
    reduction: int

    @classmethod
    def at(cls, box_4: np.ndarray, landmarks_52: np.ndarray, crops: Alignment) -> "SecondLook":
        """Return the second look at a face whose crop is made by the alignment `crops`."""
        # Use the scale that the crop is made from, to avoid decoding the photo at another scale.
        its_own = reduction_wanted(box_4, landmarks_52, CLOSE_UP)
        reduction = max(reduction_wanted(box_4, landmarks_52, crops), its_own // 2)
        return cls(landmarks_52, alignment_matrix(box_4, landmarks_52, CLOSE_UP), reduction)

    def merged(self, mirrored: Detections) -> np.ndarray:
        """Return the mean [5, 2] of the first landmarks and those found in the mirrored close-up.

        If the second look does not find the face, the first landmarks stay.
        """
        matrix_23 = self.to_close_up_23
        expected_52 = self.landmarks_52 @ matrix_23[:, :2].T + matrix_23[:, 2]
        found_N52 = mirrored.landmarks_N52[:, _MIRRORED] * [-1, 1] + [CLOSE_UP.image_size - 1, 0]
        distances_N = np.linalg.norm(found_N52 - expected_52, axis=2).mean(axis=1)
        if distances_N.min(initial=np.inf) > _SAME_FACE * CLOSE_UP.image_size:
            return self.landmarks_52
        to_photo_23 = cv2.invertAffineTransform(matrix_23)
        seen_52 = found_N52[np.argmin(distances_N)] @ to_photo_23[:, :2].T + to_photo_23[:, 2]
        return (self.landmarks_52 + seen_52) / 2
