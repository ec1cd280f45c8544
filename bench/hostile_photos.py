"""Damaged and hostile photos through the whole extraction: what becomes of them, and what the worst costs.

Drawn people in every format that is read are mutated, by seed and number alone: bytes flipped, lengths and sizes in
headers replaced, pieces cut, repeated and taken from other files. Each photo is measured in CPU seconds and in memory
over what the process held before. A process that dies or hangs counts, and the next one goes on behind the photo.
`--keep FOLDER` writes the photos there that cost too much. Prints one line of JSON last.
"""

import argparse
import faulthandler
import io
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from bench.inputs import ROOT, job_environment
from lib.faces.extraction import ExtractionSettings, FaceExtractor
from lib.sample.sample_job import SamplePlan, draw_photo

MAX_SECONDS, MAX_MEGABYTES, HUNG_SECONDS = 5.0, 500.0, 120.0

_TELLING = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF)


def originals(seed: int) -> list[bytes]:
    """Return a few drawn people in all formats."""
    plan = SamplePlan(identities=2, photos_per_identity=2, seed=seed)
    pictures = []
    for photo in range(4):
        data, _ = draw_photo(plan, photo)
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        if pixels is not None:
            pictures.append(Image.fromarray(pixels))
            pictures[-1].thumbnail((480, 480))
    return [data for picture in pictures for data in in_all_formats(picture)]


def in_all_formats(picture: Image.Image) -> Iterator[bytes]:
    """Yield one picture in each format, and each kind of it, that is read."""
    tags = Image.Exif()
    tags[0x0112] = 6
    alpha = picture.convert("RGBA")
    alpha.putalpha(picture.getchannel("G"))
    moving: dict[str, Any] = {"save_all": True, "append_images": [picture.rotate(180)]}
    kinds: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("JPEG", picture, {"quality": 90, "exif": tags}),
        ("JPEG", picture, {"progressive": True}),
        ("JPEG", picture, {"progressive": True, "subsampling": 0, "exif": tags}),
        ("JPEG", picture, {"restart_marker_rows": 1}),
        ("JPEG", picture.convert("L"), {}),
        ("JPEG", picture.convert("CMYK"), {"progressive": True}),
        ("MPO", picture, moving),
        ("PNG", picture, {"exif": tags}),
        ("PNG", alpha, {}),
        ("PNG", picture.quantize(64), {}),
        ("PNG", picture, moving),
        ("WEBP", picture, {"exif": tags}),
        ("WEBP", picture, {"lossless": True}),
        ("WEBP", alpha, {}),
        ("WEBP", picture, moving),
        ("BMP", picture, {}),
        ("BMP", picture.quantize(64), {}),
        ("GIF", picture, {}),
        ("GIF", picture, moving),
        ("TIFF", picture, {"tiffinfo": {0x0112: 6}}),
        ("TIFF", picture, {"compression": "tiff_lzw"}),
        ("TIFF", picture, {"compression": "tiff_adobe_deflate"}),
        ("TIFF", picture, {"compression": "jpeg"}),
        ("TIFF", picture.convert("1"), {"compression": "group4"}),
        ("AVIF", picture, {"speed": 10, "exif": tags}),
        ("AVIF", alpha, {"speed": 10, "subsampling": "4:4:4"}),
    ]
    for picture_format, shown, options in kinds:
        file = io.BytesIO()
        shown.save(file, picture_format, **options)
        yield file.getvalue()
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    yield cv2.imencode(".png", deep)[1].tobytes()


