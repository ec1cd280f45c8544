"""Extracts the faces of a photo: read, detect, choose, align, encode. Training, evaluation and direct use share it."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, cast

import cv2
import numpy as np

from lib.errors import UserError
from lib.faces import table
from lib.faces.alignment import EYES, Alignment, align
from lib.faces.detection import DETECTORS, Detections, detector_sha256, load_detector
from lib.faces.images import REDUCTIONS, BadPhotoError, Photo, to_jpeg
from lib.faces.plausibility import fault
from lib.faces.search import Look, most_prominent, search
from lib.faces.second_look import CLOSE_UP, SecondLook, is_tilted

CODE_VERSION = 5
"""Increased whenever the same photo with the same settings would give another crop."""

POLICIES = ("prominent", "all")

JPEG_QUALITY = 95

_LARGEST_MEGAPIXELS = 178
"""Limit of Pillow."""


@dataclass(frozen=True, kw_only=True)
class ExtractionSettings:
    """All settings that decide the pixels of a crop."""

    detector: str = "retinaface"
    detector_weights: str | None = None
    detection_size: int = 640
    min_score: float = 0.9
    min_face: int = 20
    policy: str = "prominent"
    max_megapixels: float = 100.0
    alignment: Alignment = field(default_factory=Alignment)

    def __post_init__(self) -> None:
        if self.detector not in DETECTORS:
            raise UserError(f"--detector is {self.detector!r}: allowed are {', '.join(DETECTORS)}")
        if not 64 <= self.detection_size <= 4096:
            raise UserError(f"--detection-size is {self.detection_size}: allowed are 64 to 4096 pixels")
        if not 0.0 < self.min_score < 1.0:
            raise UserError(f"--min-score is {self.min_score}: allowed is anything between 0 and 1")
        if self.min_face < 1:
            raise UserError(f"--min-face is {self.min_face}: allowed is 1 pixel or more")
        if self.policy not in POLICIES:
            raise UserError(f"--faces-policy is {self.policy!r}: allowed are {', '.join(POLICIES)}")
        if not 0.0 < self.max_megapixels <= _LARGEST_MEGAPIXELS:
            raise UserError(
                f"--max-megapixels is {self.max_megapixels}: allowed is anything over 0, up to {_LARGEST_MEGAPIXELS}"
            )


def fingerprint(settings: ExtractionSettings) -> dict[str, Any]:
    """Return what a crop depends on, flat and JSON-able, with a short `id` over all of it."""
    detection = {
        "detector": settings.detector,
        "detector_sha256": detector_sha256(settings.detector, settings.detector_weights),
        "detection_size": settings.detection_size,
        "min_score": settings.min_score,
        "min_face": settings.min_face,
        "faces_policy": settings.policy,
    }
    return fingerprint_of(settings.alignment, detection)


def fingerprint_of(alignment: Alignment, detection: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fingerprint of crops that lie so and were found so."""
    content: dict[str, Any] = {
        **detection,
        "jpeg_quality": JPEG_QUALITY,
        **_alignment_parameters(alignment),
        "code_version": CODE_VERSION,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {"id": digest[:16], **content}


def _alignment_parameters(alignment: Alignment) -> dict[str, Any]:
    """Return the parameters, without the default template, which older fingerprints do not have."""
    parameters = asdict(alignment)
    if alignment.template == EYES:
        del parameters["template"]
    return parameters


def fingerprint_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return one `name: ours, theirs` for each entry in which two fingerprints differ.

    Crops that came aligned have no detector. There, only the places of the landmarks and the size count.
    """
    names = sorted((set(ours) | set(theirs)) - {"id"})
    if ours.get("aligned") != theirs.get("aligned"):
        aligned = ours.get("aligned") or theirs.get("aligned")
        names = ["aligned"] if aligned == "none" else ["image_size", "template"]
        names += ["eye_height", "margin"] if aligned == EYES else []
    return [
        f"{name}: {ours.get(name)} here, {theirs.get(name)} there"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def settings_from_fingerprint(content: Mapping[str, Any], *, detector_weights: str | None = None) -> ExtractionSettings:
    """Return the settings that made the faces of a fingerprint; settings that it lacks have their defaults.

    A fingerprint holds the sha256 of the detector's weights, not their path. Compare the fingerprint of the result to
    find out whether `detector_weights` are the same weights.

    Raises:
        UserError: values that are not allowed.
    """
    names = {"detector": "detector", "detection_size": "detection_size", "min_score": "min_score"}
    names |= {"min_face": "min_face", "faces_policy": "policy"}
    values = {name: content[key] for key, name in names.items() if key in content}
    alignment = {part.name: content[part.name] for part in fields(Alignment) if part.name in content}
    try:
        return ExtractionSettings(detector_weights=detector_weights, alignment=Alignment(**alignment), **values)
    except TypeError as error:
        raise UserError(
            f"a fingerprint has values of the wrong type ({error}): make the model or table again"
        ) from error


Detect = Callable[[Sequence[np.ndarray]], list[Detections]]


class FaceExtractor:
    """Turns encoded photos into rows of the faces table.

    `detect` replaces the detector that the settings name.

    Attributes:
        made_on: the device.
    """

    def __init__(self, settings: ExtractionSettings, detect: Detect | None = None) -> None:
        self.settings = settings
        if detect is None:
            cv2.setNumThreads(1)
            detect = load_detector(settings.detector, settings.detector_weights).detect
        self._detect = detect
        self.made_on = "cpu"

    def rows(self, data: bytes) -> list[dict[str, Any]]:
        """Return the rows of a photo without `photo` and `identity`: one row, or one per face with the policy `all`.

        A photo that cannot be used gives one row whose status says why; it raises no error.
        """
        try:
            photo = Photo(data, max_pixels=int(self.settings.max_megapixels * 1e6))
            return self._photo_rows(photo, self.find(photo))
        except BadPhotoError as bad:
            return [{"status": bad.status, "reason": str(bad)}]

    def find(self, photo: Photo) -> Detections:
        """Return all faces of a photo that the detector returns, in pixels of the full photo."""
        settings = self.settings
        searching = search(
            photo.width, photo.height, detection_size=settings.detection_size, min_score=settings.min_score
        )
        looks = next(searching)
        while True:
            try:
                looks = searching.send([self._seen(photo, look) for look in looks])
            except StopIteration as done:
                return cast(Detections, done.value)

    def _seen(self, photo: Photo, look: Look) -> Detections:
        size = DetectionSize.of(photo, look.long_side)
        pixels = photo.pixels(size.reduction)
        if size.interpolation is not None:
            pixels = cv2.resize(pixels, (size.width, size.height), interpolation=size.interpolation)
        (found,) = self._detect([np.ascontiguousarray(np.rot90(pixels, look.quarter_turns))])
        height, width = pixels.shape[:2]
        return found.turned_back(look.quarter_turns, width, height).scaled(
            max(photo.width, photo.height) / max(width, height)
        )

    def _photo_rows(self, photo: Photo, found: Detections) -> list[dict[str, Any]]:
        rows = rows_without_crops(found, photo.width, photo.height, self.settings)
        for row in rows:
            if row["status"] == table.ALIGNED:
                self._cut(photo, row)
        return rows

    def face_row(self, photo: Photo, found: Detections, index: int) -> dict[str, Any]:
        """Return status, score, box, landmarks and, if it is aligned, the crop of one of the faces found."""
        row = face_row_without_crop(found, index, self.settings)
        if row["status"] == table.ALIGNED:
            self._cut(photo, row)
        return row

    def _cut(self, photo: Photo, row: dict[str, Any]) -> None:
        """Add the crop and the refined landmarks to the row of a face."""
        box_4, landmarks_52 = row["box"], self.refined_landmarks(photo, row["box"], row["landmarks"].reshape(5, 2))
        row["landmarks"] = landmarks_52.reshape(10).astype(np.float32)
        row["crop"] = to_jpeg(align(photo, box_4, landmarks_52, self.settings.alignment), JPEG_QUALITY)

    def refined_landmarks(self, photo: Photo, box_4: np.ndarray, landmarks_52: np.ndarray) -> np.ndarray:
        """Return the landmarks [5, 2]; of a tilted face, the mean of two looks, the second levelled and mirrored."""
        if not is_tilted(landmarks_52):
            return landmarks_52
        look = SecondLook.at(box_4, landmarks_52, self.settings.alignment)
        close_up = align(photo, box_4, landmarks_52, CLOSE_UP, reduction=look.reduction)
        (mirrored,) = self._detect([np.ascontiguousarray(close_up[:, ::-1])])
        return look.merged(mirrored)


@dataclass(frozen=True)
class DetectionSize:
    """How to shrink a photo for the detector: decode it at 1/`reduction`, then interpolate to `width` x `height`."""

    reduction: int
    width: int
    height: int
    interpolation: int | None
    """Mode of OpenCV; None if the reduced photo has the right size."""

    @classmethod
    def of(cls, photo: Photo, long_side: int) -> "DetectionSize":
        """Return how to shrink a photo to a long side of `long_side` pixels; photos are never enlarged."""
        factor = max(1.0, max(photo.width, photo.height) / long_side)
        reduction = max(photo.finest, next(n for n in REDUCTIONS if n <= factor))
        shrink = max(1.0, factor / reduction)
        width, height = max(1, round(photo.width / factor)), max(1, round(photo.height / factor))
        if shrink == 1.0:
            return cls(reduction, width, height, None)
        # Down to a half, bilinear interpolation uses every pixel, in a ninth of the time of a mean by area.
        return cls(reduction, width, height, cv2.INTER_LINEAR if shrink <= 2.0 else cv2.INTER_AREA)


def rows_without_crops(
    found: Detections, width: int, height: int, settings: ExtractionSettings
) -> list[dict[str, Any]]:
    """Return the rows of a photo with these faces; `aligned` rows still lack their crops."""
    num_faces = int((found.scores_N >= settings.min_score).sum())
    if not len(found):
        too_small = min(width, height) < settings.min_face
        return [{"status": table.TOO_SMALL if too_small else table.NO_FACE, "num_faces": 0}]
    if settings.policy == "all" and num_faces:
        chosen = list(range(num_faces))
    else:
        chosen = [most_prominent(found, width, height, settings.min_score)]
    return [{"num_faces": num_faces, **face_row_without_crop(found, index, settings)} for index in chosen]


def face_row_without_crop(found: Detections, index: int, settings: ExtractionSettings) -> dict[str, Any]:
    """Return status, score, box and landmarks of one of the faces."""
    box, landmarks_52 = found.boxes_N4[index], found.landmarks_N52[index]
    reason = None
    if found.scores_N[index] < settings.min_score:
        status = table.LOW_SCORE
    elif max(box[2] - box[0], box[3] - box[1]) < settings.min_face:
        status = table.TOO_SMALL
    else:
        reason = fault(box, landmarks_52)
        status = table.IMPLAUSIBLE if reason else table.ALIGNED
    return {
        "status": status,
        **({"reason": reason} if reason else {}),
        "score": float(found.scores_N[index]),
        "box": box.astype(np.float32),
        "landmarks": landmarks_52.reshape(10).astype(np.float32),
    }
