"""Where to look for the faces of a photo, and which of them it is of: the same for one photo and for batches.

Shape suffixes: N faces, 4 box corners (x0 y0 x1 y1), 2 coordinates (x y).
"""

import math
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

from lib.faces.detection import Detections
from lib.faces.plausibility import are_plausible, eyes_to_mouth, fault, roll_deg

RETRY_SIZES = (320, 1280)
"""Long sides tried in turn for a photo without a face: very large faces outgrow the anchors, very small ones vanish."""

_TRUSTED_ROLL_DEG = 40.0
"""Roll up to which a face is believed to be found as it is without another look."""

_MOST_DOUBT = 0.018
"""Doubt up to which it is."""

_USUAL_DISTANCE = 0.35
_DISTANCE_SPREAD = 0.04
"""How far the mouth usually lies below the eyes, in the face's own frame."""


@dataclass(frozen=True)
class Look:
    """How the detector is shown a photo: shrunk to a long side, then turned counterclockwise."""

    long_side: int
    quarter_turns: int = 0


Search = Generator[list[Look], list[Detections], Detections]
"""Yields looks, is sent what each found, in pixels of the photo as it is, and returns the faces of the photo."""


def search(width: int, height: int, *, detection_size: int, min_score: float) -> Search:
    """Look for the faces of a photo of so many pixels.

    A photo without a sure face is looked at in other sizes. Where the face it is of cannot be trusted to be upright, it
    is turned by 90, 180 and 270 degrees too. Of those looks that have a plausible face, the one whose face has the
    highest score counts; where none has, the first. In a photo without a sure face a turned look must be one to trust:
    three more looks at a photo of no face would else find three times as many that are none.
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
    """Return whether the face a photo is of, as it was found at one look, is sure to be upright in its crop."""
    if not len(found):
        return False
    face = int(np.argmax(_sizes(found, width, height, min_score)))
    box_4, landmarks_52, score = found.boxes_N4[face], found.landmarks_N52[face], float(found.scores_N[face])
    return (
        score >= min_score
        and abs((roll_deg(landmarks_52) - 90 * quarter_turns + 180) % 360 - 180) <= _TRUSTED_ROLL_DEG
        and fault(box_4, landmarks_52) is None
        and _doubt(score, eyes_to_mouth(box_4, landmarks_52)) <= _MOST_DOUBT
    )


def _doubt(score: float, distance: float) -> float:
    """Return (1 - score) * exp(((distance - usual distance) / spread)^2).

    In a face that lies or stands on its head the detector may see an upright one, with nearly the score of one. Eyes
    and mouth of such a face seldom lie as far apart as they should.
    """
    return (1 - score) * math.exp(((distance - _USUAL_DISTANCE) / _DISTANCE_SPREAD) ** 2)


def _plausible_score(found: Detections, width: int, height: int, min_score: float) -> float:
    """Return the score of the face a photo is of, 0 where it is not sure or not plausible."""
    if not len(found):
        return 0.0
    face = most_prominent(found, width, height, min_score)
    is_plausible = fault(found.boxes_N4[face], found.landmarks_N52[face]) is None
    return float(found.scores_N[face]) if is_plausible and found.scores_N[face] >= min_score else 0.0


def most_prominent(found: Detections, width: int, height: int, min_score: float) -> int:
    """Return the index of the face a photo is of: the one of most `prominence`."""
    return int(np.argmax(prominence(found, width, height, min_score)))


def prominence(found: Detections, width: int, height: int, min_score: float) -> np.ndarray:
    """Return how much each face [N] is what the photo is of: large, near the middle, well scored.

    Plausible faces over `min_score` go before all others, and those over it before the rest. Among equals the area of
    the box counts, less by up to a half with the distance of its centre from the photo's, times the score.
    """
    sizes_N = _sizes(found, width, height, min_score)
    return np.where(are_plausible(found.boxes_N4, found.landmarks_N52), sizes_N, sizes_N * 1e-9)


def _sizes(found: Detections, width: int, height: int, min_score: float) -> np.ndarray:
    """Return `prominence` whether the faces are plausible or not."""
    boxes_N4, scores_N = found.boxes_N4, found.scores_N
    areas_N = (boxes_N4[:, 2] - boxes_N4[:, 0]) * (boxes_N4[:, 3] - boxes_N4[:, 1])
    centres_N2 = (boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2
    middle_2 = np.array([width, height]) / 2
    offsets_N = np.linalg.norm((centres_N2 - middle_2) / middle_2, axis=1) / np.sqrt(2)
    sizes_N = areas_N * (1 - 0.5 * np.clip(offsets_N, 0, 1)) * scores_N
    return np.where(scores_N >= min_score, sizes_N, sizes_N * 1e-18)
