"""Checks whether five landmarks can belong to a face. Those that a detector finds in a turned face often cannot.

Points are pixels, x to the right and y down: left eye, right eye, nose, left and right corner of the mouth, as seen
when the face is upright. A face's own frame has its origin between the eyes, its x axis from the left eye to the right
one, and its y axis at a right angle to that, downward. Its unit is the long side of the face's box. In this frame a
tilted face looks like an upright one.

Shape suffixes: N faces, 5 landmarks, 4 box corners (x0 y0 x1 y1), 2 coordinates (x y).
"""

import math

import numpy as np

_EYES_TO_MOUTH = (0.27, 0.44)
"""Range of the distance from the eyes down to the middle of the mouth."""
_NOSE = (0.12, 0.87)
"""Range of the nose's position between the eyes (0) and the mouth (1)."""
_MOUTH_SLOPE = 0.02
"""Largest difference in height between the corners of the mouth."""


def roll_deg(landmarks_52: np.ndarray) -> float:
    """Return the roll of a face in degrees, clockwise: the angle of the line from the left eye to the right one."""
    (left_x, left_y), (right_x, right_y) = landmarks_52[:2].tolist()
    return math.degrees(math.atan2(right_y - left_y, right_x - left_x))


def in_own_frame(box_4: np.ndarray, landmarks_52: np.ndarray) -> list[tuple[float, float]]:
    """Return the landmarks in the face's own frame.

    With the eyes l and r, their middle m = (l + r) / 2, u = (r - l) / |r - l|, v = (-u_y, u_x) and s the long side of
    the box, a point p lies at ((p - m) . u / s, (p - m) . v / s).
    """
    points = landmarks_52.tolist()
    (left_x, left_y), (right_x, right_y) = points[:2]
    x0, y0, x1, y1 = box_4.tolist()
    across_x, across_y = right_x - left_x, right_y - left_y
    unit = max(math.hypot(across_x, across_y), 1e-6) * max(x1 - x0, y1 - y0, 1e-6)
    u_x, u_y = across_x / unit, across_y / unit
    middle_x, middle_y = (left_x + right_x) / 2, (left_y + right_y) / 2
    moved = [(x - middle_x, y - middle_y) for x, y in points]
    return [(x * u_x + y * u_y, y * u_x - x * u_y) for x, y in moved]


def eyes_to_mouth(box_4: np.ndarray, landmarks_52: np.ndarray) -> float:
    """Return how far the middle of the mouth lies below the eyes, in the face's own frame."""
    *_, (_, left_y), (_, right_y) = in_own_frame(box_4, landmarks_52)
    return (left_y + right_y) / 2


def fault(box_4: np.ndarray, landmarks_52: np.ndarray) -> str | None:
    """Return why the landmarks cannot belong to a face, in words; None if they can."""
    _, _, (_, nose_y), (left_x, left_y), (right_x, right_y) = in_own_frame(box_4, landmarks_52)
    mouth_y = (left_y + right_y) / 2
    if mouth_y <= 0:
        return "the mouth was found above the eyes"
    if not _EYES_TO_MOUTH[0] <= mouth_y <= _EYES_TO_MOUTH[1]:
        return f"eyes and mouth were found too {'near to' if mouth_y < _EYES_TO_MOUTH[0] else 'far from'} each other"
    if not _NOSE[0] <= nose_y / mouth_y <= _NOSE[1]:
        return "the nose was not found between eyes and mouth"
    if left_x >= right_x:
        return "the corners of the mouth were found in the wrong order"
    if abs(right_y - left_y) > _MOUTH_SLOPE:
        return "eyes and mouth were not found parallel"
    return None


def are_plausible(boxes_N4: np.ndarray, landmarks_N52: np.ndarray) -> np.ndarray:
    """Return which faces have plausible landmarks, bool [N]."""
    pairs = zip(boxes_N4, landmarks_N52, strict=True)
    return np.fromiter((fault(box_4, landmarks_52) is None for box_4, landmarks_52 in pairs), bool, len(boxes_N4))
