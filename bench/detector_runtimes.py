"""Which runtime detects fastest on one CPU thread and finds the same faces: ONNX Runtime, or OpenVINO in f32 or bf16?

All run the same ONNX file on the same pictures in turns; "lib" is what the job runs. Time is the process's own CPU
time, so that others on the machine count little. On real photos ($BENCH_DATA), or on drawn people. The last line is
JSON.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import openvino
from retinaface.weights import WEIGHTS

from bench.inputs import bench_data, drawn
from lib.faces.detection import Detections, Detector, RetinaFace, load_detector
from lib.faces.detector_runtimes import Network, Outputs
from lib.faces.extraction import ExtractionSettings
from lib.faces.images import BadPhotoError, Photo

NUM_PHOTOS_EACH = 150
NUM_ROUNDS = 3
MEAN_BGR = np.array([104, 117, 123], np.float32)
REFERENCE = "onnxruntime f32"


def prepared(pictures_BHW3: np.ndarray) -> np.ndarray:
    """Return the pictures as the network takes them, [B, 3, H, W] float32."""
    return np.ascontiguousarray((pictures_BHW3 - MEAN_BGR).transpose(0, 3, 1, 2))


def onnxruntime_network() -> Network:
    """Return the network under ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(bytes(WEIGHTS), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(pictures_BHW3: np.ndarray) -> Outputs:
        offsets, probabilities, points = session.run(None, {name: prepared(pictures_BHW3)})
        return offsets, probabilities, points

    return run


def openvino_network(precision: str) -> Network:
    """Return the network under OpenVINO, `f32` or `bf16`."""
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": "1", "INFERENCE_PRECISION_HINT": precision}
    request = core.compile_model(core.read_model(model=bytes(WEIGHTS)), "CPU", settings).create_infer_request()

    def run(pictures_BHW3: np.ndarray) -> Outputs:
        request.infer({0: prepared(pictures_BHW3)})
        offsets, probabilities, points = (request.get_output_tensor(i).data for i in range(3))
        return offsets, probabilities, points

    return run


def pictures(folders: list[Path]) -> list[np.ndarray]:
    """Return photos from all over each folder at the size at which the job searches them for faces."""
    long_side = ExtractionSettings().detection_size
    found = []
    for folder in folders:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in paths[:: -(-len(paths) // NUM_PHOTOS_EACH)]:
            try:
                pixels = Photo(path.read_bytes(), max_pixels=10**8).pixels()
            except BadPhotoError:
                continue  # drawn photos hold broken ones on purpose
            factor = min(1.0, long_side / max(pixels.shape[:2]))
            found.append(cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA))
    return found


def landmark_distances(ours: list[Detections], theirs: list[Detections]) -> list[float]:
    """Return the mean distance of the best face's landmarks in eye distances, for each picture where both found one."""
    distances = []
    for one, other in zip(ours, theirs, strict=True):
        if len(one) and len(other):
            best = np.argmin(np.abs(one.boxes_N4 - other.boxes_N4[0]).sum(axis=1))
            points_52, true_52 = one.landmarks_N52[best], other.landmarks_N52[0]
            eye_distance = np.linalg.norm(true_52[1] - true_52[0])
            distances.append(float(np.linalg.norm(points_52 - true_52, axis=1).mean() / eye_distance))
    return distances


def compare(detectors: dict[str, Detector], photos: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """Return for each detector its median milliseconds a picture, the faces it finds, and where it puts landmarks."""
    found: dict[str, list[Detections]] = {name: [] for name in detectors}
    milliseconds: dict[str, list[list[float]]] = {name: [] for name in detectors}
    for picture in photos:
        for name, detector in detectors.items():
            # The first of a size compiles kernels for it: it counts for the faces, not for the time.
            found[name] += detector.detect([picture])
            times = []
            for _ in range(NUM_ROUNDS):
                start = time.process_time()
                detector.detect([picture])
                times.append((time.process_time() - start) * 1e3)
            milliseconds[name].append(times)
    min_score = ExtractionSettings().min_score
    figures = {}
    for name in detectors:
        distances = landmark_distances(found[name], found[REFERENCE])
        figures[name] = {
            "ms_a_picture": round(statistics.median(map(min, milliseconds[name])), 2),
            "pictures_with_face": sum(bool((faces.scores_N >= min_score).any()) for faces in found[name]),
            "faces": int(sum((faces.scores_N >= min_score).sum() for faces in found[name])),
            "landmarks_median": round(statistics.median(distances), 5),
            "landmarks_p99": round(float(np.percentile(distances, 99)), 4),
        }
    return figures


def main() -> None:
    """Measure and print."""
    cv2.setNumThreads(1)
    real = bench_data()
    detectors: dict[str, Detector] = {
        REFERENCE: RetinaFace(onnxruntime_network(), ""),
        "openvino f32": RetinaFace(openvino_network("f32"), ""),
        "openvino bf16": RetinaFace(openvino_network("bf16"), ""),
        "lib": load_detector("retinaface"),
    }
    with tempfile.TemporaryDirectory() as scratch:
        data = [real / "celeba", real / "lfw"] if real else [drawn(Path(scratch), 30, 10)]
        photos = pictures([folder / "photos" for folder in data])
    figures = compare(detectors, photos)
    for name, values in figures.items():
        print(f"{name:16} {values}")
    print(json.dumps({"bench": "detector_runtimes", "pictures": len(photos), "runtimes": figures}))


if __name__ == "__main__":
    main()
