"""Searches a photo for faces, and chooses the main one; the same for one photo and for batches.

Shape suffixes: N faces, 4 box corners (x0 y0 x1 y1), 2 coordinates (x y).
"""

import math
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

from lib.faces.detection import Detections
from lib.faces.plausibility import are_plausible, eyes_to_mouth, fault, roll_deg

RETRY_SIZES = (320, 1280)
"""Long sides to try for a photo without a face: very large faces outgrow the anchors, very small ones vanish."""

_TRUSTED_ROLL_DEG = 40.0
_TRUSTED_DOUBT = 0.018
"""Largest roll and doubt of a face that needs no look at the turned photo."""

_USUAL_DISTANCE = 0.35
_DISTANCE_SPREAD = 0.04
"""Usual distance from the eyes down to the mouth and its spread, in the face's own frame."""


@dataclass(frozen=True)
class Look:
    """How the detector sees a photo: shrunk to a long side, then turned counterclockwise."""

    long_side: int
    quarter_turns: int = 0


Search = Generator[list[Look], list[Detections], Detections]
"""Yields looks, receives the faces of each in pixels of the unturned photo, and returns the faces of the photo."""


def search(width: int, height: int, *, detection_size: int, min_score: float) -> Search:
    """Search a photo of `width` x `height` pixels for faces.

    A photo without a sure face is tried in other sizes. If its main face may not be upright, the photo is also turned
    by 90, 180 and 270 degrees. The look whose plausible main face has the highest score counts; if no look has one, the
    first. In a photo without a sure face, the face of a turned look must be as good as an upright one: otherwise three
    more looks at a photo without any face would find three times as many false ones.
    """
    first_size, *others = dict.fromkeys(min(size, max(width, height)) for size in (detection_size, *RETRY_SIZES))
    (found,) = yield [Look(first_size)]
    for size in others:
        if len(found) and found.scores_N[0] >= min_score:
            break
        (again,) = yield [Look(size)]
        if len(again) and (not len(found) or again.scores_N[0] > found.scores_N[0]):
            found = again
    if _is_trusted(found, width, height, min_score):
        return found
    turned = yield [Look(first_size, quarter_turns) for quarter_turns in (1, 2, 3)]
    if not (len(found) and found.scores_N[0] >= min_score):
        turned = [each for turns, each in enumerate(turned, 1) if _is_trusted(each, width, height, min_score, turns)]
    return max([found, *turned], key=lambda faces: _plausible_score(faces, width, height, min_score))


def _is_trusted(found: Detections, width: int, height: int, min_score: float, quarter_turns: int = 0) -> bool:
    """Return whether the main face, as found in one look, is sure to be upright in its crop."""
    if not len(found):
        return False
    face = int(np.argmax(_sizes(found, width, height, min_score)))
    box_4, landmarks_52, score = found.boxes_N4[face], found.landmarks_N52[face], float(found.scores_N[face])
    return (
        score >= min_score
        and abs((roll_deg(landmarks_52) - 90 * quarter_turns + 180) % 360 - 180) <= _TRUSTED_ROLL_DEG
        and fault(box_4, landmarks_52) is None
        and _doubt(score, eyes_to_mouth(box_4, landmarks_52)) <= _TRUSTED_DOUBT
    )


def _doubt(score: float, distance: float) -> float:
    """Return (1 - score) * exp(((distance - usual distance) / spread)^2).

    The detector may see an upright face in one that lies or stands on its head, with nearly the same score. The
    distance between eyes and mouth of such a face is seldom the usual one.
    """
    return (1 - score) * math.exp(((distance - _USUAL_DISTANCE) / _DISTANCE_SPREAD) ** 2)


def _plausible_score(found: Detections, width: int, height: int, min_score: float) -> float:
    """Return the score of the main face; 0 if it is not sure or not plausible."""
    if not len(found):
        return 0.0
    face = most_prominent(found, width, height, min_score)
    is_plausible = fault(found.boxes_N4[face], found.landmarks_N52[face]) is None
    return float(found.scores_N[face]) if is_plausible and found.scores_N[face] >= min_score else 0.0


def most_prominent(found: Detections, width: int, height: int, min_score: float) -> int:
    """Return the index of the main face: the one with the largest `prominence`."""
    return int(np.argmax(prominence(found, width, height, min_score)))


def prominence(found: Detections, width: int, height: int, min_score: float) -> np.ndarray:
    """Return how prominent each face [N] is: large, near the middle, with a high score.

    Plausible faces over `min_score` come first, then the others over `min_score`, then the rest. Within each group it
    is the area of the box times the score, reduced by up to a half with the distance from the photo's centre.
    """
    sizes_N = _sizes(found, width, height, min_score)
    return np.where(are_plausible(found.boxes_N4, found.landmarks_N52), sizes_N, sizes_N * 1e-9)


def _sizes(found: Detections, width: int, height: int, min_score: float) -> np.ndarray:
    """Return the prominence of faces without regard to their plausibility."""
    boxes_N4, scores_N = found.boxes_N4, found.scores_N
    areas_N = (boxes_N4[:, 2] - boxes_N4[:, 0]) * (boxes_N4[:, 3] - boxes_N4[:, 1])
    centres_N2 = (boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2
    middle_2 = np.array([width, height]) / 2
    offsets_N = np.linalg.norm((centres_N2 - middle_2) / middle_2, axis=1) / np.sqrt(2)
    sizes_N = areas_N * (1 - 0.5 * np.clip(offsets_N, 0, 1)) * scores_N
    return np.where(scores_N >= min_score, sizes_N, sizes_N * 1e-18)
