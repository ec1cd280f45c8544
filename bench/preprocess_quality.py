"""How well faces are found and aligned: recall, landmarks against batch-face's, eyes of the crops, bytes.

On real photos ($BENCH_DATA), or on drawn people against their true landmarks. Prints one line of JSON last.
"""

import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq

from bench.inputs import WEIGHTS_NAME, bench_data, drawn, run_job
from lib.faces import table
from lib.faces.detection import Detector, load_detector
from lib.faces.extraction import ExtractionSettings, FaceExtractor
from lib.faces.images import Photo
from lib.faces.search import most_prominent

NUM_COMPARED = 150


def parts(faces: Path) -> list[str]:
    """Return the Parquet files of a faces table."""
    return [str(path) for path in sorted(faces.glob("split=*/part-*.parquet"))]


def eye_errors(landmarks: Iterable[np.ndarray], side: int, eye_height: float) -> dict[str, float]:
    """Return median roll in degrees, and distance of the eye midpoint from its place in shares of the side."""
    points = np.array([np.asarray(face).reshape(5, 2) for face in landmarks])
    across = points[:, 1] - points[:, 0]
    place = np.array([0.5, eye_height]) * side - 0.5
    offsets = np.linalg.norm(points[:, :2].mean(axis=1) - place, axis=1) / side
    return {
        "median_roll_deg": round(float(np.median(np.abs(np.degrees(np.arctan2(across[:, 1], across[:, 0]))))), 2),
        "median_eye_offset": round(float(np.median(offsets)), 4),
        "p95_eye_offset": round(float(np.percentile(offsets, 95)), 4),
    }


def faces_figures(faces: Path) -> dict[str, Any]:
    """Return recall, bytes and the eyes found again in the crops of a faces table."""
    rows = pq.read_table(parts(faces), columns=["status", "crop"], partitioning=None)
    crops = [crop for crop in rows["crop"].to_pylist() if crop is not None]
    card = json.loads((faces / "card.json").read_text())
    extractor = FaceExtractor(ExtractionSettings())
    again = [extractor.find(Photo(crop, max_pixels=10**7)) for crop in crops[:: max(1, len(crops) // 1000)]]
    landmarks = [found.landmarks_N52[0] for found in again if len(found)]
    return {
        "photos": len(rows),
        "recall": round(rows["status"].to_pylist().count(table.ALIGNED) / len(rows), 5),
        "bytes_ratio": round(card["bytes_after"] / card["bytes_before"], 3),
        **eye_errors(landmarks, 240, 0.4),
    }


def against_batch_face(photos: list[Path], weights: Path) -> dict[str, Any]:
    """Return the median landmark distance from batch-face's in eye distances, and milliseconds a photo of each."""
    cv2.setNumThreads(1)
    extractor = FaceExtractor(ExtractionSettings())
    detectors: dict[str, Detector] = {
        "retinaface": load_detector("retinaface"),
        "batch-face": load_detector("batch-face", str(weights)),
    }
    distances = []
    seconds = dict.fromkeys(detectors, 0.0)
    for path in photos:
        photo = Photo(path.read_bytes(), max_pixels=10**8)
        photo.pixels()
        for name, detector in detectors.items():
            start = time.perf_counter()
            found = FaceExtractor(ExtractionSettings(), detector.detect).find(photo)
            seconds[name] += time.perf_counter() - start
        (row,) = extractor.rows(path.read_bytes())
        if row["status"] == table.ALIGNED and len(found):  # what batch-face, the last, has found
            theirs = found.landmarks_N52[most_prominent(found, photo.width, photo.height, 0.9)]
            distance = np.linalg.norm(row["landmarks"].reshape(5, 2) - theirs, axis=1).mean()
            distances.append(distance / np.linalg.norm(theirs[1] - theirs[0]))
    return {
        "median_landmark_distance": round(float(np.median(distances)), 4),
        "ms_a_photo": {name: round(total / len(photos) * 1e3, 1) for name, total in seconds.items()},
    }


def against_truth(data: Path, faces: Path) -> dict[str, float]:
    """Return where the true eyes of drawn people lie in their crops."""
    from lib.faces.alignment import Alignment, alignment_matrix

    truth = {
        row["photo"]: np.array(row["landmarks"]).reshape(5, 2)
        for row in pq.read_table(data / "landmarks.parquet").to_pylist()
        if row["kind"] == "one"
    }
    placed = []
    for row in pq.read_table(parts(faces), columns=["photo", "box", "landmarks"], partitioning=None).to_pylist():
        if row["box"] is not None and row["photo"] in truth:
            box, landmarks = np.array(row["box"]), np.array(row["landmarks"]).reshape(5, 2)
            matrix = alignment_matrix(box, landmarks, Alignment())
            placed.append(truth[row["photo"]] @ matrix[:, :2].T + matrix[:, 2])
    return eye_errors(placed, 240, 0.4)


def main() -> None:
    """Measure and print."""
    real = bench_data()
    result: dict[str, Any] = {"bench": "preprocess_quality"}
    with tempfile.TemporaryDirectory() as scratch:
        sample = drawn(Path(scratch) / "drawn", 60, 10)
        run_job("preprocess.py", "--data", str(sample))
        result["drawn"] = {**faces_figures(sample / "faces"), "against_truth": against_truth(sample, sample / "faces")}
        for name in ("celeba", "lfw") if real else ():
            assert real is not None
            faces = Path(scratch) / name
            run_job("preprocess.py", "--data", str(real / name), "--faces", str(faces))
            photos = sorted(path for path in (real / name / "photos").rglob("*") if path.is_file())
            some = photos[:: max(1, len(photos) // NUM_COMPARED)]
            result[name] = {**faces_figures(faces), **against_batch_face(some, real / "weights" / WEIGHTS_NAME)}
    for name, figures in result.items():
        print(f"{name:10} {figures}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
