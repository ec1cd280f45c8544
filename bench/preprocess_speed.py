"""Photos per second of the whole preprocess job, against the sum of its stages and against the original's way.

Prints a table and, last, one line of JSON. All is measured in this one run, in alternation.
"""

import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2

from bench import original_way
from bench.inputs import WEIGHTS_NAME, bench_data, drawn, job_command, job_environment, run_job
from lib.faces.alignment import Alignment, align
from lib.faces.detection import load_detector
from lib.faces.extraction import JPEG_QUALITY, ExtractionSettings, FaceExtractor
from lib.faces.images import REDUCTIONS, BadPhotoError, Photo, to_jpeg
from lib.faces.search import most_prominent

NUM_ROUNDS = 3
NUM_ORIGINAL_PHOTOS = 60
STAGES = ("decode", "detect", "second_look", "warp", "encode")


def stage_seconds(photos: list[Path]) -> dict[str, float]:
    """Return seconds a photo of each stage, reading with the first, each alone on one thread.

    Give it the job's own photos, all of them: a new size costs the detector tens of milliseconds once, so that a few
    photos of many sizes would seem slower than many.
    """
    cv2.setNumThreads(1)
    settings = ExtractionSettings()
    detector = load_detector(settings.detector)
    extractor = FaceExtractor(settings, detector.detect)
    clock, seconds = time.perf_counter, dict.fromkeys(STAGES, 0.0)
    for path in photos:
        start = clock()
        try:
            photo = Photo(path.read_bytes(), max_pixels=10**8)
            factor = max(1.0, max(photo.width, photo.height) / settings.detection_size)
            photo.pixels(next(n for n in REDUCTIONS if n <= factor))
        except BadPhotoError:  # some drawn ones are broken on purpose
            continue
        seconds["decode"] += clock() - start
        start = clock()
        found = extractor.find(photo)
        seconds["detect"] += clock() - start
        if not len(found):
            continue
        face = most_prominent(found, photo.width, photo.height, settings.min_score)
        box = found.boxes_N4[face]
        start = clock()
        landmarks = extractor.refined_landmarks(photo, box, found.landmarks_N52[face])
        seconds["second_look"] += clock() - start
        start = clock()
        crop = align(photo, box, landmarks, Alignment())
        seconds["warp"] += clock() - start
        start = clock()
        to_jpeg(crop, JPEG_QUALITY)
        seconds["encode"] += clock() - start
    return {stage: total / len(photos) for stage, total in seconds.items()}


def rate_at_once(photos: list[Path], num_cores: int) -> float:
    """Return photos/s of the same stages in a plain process a core, all at once: what the cores leave each other."""
    with ProcessPoolExecutor(num_cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        each = pool.map(stage_seconds, [photos[core::num_cores] for core in range(num_cores)])
        return sum(1 / sum(stages.values()) for stages in each)


def seconds_to_first_photos(data: str, faces: str) -> float:
    """Return seconds from the command to the first part of photos done."""
    start = time.perf_counter()
    process = subprocess.Popen(
        job_command("preprocess.py", "--data", data, "--faces", faces),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=job_environment(),
    )
    while process.poll() is None and not list(Path(faces).glob("split=*/part-*.parquet")):
        time.sleep(0.05)
    seconds = time.perf_counter() - start
    process.wait()
    return seconds


def main() -> None:
    """Measure and print."""
    real = bench_data()
    with tempfile.TemporaryDirectory() as scratch:
        data = real / "celeba" if real else drawn(Path(scratch) / "drawn", 60, 20)
        photos = sorted((data / "photos").iterdir())
        photos = [p for p in photos if p.stat().st_size > 100 and re.search(r"\.(jpe?g|png|webp|bmp)$", p.name)]
        faces = str(Path(scratch) / "faces")
        num_cores = os.cpu_count() or 1
        rates: dict[str, list[float]] = {"job": [], "limit": [], "limit_at_once": [], "original": []}
        stages: dict[str, float] = {}
        for _ in range(NUM_ROUNDS):
            stages = stage_seconds(photos)
            rates["limit"].append(num_cores / sum(stages.values()))
            rates["limit_at_once"].append(rate_at_once(photos, num_cores))
            rates["job"].append(run_job("preprocess.py", "--data", str(data), "--faces", faces)["photos_per_s"])
            shutil.rmtree(faces)
            if real:
                some = photos[:: max(1, len(photos) // NUM_ORIGINAL_PHOTOS)]
                rates["original"].append(original_way.run(some, real / "weights" / WEIGHTS_NAME, Path(scratch)))
        first_s = seconds_to_first_photos(str(data), faces)
    medians = {name: statistics.median(values) for name, values in rates.items() if values}
    result = {
        "bench": "preprocess_speed",
        "photos": len(photos),
        "cores": num_cores,
        "ms_a_photo": {stage: round(seconds * 1e3, 2) for stage, seconds in stages.items()},
        "photos_per_s": {name: round(value, 1) for name, value in medians.items()},
        "job_to_limit": round(medians["job"] / medians["limit"], 3),
        "job_to_limit_at_once": round(medians["job"] / medians["limit_at_once"], 3),
        "job_to_original": round(medians["job"] / medians["original"], 1) if real else None,
        "seconds_to_first_photos": round(first_s, 1),
    }
    for name, value in result.items():
        print(f"{name:26} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
