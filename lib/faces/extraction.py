"""One photo becomes its faces: read, detect, choose, align, encode. Training, evaluation and direct use pass here."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import cv2
import numpy as np

from lib.errors import UserError
from lib.faces import table
from lib.faces.alignment import EYES, Alignment, align, alignment_matrix, reduction_wanted
from lib.faces.detection import CLOSE_UP_SIDE, DETECTORS, Detections, detector_sha256, load_detector
from lib.faces.images import REDUCTIONS, BadPhotoError, Photo, to_jpeg

CODE_VERSION = 4
"""Raised whenever the same photo with the same settings would give another crop."""

POLICIES = ("prominent", "all")

JPEG_QUALITY = 95

_LARGEST_MEGAPIXELS = 178
"""Pillow refuses larger photos by itself."""

_RETRY_SIZES = (320, 1280)
"""Long sides tried in turn for a photo without a face: very large faces outgrow the anchors, very small ones vanish."""

_CLOSE_UP = Alignment(image_size=CLOSE_UP_SIDE, eye_height=0.45, margin=0.0)
"""How a face lies when it is looked at again."""

_TILTED_DEG = 5.0
"""Roll of the eyes from which a face is looked at again."""

_MIRRORED = [1, 0, 2, 4, 3]
"""Which landmark of a mirrored face each one is: left and right change places."""

_SAME_FACE = 0.1
"""How far, as a share of the close-up's side, the second look may put the landmarks and still be of the same face."""


@dataclass(frozen=True, kw_only=True)
class ExtractionSettings:
    """Everything that decides which pixels a crop holds."""

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
            raise UserError(f"--min-face is {self.min_face}: at least 1 pixel")
        if self.policy not in POLICIES:
            raise UserError(f"--faces-policy is {self.policy!r}: allowed are {', '.join(POLICIES)}")
        if not 0.0 < self.max_megapixels <= _LARGEST_MEGAPIXELS:
            raise UserError(
                f"--max-megapixels is {self.max_megapixels}: allowed is anything over 0, up to {_LARGEST_MEGAPIXELS}"
            )


def fingerprint(settings: ExtractionSettings) -> dict[str, Any]:
    """Return what a crop depends on, flat and JSON-able, with a short `id` over all of it."""
    content: dict[str, Any] = {
        "detector": settings.detector,
        "detector_sha256": detector_sha256(settings.detector, settings.detector_weights),
        "detection_size": settings.detection_size,
        "min_score": settings.min_score,
        "min_face": settings.min_face,
        "faces_policy": settings.policy,
        "jpeg_quality": JPEG_QUALITY,
        **_alignment_parameters(settings.alignment),
        "code_version": CODE_VERSION,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {"id": digest[:16], **content}


def _alignment_parameters(alignment: Alignment) -> dict[str, Any]:
    """Return the parameters, without the template where it is our own: fingerprints are older than it."""
    parameters = asdict(alignment)
    if alignment.template == EYES:
        del parameters["template"]
    return parameters


def fingerprint_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return one `name: ours, theirs` for each entry in which two fingerprints differ."""
    names = sorted((set(ours) | set(theirs)) - {"id"})
    return [
        f"{name}: {ours.get(name)} here, {theirs.get(name)} there"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def settings_from_fingerprint(content: Mapping[str, Any], *, detector_weights: str | None = None) -> ExtractionSettings:
    """Return the settings that made the faces of a fingerprint; the defaults where it says nothing.

    A fingerprint holds the sha256 of the detector's weights, not where they lie: whether `detector_weights` are those,
    comparing the fingerprint of the result tells.

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
            f"a fingerprint holds values of the wrong type ({error}): make the model or table anew"
        ) from error


Detect = Callable[[Sequence[np.ndarray]], list[Detections]]


