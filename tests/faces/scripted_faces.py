"""A detector that finds what a test says, for tests of extraction."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import cv2
import numpy as np

from lib.faces.detection import Detections
from lib.faces.extraction import ExtractionSettings, FaceExtractor
from lib.sample.sample_job import SamplePlan

PLAN = SamplePlan(identities=50, photos_per_identity=3, seed=1)


@lru_cache
def extractor(policy: str = "prominent") -> FaceExtractor:
    return FaceExtractor(ExtractionSettings(policy=policy))


def faces(*found: tuple[float, tuple[float, float, float, float]]) -> Detections:
    """Return detections of given scores and boxes, eyes and all in the usual places."""
    boxes = np.array([box for _, box in found], np.float32).reshape(-1, 4)
    shares = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.75], [0.65, 0.75]])
    landmarks = boxes[:, None, :2] + shares * (boxes[:, None, 2:] - boxes[:, None, :2])
    return Detections(boxes, np.array([score for score, _ in found], np.float32), landmarks)


class Scripted:
    """A detect function that answers what it is told and remembers which sizes it saw."""

    def __init__(self, *answers: Detections) -> None:
        self.answers = list(answers)
        self.sizes: list[tuple[int, int]] = []

    def __call__(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        (picture,) = pictures
        self.sizes.append((picture.shape[1], picture.shape[0]))
        return [self.answers[min(len(self.sizes), len(self.answers)) - 1]]


def blank(width: int, height: int) -> bytes:
    return cv2.imencode(".jpg", np.full((height, width, 3), 80, np.uint8))[1].tobytes()


def rows_for(found: Detections, *, size: tuple[int, int] = (400, 300), **settings: Any) -> list[dict[str, Any]]:
    return FaceExtractor(ExtractionSettings(**settings), Scripted(found)).rows(blank(*size))


def statuses(rows: list[dict[str, Any]]) -> list[str]:
    return [row["status"] for row in rows]
