"""The quality of a face for recognition: size, sharpness, brightness, contrast and pose, and one score from all.

Everything follows from a row of the faces table, that is, from its crop, landmarks and detector score. So the measures
are the same for every way to make a crop, and can be computed for older tables.

Points are pixels, x to the right and y down: left eye, right eye, nose, mouth left, mouth right, as seen in an upright
face. Shape suffixes: 5 landmarks, 2 and 3 coordinates.
"""

import math
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from lib.faces.plausibility import roll_deg

COLUMNS = (
    pa.field("eye_distance", pa.float32()),
    pa.field("sharpness", pa.float32()),
    pa.field("brightness", pa.float32()),
    pa.field("contrast", pa.float32()),
    pa.field("yaw", pa.float32()),
    pa.field("pitch", pa.float32()),
    pa.field("roll", pa.float32()),
    pa.field("quality", pa.float32()),
)
"""Columns of the faces table, null unless a face is aligned:

- `eye_distance`: distance between the eyes, in pixels of the photo.
- `sharpness`: variance of the Laplacian of the face's luma, after Pech-Pacheco et al., "Diatom autofocusing in
  brightfield microscopy" (2000). The middle of the crop is first brought to 128 x 128 pixels.
- `brightness`, `contrast`: mean and standard deviation of the same luma, 0 to 255.
- `yaw`, `pitch`, `roll`: degrees by which the head is turned to the right of the picture, bowed, and turned clockwise.
- `quality`: 0 to 1, the worst of the terms of `quality_score`.
"""
NAMES = tuple(column.name for column in COLUMNS)

_SIDE = 128
_MIDDLE = 0.6
"""Share of the crop's side that is measured: the face without hair and background."""

_FACE_53 = np.array(
    [[-31.5, 0.0, 0.0], [31.5, 0.0, 0.0], [0.0, 41.0, 27.0], [-26.0, 73.0, 6.0], [26.0, 73.0, 6.0]], np.float64
)
"""An average adult face in millimetres: x to the right of the picture, y down, z towards the camera. The height of the
nose makes the median pitch of the photos of two data sets nearly zero."""
_TO_AFFINE_45 = np.linalg.pinv(np.hstack([_FACE_53, np.ones((5, 1))]))

_GOOD_EYE_DISTANCE, _GOOD_SHARPNESS, _GOOD_CONTRAST = 40.0, 150.0, 25.0
_DARK, _BRIGHT = 60.0, 200.0


def face_quality(crop: bytes, landmarks_10: np.ndarray, score: float) -> dict[str, float]:
    """Return the measures of one aligned face, keys as in `COLUMNS`; none if the crop cannot be decoded.

    Args:
        crop: the encoded crop.
        landmarks_10: pixels of the photo.
        score: of the detector, 0 to 1.
    """
    luma = cv2.imdecode(np.frombuffer(crop, np.uint8), cv2.IMREAD_GRAYSCALE)
    if luma is None:
        return {}
    landmarks_52 = np.asarray(landmarks_10, np.float64).reshape(5, 2)
    yaw, pitch, roll = pose_deg(landmarks_52)
    measures = {
        "eye_distance": float(np.linalg.norm(landmarks_52[1] - landmarks_52[0])),
        **luma_measures(luma),
        "yaw": yaw,
        "pitch": pitch,
        "roll": roll,
    }
    return {**measures, "quality": quality_score(measures, score)}


def luma_measures(luma: np.ndarray) -> dict[str, float]:
    """Return sharpness, brightness and contrast of a crop, uint8 [H, W]."""
    margin = round(luma.shape[0] * (1 - _MIDDLE) / 2)
    middle = luma[margin : luma.shape[0] - margin, margin : luma.shape[1] - margin]
    face = cv2.resize(middle, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    mean, deviation = cv2.meanStdDev(face)
    _, edges = cv2.meanStdDev(cv2.Laplacian(face, cv2.CV_32F))
    return {
        "sharpness": float(edges[0, 0]) ** 2,
        "brightness": float(mean[0, 0]),
        "contrast": float(deviation[0, 0]),
    }


def pose_deg(landmarks_52: np.ndarray) -> tuple[float, float, float]:
    """Return yaw, pitch and roll in degrees, under weak perspective.

    The landmarks, turned level, are fitted by an affine map of an average face: x = a . (X, Y, Z) + c and
    y = b . (X, Y, Z) + d. A head turned by yaw has a = s (cos yaw, 0, sin yaw), one that is bowed by pitch has
    b = s (0, cos pitch, sin pitch), so the angles are the arctangents of those ratios (DeMenthon and Davis,
    "Model-based object pose in 25 lines of code", 1995).
    """
    roll = roll_deg(landmarks_52)
    cosine, sine = math.cos(math.radians(roll)), math.sin(math.radians(roll))
    level_52 = landmarks_52 @ np.array([[cosine, -sine], [sine, cosine]])
    affine_42 = _TO_AFFINE_45 @ level_52
    yaw = math.degrees(math.atan2(affine_42[2, 0], affine_42[0, 0]))
    pitch = math.degrees(math.atan2(affine_42[2, 1], affine_42[1, 1]))
    return yaw, pitch, roll


def quality_score(measures: dict[str, float], score: float) -> float:
    """Return the quality of a face, 0 to 1: the worst of its terms.

    The terms: eye distance / 40 px; sharpness / (sharpness + 150) x 2; contrast / 25; brightness, 1 from 60 to 200 and
    falling to 0 at 0 and 255; cos yaw x cos pitch; (score - 0.5) x 2. Each is limited to 0 to 1. The constants are
    chosen by hand so that a good passport photo has 1.
    """
    brightness = measures["brightness"]
    turned = math.cos(math.radians(measures["yaw"])) * math.cos(math.radians(measures["pitch"]))
    terms = (
        measures["eye_distance"] / _GOOD_EYE_DISTANCE,
        2 * measures["sharpness"] / (measures["sharpness"] + _GOOD_SHARPNESS),
        measures["contrast"] / _GOOD_CONTRAST,
        min(brightness / _DARK, (255 - brightness) / (255 - _BRIGHT)),
        turned,
        2 * (score - 0.5),
    )
    return float(min(1.0, max(0.0, min(terms))))


def with_quality(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the faces table with the measures of its face, unless it has them or has no face."""
    if (
        row.get("quality") is not None
        or not row.get("crop")
        or row.get("landmarks") is None
        or row.get("score") is None
    ):
        return row
    return {**row, **face_quality(row["crop"], row["landmarks"], row["score"])}