class FaceExtractor:
    """Turns encoded photos into rows of the faces table.

    `detect` stands in for the settings' own detector where that runs elsewhere, as on a GPU of another node.
    """

    def __init__(self, settings: ExtractionSettings, detect: Detect | None = None) -> None:
        self.settings = settings
        if detect is None:
            cv2.setNumThreads(1)
            detect = load_detector(settings.detector, settings.detector_weights).detect
        self._detect = detect

    def rows(self, data: bytes) -> list[dict[str, Any]]:
        """Return the rows of one photo without `photo` and `identity`: one, or one a face under the policy `all`.

        A photo that cannot be used gives one row whose status says why; nothing is raised for it.
        """
        try:
            photo = Photo(data, max_pixels=int(self.settings.max_megapixels * 1e6))
            return self._photo_rows(photo, self.find(photo))
        except BadPhotoError as bad:
            return [{"status": bad.status, "reason": str(bad)}]

    def find(self, photo: Photo) -> Detections:
        """Return the faces of a photo over the detector's floor, in pixels of the full photo."""
        long_side = max(photo.width, photo.height)
        tried = min(self.settings.detection_size, long_side)
        found = self._find_at(photo, tried)
        for size in _RETRY_SIZES:
            if len(found) and found.scores_N[0] >= self.settings.min_score:
                break
            if min(size, long_side) == tried:  # photos are never enlarged
                continue
            again = self._find_at(photo, size)
            if len(again) and (not len(found) or again.scores_N[0] > found.scores_N[0]):
                found = again
        return found

    def _find_at(self, photo: Photo, long_side: int) -> Detections:
        factor = max(1.0, max(photo.width, photo.height) / long_side)
        reduction = max(photo.finest, next(n for n in REDUCTIONS if n <= factor))
        pixels = photo.pixels(reduction)
        shrink = max(1.0, factor / reduction)
        if shrink > 1.0:
            size = (max(1, round(photo.width / factor)), max(1, round(photo.height / factor)))
            # Down to a half, bilinear reads every pixel, in a ninth of the time that their mean by area takes.
            how = cv2.INTER_LINEAR if shrink <= 2.0 else cv2.INTER_AREA
            pixels = cv2.resize(pixels, size, interpolation=how)
        (found,) = self._detect([pixels])
        return found.scaled(max(photo.width, photo.height) / max(pixels.shape[:2]))

    def _photo_rows(self, photo: Photo, found: Detections) -> list[dict[str, Any]]:
        num_faces = int((found.scores_N >= self.settings.min_score).sum())
        if not len(found):
            too_small = min(photo.width, photo.height) < self.settings.min_face
            return [{"status": table.TOO_SMALL if too_small else table.NO_FACE, "num_faces": 0}]
        if self.settings.policy == "all" and num_faces:
            chosen = list(range(num_faces))
        else:
            chosen = [most_prominent(found, photo.width, photo.height, self.settings.min_score)]
        return [{"num_faces": num_faces, **self.face_row(photo, found, index)} for index in chosen]

    def face_row(self, photo: Photo, found: Detections, index: int) -> dict[str, Any]:
        """Return status, score, box, landmarks and, where it is aligned, the crop of one of the faces found."""
        box, landmarks = found.boxes_N4[index], found.landmarks_N52[index]
        row: dict[str, Any] = {
            "score": float(found.scores_N[index]),
            "box": box.astype(np.float32),
            "landmarks": landmarks.reshape(10).astype(np.float32),
        }
        if found.scores_N[index] < self.settings.min_score:
            return {"status": table.LOW_SCORE, **row}
        if max(box[2] - box[0], box[3] - box[1]) < self.settings.min_face:
            return {"status": table.TOO_SMALL, **row}
        landmarks = self.refined_landmarks(photo, box, landmarks)
        row["landmarks"] = landmarks.reshape(10).astype(np.float32)
        crop = align(photo, box, landmarks, self.settings.alignment)
        return {"status": table.ALIGNED, **row, "crop": to_jpeg(crop, JPEG_QUALITY)}

    def refined_landmarks(self, photo: Photo, box_4: np.ndarray, landmarks_52: np.ndarray) -> np.ndarray:
        """Return the landmarks [5, 2]; of a tilted face, their mean with those found in it levelled and mirrored.

        A detector sees less roll than there is, and leans to one side: of the two looks, one has neither the roll nor
        the same lean. Where the second does not find the face, the landmarks stay.
        """
        across = landmarks_52[1] - landmarks_52[0]
        if abs(np.degrees(np.arctan2(across[1], across[0]))) < _TILTED_DEG:
            return landmarks_52
        to_close_up_23 = alignment_matrix(box_4, landmarks_52, _CLOSE_UP)
        expected_52 = landmarks_52 @ to_close_up_23[:, :2].T + to_close_up_23[:, 2]
        # From the pixels that the crop itself is made of: another size of the photo would be decoded for this alone.
        its_own = reduction_wanted(box_4, landmarks_52, _CLOSE_UP)
        crops = reduction_wanted(box_4, landmarks_52, self.settings.alignment)
        close_up = align(photo, box_4, landmarks_52, _CLOSE_UP, reduction=max(crops, its_own // 2))
        (mirrored,) = self._detect([np.ascontiguousarray(close_up[:, ::-1])])
        found_N52 = mirrored.landmarks_N52[:, _MIRRORED] * [-1, 1] + [_CLOSE_UP.image_size - 1, 0]
        distances_N = np.linalg.norm(found_N52 - expected_52, axis=2).mean(axis=1)
        if distances_N.min(initial=np.inf) > _SAME_FACE * _CLOSE_UP.image_size:
            return landmarks_52
        to_photo_23 = cv2.invertAffineTransform(to_close_up_23)
        seen_52 = found_N52[np.argmin(distances_N)] @ to_photo_23[:, :2].T + to_photo_23[:, 2]
        return (landmarks_52 + seen_52) / 2


def most_prominent(found: Detections, width: int, height: int, min_score: float) -> int:
    """Return the index of the face a photo is of: the one of most `prominence`."""
    return int(np.argmax(prominence(found, width, height, min_score)))


def prominence(found: Detections, width: int, height: int, min_score: float) -> np.ndarray:
    """Return how much each face [N] is what the photo is of: large, near the middle, well scored.

    Faces over `min_score` go before all others. Among equals the box's area counts, less by up to a half with the
    distance of its centre from the photo's, times the score.
    """
    boxes_N4, scores_N = found.boxes_N4, found.scores_N
    areas_N = (boxes_N4[:, 2] - boxes_N4[:, 0]) * (boxes_N4[:, 3] - boxes_N4[:, 1])
    centres_N2 = (boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2
    middle_2 = np.array([width, height]) / 2
    offsets_N = np.linalg.norm((centres_N2 - middle_2) / middle_2, axis=1) / np.sqrt(2)
    prominence_N = areas_N * (1 - 0.5 * np.clip(offsets_N, 0, 1)) * scores_N
    return np.where(scores_N >= min_score, prominence_N, prominence_N * 1e-9)
