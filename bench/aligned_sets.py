"""How fast do aligned crops of a RecordIO file become a faces table, and does memory stay flat?

    python -m bench.aligned_sets --images 40000

Writes a `train.rec` of JPEGs of 112 pixels, makes the table by a worker of preprocess in this process, by parts, and
copies the same bytes plainly, in turns, each until it is on the disk. A smaller file before it shows how memory grows.
Listing the file is told apart: it is done once, by the driver. Prints a line of JSON.
"""

import json
import os
import resource
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tyro

from lib.faces.aligned import COPIED_PARTS
from lib.faces.manifest import read_manifest
from lib.faces.part_plan import PartPlan, plan_parts
from lib.faces.photo_flags import PhotoFlags
from lib.faces.photo_parts import part_item
from lib.faces.preprocess_config import PreprocessConfig
from lib.faces.preprocess_worker import PartWorker
from lib.faces.sources.opening import open_source
from lib.faces.sources.source import Source
from lib.threads import mapped

BLOCK_BYTES = 1 << 20
MAGIC = 0xCED7230A


@dataclass(frozen=True, kw_only=True)
class Flags:
    """How much."""

    images: int = 40_000
    turns: int = 3


def write_records(path: Path, images: int) -> None:
    """Write crops of people with 20 images each; as many different pictures as it takes for caches not to matter."""
    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(200):
        rough = rng.integers(0, 256, (14, 14, 3), np.uint8)
        pixels = cv2.resize(rough, (112, 112), interpolation=cv2.INTER_CUBIC)
        pixels = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        jpegs.append(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes())
    with path.open("wb") as file:
        for number in range(images):
            data = struct.pack("<IfQQ", 0, float(number // 20), number, 0) + jpegs[number % len(jpegs)]
            file.write(struct.pack("<II", MAGIC, len(data)) + data + b"\0" * (-len(data) % 4))


def seconds_of(work: Callable[[], object], written: Path) -> tuple[float, float]:
    """Return the seconds until what the work has written is on the disk, and the CPU seconds of this process."""
    began, cpu = time.perf_counter(), time.process_time()
    work()
    for path in [written] if written.is_file() else [path for path in written.rglob("*") if path.is_file()]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - began, time.process_time() - cpu


def copy(source: Path, target: Path) -> None:
    """Read and write a file in order."""
    with source.open("rb") as read, target.open("wb") as write:
        while block := read.read(BLOCK_BYTES):
            write.write(block)


def peak_mb() -> float:
    """Return the largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def planned(config: PreprocessConfig, source: Source, folder: Path) -> PartPlan:
    """List the file and plan the parts, as the driver does."""
    manifest = read_manifest(source, None, splits=config.splits(), identities_required=True)
    return plan_parts(manifest, config.content()).stored(str(folder / "plan"), "digest")


def measure(folder: Path, images: int, turns: int) -> dict[str, Any]:
    """Return what a file of so many images takes."""
    records = folder / "set" / "train.rec"
    records.parent.mkdir(parents=True)
    write_records(records, images)
    config = PreprocessConfig(data=str(folder), photos=str(records.parent), reading=PhotoFlags(aligned="arcface-112"))
    source = open_source(str(records.parent))
    began = time.process_time()
    plan = planned(config, source, folder)
    listing = time.process_time() - began
    copies, tables = [], []
    for turn in range(turns):
        faces, copied = folder / f"faces {turn}", folder / f"copy {turn}"
        worker = PartWorker(replace(config, faces=str(faces)), source, config.fingerprint(), num_cpus=1, use_gpu=False)
        copies.append(seconds_of(partial(copy, records, copied), copied))
        tables.append(seconds_of(partial(make_all, worker, plan), faces))
    (copy_s, copy_cpu_s), (table_s, table_cpu_s) = (np.median(each, axis=0).tolist() for each in (copies, tables))
    return {
        "images": images,
        "megabytes": round(records.stat().st_size / 1e6),
        "parts": len(plan.parts),
        "listing_cpu_s": round(listing, 2),
        "copy_s": round(copy_s, 3),
        "table_s": round(table_s, 3),
        "of_the_copys_speed": round(statistics.median(c[0] / t[0] for c, t in zip(copies, tables, strict=True)), 2),
        "copy_cpu_s": round(copy_cpu_s, 3),
        "table_cpu_s": round(table_cpu_s, 3),
        "images_per_cpu_s": round(images / table_cpu_s),
        "peak_mb": round(peak_mb()),
    }


def make_all(worker: PartWorker, plan: PartPlan) -> None:
    """Make the parts, as many at once as the job does."""
    with mapped(lambda part: worker(part_item(plan, part)), plan.parts, num_threads=COPIED_PARTS) as made:
        for done in made:
            assert not done["failure"]


def main() -> None:
    """Measure a quarter of the images, then all, and print."""
    flags = tyro.cli(Flags, description=__doc__)
    with tempfile.TemporaryDirectory(prefix="aligned sets ") as scratch:
        figures = [
            measure(Path(scratch) / str(images), images, flags.turns) for images in (flags.images // 4, flags.images)
        ]
    print(json.dumps({"bench": "aligned_sets", "figures": figures}))


if __name__ == "__main__":
    main()
