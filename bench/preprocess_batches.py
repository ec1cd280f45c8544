"""Whether photos become the same faces in batches on a device as one by one on a CPU, and how fast each stage is.

    python -m bench.preprocess_batches [--device cuda] [--photos FOLDER …]

Prints one line of JSON: how far statuses, landmarks and crops agree, seconds of each stage a photo, and photos/s of one
thread and of several. Photos are those of `BENCH_DATA`, drawn ones else.
"""

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from bench.inputs import drawn
from lib.faces.batch_extraction import BatchExtractor
from lib.faces.extraction import ExtractionSettings, FaceExtractor
from lib.faces.table import ALIGNED

BATCH = 128


def agreement(ours: list[list[dict[str, Any]]], reference: list[list[dict[str, Any]]]) -> dict[str, float]:
    """Return how far the rows of the same photos agree."""
    pairs = [(a, b) for mine, theirs in zip(ours, reference, strict=True) for a, b in zip(mine, theirs, strict=False)]
    both = [(a, b) for a, b in pairs if a["status"] == b["status"] == ALIGNED]
    moved, grey = [], []
    for a, b in both:
        ours_52, theirs_52 = a["landmarks"].reshape(5, 2), b["landmarks"].reshape(5, 2)
        eyes = np.linalg.norm(theirs_52[1] - theirs_52[0])
        moved.append(float(np.linalg.norm(ours_52 - theirs_52, axis=1).mean() / eyes))
        crops = [cv2.imdecode(np.frombuffer(row["crop"], np.uint8), cv2.IMREAD_COLOR) for row in (a, b)]
        grey.append(float(cv2.absdiff(*crops).mean()))
    same = sum(a["status"] == b["status"] for a, b in pairs)
    return {
        "photos": len(ours),
        "aligned": len(both),
        "same_status": round(same / len(pairs), 5),
        "landmarks_median": round(statistics.median(moved), 4),
        "landmarks_p99": round(float(np.quantile(moved, 0.99)), 4),
        "grey_levels_mean": round(statistics.mean(grey), 3),
        "grey_levels_p99": round(float(np.quantile(grey, 0.99)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--photos", nargs="*", default=[])
    parser.add_argument("--every", type=int, default=1, help="take every n-th photo")
    parser.add_argument("--repeat", type=int, default=1, help="times that the photos are gone through for the speed")
    parser.add_argument("--threads", type=int, default=3)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(name) for name in options.photos] or [drawn(Path(folder), 60, 5) / "photos"]
        names = [path for each in folders for path in sorted(each.rglob("*")) if path.is_file()][:: options.every]
        data = [path.read_bytes() for path in names]
    settings = ExtractionSettings()
    extractor = BatchExtractor(settings, torch.device(options.device))
    batches = [data[start : start + BATCH] for start in range(0, len(data), BATCH)]
    ours = [rows for batch in batches for rows in extractor.rows(batch)]
    one_by_one = FaceExtractor(settings)
    began = time.perf_counter()
    reference = [one_by_one.rows(each) for each in data]
    reference_s = time.perf_counter() - began
    figures: dict[str, Any] = {"bench": "preprocess_batches", "device": extractor.made_on}
    figures |= agreement(ours, reference)
    others = extractor.rows(list(reversed(batches[0])))[::-1]
    alone = extractor.rows(batches[0][:1])
    figures["same_among_others"] = _same(others, ours[: len(others)])
    figures["same_alone"] = _same(alone, ours[:1])
    figures["one_by_one_per_s"] = round(len(data) / reference_s, 1)

    many = batches * options.repeat
    num_photos = sum(len(batch) for batch in many)
    extractor.seconds.clear()
    began = time.perf_counter()
    for batch in many:
        extractor.rows(batch)
    figures["one_thread_per_s"] = round(num_photos / (time.perf_counter() - began), 1)
    figures["us_a_photo"] = {stage: round(1e6 * seconds / num_photos) for stage, seconds in extractor.seconds.items()}
    with ThreadPoolExecutor(options.threads) as pool:
        began = time.perf_counter()
        list(pool.map(extractor.rows, many))
    figures[f"{options.threads}_threads_per_s"] = round(num_photos / (time.perf_counter() - began), 1)
    print(json.dumps(figures))


def _same(ours: list[list[dict[str, Any]]], theirs: list[list[dict[str, Any]]]) -> bool:
    """Return whether rows are the same, bit for bit."""
    return all(
        a["status"] == b["status"] and a.get("crop") == b.get("crop")
        for mine, others in zip(ours, theirs, strict=True)
        for a, b in zip(mine, others, strict=True)
    )


if __name__ == "__main__":
    main()
