"""A model for single photos: their faces and embeddings, and whether two photos show one person.

A photo is processed as in `jobs/preprocess.py`, so its crop is bit for bit that in the faces table.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps

from lib.errors import UserError
from lib.faces import table
from lib.faces.extraction import FaceExtractor, fingerprint
from lib.faces.images import MAX_PHOTO_BYTES, BadPhotoError, Photo
from lib.faces.search import prominence
from lib.recognition.embedder import Embedder, check_fingerprint, extraction_settings, load_embedder
from lib.recognition.onnx_model import OnnxInput
from lib.storage import read_bytes

Picture = str | Path | Image.Image | np.ndarray
"""A path, a URL, a Pillow image, or uint8 RGB pixels [H, W, 3]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Face:
    """One face of a photo. Coordinates are pixels of the upright photo; the centre of the first pixel is at 0."""

    box_4: np.ndarray
    """x0 y0 x1 y1, float32."""
    landmarks_52: np.ndarray
    """x y of left eye, right eye, nose, mouth left, mouth right (as seen when the face is upright), float32."""
    score: float
    """Score of the detector, 0 to 1."""
    crop_HWC: np.ndarray
    """The aligned face, uint8 RGB."""
    embedding_D: np.ndarray
    """float32."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Whether two photos show one person. Its truth value is `same`."""

    same: bool
    distance: float
    """Euclidean distance of the embeddings."""
    threshold: float
    """Distance up to which they count as one person."""

    def __bool__(self) -> bool:
        return self.same


class FaceRecognizer:
    """Finds, aligns and embeds the faces of photos, and compares them.

    Attributes:
        threshold: Euclidean distance at or below which two faces count as one person.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        threshold: float | None = None,
        detector_weights: str | None = None,
        strict: bool = False,
    ) -> None:
        """Prepare the detector. `load` describes the arguments."""
        settings = extraction_settings(embedder, detector_weights)
        next_step = "give the detector's own weights by detector_weights, or train on faces made anew"
        check_fingerprint(fingerprint(settings), embedder, strict=strict, next_step=next_step)
        self.threshold = embedder.threshold if threshold is None else threshold
        self._embedder = embedder
        self._extractor = FaceExtractor(settings)

    @classmethod
    def load(
        cls,
        url: str | Path,
        *,
        threshold: float | None = None,
        detector_weights: str | None = None,
        onnx: OnnxInput | None = None,
        device: str = "cpu",
        flip: bool | None = None,
        strict: bool = False,
    ) -> "FaceRecognizer":
        """Return the recognizer of a model.

        Args:
            url: a model folder, a run folder with one in it, or an .onnx file; local or `s3://…`.
            threshold: Euclidean distance to use instead of the one kept in the model.
            detector_weights: weights file of the detector that made the model's faces, unless a package holds them.
            onnx: input of an ONNX file from elsewhere.
            device: `cpu` or `cuda`.
            flip: whether to add the embedding of the mirror image. None leaves it to the model.
            strict: refuse a model if its training faces were made in another way than here, instead of warning.

        Raises:
            UserError: no such model, or a damaged one; with `strict`, one whose fingerprint differs.
        """
        embedder = load_embedder(str(url), onnx, device=device, flip=flip)
        return cls(embedder, threshold=threshold, detector_weights=detector_weights, strict=strict)

    def faces(self, picture: Picture) -> list[Face]:
        """Return the faces of a photo, the most prominent first: large, near the middle, with a high score.

        Raises:
            UserError: the photo is not there or cannot be read.
        """
        settings = self._extractor.settings
        try:
            photo = _photo(picture, max_pixels=int(settings.max_megapixels * 1e6))
            found = self._extractor.find(photo)
            order = np.argsort(-prominence(found, photo.width, photo.height, settings.min_score), kind="stable")
            rows = [self._extractor.face_row(photo, found, int(index)) for index in order]
        except BadPhotoError as bad:
            raise UserError(f"{_named(picture)} is no photo that can be used: {bad}") from bad
        rows = [row for row in rows if row["status"] == table.ALIGNED]
        if not rows:
            return []
        crops_NHWC = np.stack([decoded_crop(row["crop"]) for row in rows])
        embeddings_ND = self._embedder.embed(crops_NHWC)
        return [_face(row, *pair) for row, pair in zip(rows, zip(crops_NHWC, embeddings_ND, strict=True), strict=True)]

    def verify(self, a: Picture | Face, b: Picture | Face) -> Verification:
        """Return whether two photos, or two faces of `faces`, show one person.

        Raises:
            UserError: the model has no threshold, or as `distance` does.
        """
        if self.threshold is None:
            raise UserError(
                f"{self._embedder.url!r} has no threshold yet: choose one with jobs/evaluate.py --model, or give "
                "FaceRecognizer.load(…, threshold=…)"
            )
        distance = self.distance(a, b)
        return Verification(same=distance <= self.threshold, distance=distance, threshold=self.threshold)

    def distance(self, a: Picture | Face, b: Picture | Face) -> float:
        """Return the Euclidean distance of the embeddings of two photos, or of two faces.

        Raises:
            UserError: a photo has no face, or more than one, so that it is unclear which is meant.
        """
        first_D, second_D = (self._only_face(each).embedding_D for each in (a, b))
        return float(np.linalg.norm(first_D - second_D))

    def _only_face(self, picture: Picture | Face) -> Face:
        if isinstance(picture, Face):
            return picture
        found = self.faces(picture)
        if not found:
            raise UserError(f"no face was found in {_named(picture)}: give a photo in which one is larger and clearer")
        if len(found) > 1:
            raise UserError(
                f"{len(found)} faces were found in {_named(picture)}: say which one is meant by giving that one of "
                "faces(photo), the most prominent of which comes first"
            )
        return found[0]


def decoded_crop(crop: bytes) -> np.ndarray:
    """Return the pixels, [H, W, 3] uint8 RGB, of a crop of the faces table.

    Raises:
        UserError: it is no picture.
    """
    pixels = cv2.imdecode(np.frombuffer(crop, np.uint8), cv2.IMREAD_COLOR_RGB) if crop else None
    if pixels is None:
        raise UserError("a crop of the faces table is no picture: make the table again with jobs/preprocess.py")
    return pixels


def _face(row: dict[str, Any], crop_HWC: np.ndarray, embedding_D: np.ndarray) -> Face:
    landmarks_52 = row["landmarks"].reshape(5, 2)
    return Face(
        box_4=row["box"], landmarks_52=landmarks_52, score=row["score"], crop_HWC=crop_HWC, embedding_D=embedding_D
    )


def _photo(picture: Picture, *, max_pixels: int) -> Photo:
    if isinstance(picture, str | Path):
        return Photo(read_bytes(str(picture), MAX_PHOTO_BYTES + 1), max_pixels=max_pixels)
    if isinstance(picture, Image.Image):
        picture = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise UserError(f"{_named(picture)} is no photo: uint8 RGB of shape [H, W, 3], a path, or a Pillow image is")
    return Photo.of_pixels(np.ascontiguousarray(picture[:, :, ::-1]), max_pixels=max_pixels)


def _named(picture: object) -> str:
    if isinstance(picture, str | Path):
        return repr(str(picture))
    kind = f"{picture.dtype} array of shape {picture.shape}" if isinstance(picture, np.ndarray) else ""
    return kind or f"{type(picture).__name__}"
