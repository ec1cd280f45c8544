"""What becomes of photos that lie or stand on their head, and what the care for them costs upright ones.

Every photo is turned losslessly by 90, 180 and 270 degrees. Its crop is `upright` where the eyes lie within 30 degrees
of where they lie in the photo as it is, `wrong` where they do not, else its status counts. Photos without a face are
made by painting over the faces. On real photos ($BENCH_DATA), or on drawn ones. Prints one line of JSON last.
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from bench.inputs import bench_data, drawn
from lib.faces import extraction, table
from lib.faces.extraction import ExtractionSettings, FaceExtractor
from lib.faces.images import BadPhotoError, Photo
from lib.faces.plausibility import roll_deg
from lib.faces.search import Look

_UPRIGHT_DEG = 30
_MAX_PIXELS = 10**8


class CountingExtractor(FaceExtractor):
    """Counts the turned looks and their seconds."""

    looks = 0
    seconds = 0.0

    def _seen(self, photo: Photo, look: Look) -> Any:
        start = time.perf_counter()
        found = super()._seen(photo, look)
        if look.quarter_turns:
            self.looks += 1
            self.seconds += time.perf_counter() - start
        return found


def row_of(extractor: FaceExtractor, pixels: np.ndarray) -> dict[str, Any]:
    """Return the row of a photo."""
    photo = Photo.of_pixels(np.ascontiguousarray(pixels), max_pixels=_MAX_PIXELS)
    return extraction.rows_without_crops(extractor.find(photo), photo.width, photo.height, extractor.settings)[0]


def fate(row: dict[str, Any], upright: dict[str, Any], quarter_turns: int) -> str:
    """Return what became of a turned photo."""
    if row["status"] != table.ALIGNED:
        return str(row["status"])
    rolls = [roll_deg(each["landmarks"].reshape(5, 2)) for each in (row, upright)]
    off = (rolls[0] + 90 * quarter_turns - rolls[1] + 180) % 360 - 180
    return "upright" if abs(off) < _UPRIGHT_DEG else "wrong"


def painted_over(pixels: np.ndarray, row: dict[str, Any]) -> np.ndarray:
    """Return the photo with grey where the face is, and half as far around it."""
    x0, y0, x1, y1 = row["box"]
    width, height = x1 - x0, y1 - y0
    corner, other = (int(x0 - width / 2), int(y0 - height / 2)), (int(x1 + width / 2), int(y1 + height / 2))
    return cv2.rectangle(pixels.copy(), corner, other, (127, 127, 127), -1)


def figures(files: list[Path]) -> dict[str, Any]:
    """Return what became of the photos, upright, turned and without faces, and what turned looks cost upright ones."""
    extractor = CountingExtractor(ExtractionSettings())
    fates: dict[int, Counter[str]] = {turns: Counter() for turns in (1, 2, 3)}
    upright, faceless = Counter[str](), Counter[str]()
    looks, seconds, turned_seconds = 0, 0.0, 0.0
    for file in files:
        try:
            pixels = Photo(file.read_bytes(), max_pixels=_MAX_PIXELS).pixels()
        except BadPhotoError:
            continue
        shrink = min(1.0, 1024 / max(pixels.shape))
        pixels = cv2.resize(pixels, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
        start, extractor.looks, extractor.seconds = time.perf_counter(), 0, 0.0
        row = row_of(extractor, pixels)
        seconds, turned_seconds = seconds + time.perf_counter() - start, turned_seconds + extractor.seconds
        looks += extractor.looks
        upright[row["status"]] += 1
        if row["status"] != table.ALIGNED:
            continue
        for turns, counts in fates.items():
            counts[fate(row_of(extractor, np.rot90(pixels, turns)), row, turns)] += 1
        if row["num_faces"] == 1:
            faceless[row_of(extractor, painted_over(pixels, row))["status"]] += 1
    return {
        "photos": len(files),
        "upright": dict(upright),
        "turned_looks_per_100": round(100 * looks / len(files), 2),
        "share_of_the_search": round(turned_seconds / seconds, 4),
        **{f"turned_by_{90 * turns}": dict(counts) for turns, counts in fates.items()},
        "painted_over": dict(faceless),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=int, default=100, help="of each set")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    cv2.setNumThreads(1)
    real = bench_data()
    result: dict[str, Any] = {"bench": "turned_photos", "seed": given.seed}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: real / name for name in ("celeba", "lfw")} if real else {}
        folders["drawn"] = drawn(Path(scratch) / "drawn", 60, 10)
        for name, folder in folders.items():
            files = sorted(path for path in (folder / "photos").rglob("*") if path.is_file())
            chosen = random.Random(given.seed).sample(files, min(given.photos, len(files)))
            result[name] = figures(chosen)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