def mutated(files: list[bytes], seed: int, number: int) -> bytes:
    """Return one photo, damaged in one place or some, mostly near its beginning."""
    rng = np.random.default_rng([seed, number])
    data = bytearray(files[rng.integers(len(files))])
    for _ in range(rng.geometric(0.4)):
        if not data:
            break
        place = int(rng.integers(min(len(data), rng.choice([32, 400, len(data)]))))
        length = int(rng.choice([1, 2, 4, 16, 256, 4096]))
        how = rng.integers(8)
        if how == 0:
            data[place] ^= 1 << rng.integers(8)
        elif how == 1:
            data[place : place + length] = rng.bytes(length)
        elif how in (2, 3):
            width = int(rng.choice([1, 2, 4]))
            value = int(rng.choice(_TELLING)) % 256**width
            data[place : place + width] = value.to_bytes(width, str(rng.choice(["big", "little"])))
        elif how == 4:
            del data[place : place + length]
        elif how == 5:
            data[place:place] = data[place : place + length] * int(rng.choice([1, 2, 50, 2000]))
        elif how == 6:
            other = files[rng.integers(len(files))]
            start = int(rng.integers(len(other)))
            data[place:place] = other[start : start + int(rng.choice([16, 1000, len(other)]))]
        elif rng.integers(2):
            del data[int(rng.integers(len(data))) :]
        else:
            data += rng.bytes(length) if rng.integers(2) else bytes(length)
    return bytes(data)


def work(first: int, last: int, seed: int) -> None:
    """Read the photos from `first` to `last`, and print a line when each begins and one when it ends."""
    files, extractor = originals(seed), FaceExtractor(ExtractionSettings())
    for data in files:
        extractor.rows(data)  # what is loaded at first use is no photo's
    for number in range(first, last):
        data = mutated(files, seed, number)
        print(json.dumps({"number": number}), flush=True)
        faulthandler.dump_traceback_later(HUNG_SECONDS, exit=True)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before_mb, started = memory_megabytes("VmRSS"), time.process_time()
        rows = extractor.rows(data)
        seconds, peak_mb = time.process_time() - started, memory_megabytes("VmHWM") - before_mb
        result = {"status": rows[0]["status"], "seconds": round(seconds, 3), "megabytes": round(peak_mb, 1)}
        print(json.dumps({"number": number, **result}), flush=True)


def memory_megabytes(name: str) -> float:
    """Return an entry of this process's status, such as its resident memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


def results(number_of_photos: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield what became of each photo, with a new process after each that dies or hangs."""
    first = 0
    while first < number_of_photos:
        command = [sys.executable, "-m", "bench.hostile_photos", "--photos", str(number_of_photos), "--seed", str(seed)]
        command += ["--worker-from", str(first)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, env=job_environment(), text=True
        ) as process:
            assert process.stdout is not None
            begun = -1
            for line in process.stdout:
                result = json.loads(line)
                begun = result["number"]
                if "status" in result:
                    first = begun + 1
                    yield result
        if first < number_of_photos:
            assert begun == first, "the process ended before it read a photo"
            yield {"number": first, "status": "crash", "seconds": 0.0, "megabytes": 0.0}
            first += 1


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--worker-from", type=int)
    given = parser.parse_args()
    if given.worker_from is not None:
        work(given.worker_from, given.photos, given.seed)
        return
    statuses, costly, slowest, largest = Counter[str](), [], {"seconds": 0.0}, {"megabytes": 0.0}
    too_slow = too_large = 0
    for result in results(given.photos, given.seed):
        statuses[result["status"]] += 1
        too_slow += result["seconds"] > MAX_SECONDS
        too_large += result["megabytes"] > MAX_MEGABYTES
        slowest = max(slowest, result, key=lambda each: each["seconds"])
        largest = max(largest, result, key=lambda each: each["megabytes"])
        if result["status"] == "crash" or result["seconds"] > MAX_SECONDS or result["megabytes"] > MAX_MEGABYTES:
            costly.append(result["number"])
    if given.keep:
        given.keep.mkdir(parents=True, exist_ok=True)
        files = originals(given.seed)
        for number in {*costly, slowest.get("number", 0), largest.get("number", 0)}:
            (given.keep / f"{given.seed}-{number}").write_bytes(mutated(files, given.seed, int(number)))
    figures = {"photos": given.photos, "seed": given.seed, "statuses": dict(statuses), "crashes": statuses["crash"]}
    figures |= {"over_5_s": too_slow, "over_500_mb": too_large, "slowest": slowest, "largest": largest}
    print(json.dumps({"bench": "hostile_photos", **figures}))


if __name__ == "__main__":
    main()
