"""Seconds and memory to plan a table of many photos, from their names to the parts: how do they grow?

    python -m bench.planning --photos 20e6 --listed

Names are made up and no file is read, so the listing of a disk or a bucket is not in the figures. Each number of photos
is planned in a process of its own: a 100th, a 10th, and all. With `--listed` a file names the identity of each photo.
Without it the folders are the identities. Prints one line of JSON last.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lib.faces.manifest import read_manifest
from lib.faces.part_plan import plan_parts
from lib.faces.sources.folder import FolderSource
from lib.faces.sources.source import BATCH_ROWS, SCAN_SCHEMA, PhotoColumns, Shard

PHOTOS_A_PERSON = 20


class MadeUpPhotos(FolderSource):
    """So many names of photos, by folders of 20."""

    def __init__(self, num: int) -> None:
        super().__init__("/nowhere/photos", PhotoColumns(), foreign={})
        self.num = num

    def scan(self, shard: Shard) -> Iterator[pa.RecordBatch]:  # noqa: ARG002
        """Yield the names, in no order."""
        for start in range(0, self.num, BATCH_ROWS):
            names = [name_of(number, self.num) for number in range(start, min(start + BATCH_ROWS, self.num))]
            columns: dict[str, Any] = {field.name: pa.nulls(len(names), field.type) for field in SCAN_SCHEMA}
            columns["photo"] = pa.array(names, pa.string())
            columns["num_bytes"] = pa.array(np.full(len(names), 34_000))
            columns["mark"] = pa.repeat(pa.scalar("1733000000.123"), len(names))
            yield pa.RecordBatch.from_arrays(list(columns.values()), schema=SCAN_SCHEMA)


def name_of(number: int, num: int) -> str:
    """Return the name of a photo; one after the other they belong to people far from each other."""
    return f"person{number * 7919 % (num // PHOTOS_A_PERSON + 1):07d}/photo_{number:09d}.jpg"


def plan(num: int, identities: str | None) -> dict[str, Any]:
    """Plan so many photos in a new process; return seconds, CPU seconds and the peak of its memory."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_plan, (num, identities))


def _plan(num: int, identities: str | None) -> dict[str, Any]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.monotonic(), time.process_time()
    manifest = read_manifest(MadeUpPhotos(num), identities, identities_required=True)
    parts = plan_parts(manifest, "settings").parts
    seconds = {"s": round(time.monotonic() - wall, 1), "cpu_s": round(time.process_time() - cpu, 1)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"photos": num, "parts": len(parts), **seconds, "mb": peak // 1000, "mb_at_start": before // 1000}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=float, default=2e6)
    parser.add_argument("--listed", action="store_true")
    given = parser.parse_args()
    figures = []
    with tempfile.TemporaryDirectory(prefix="planning ") as scratch:
        for num in (int(given.photos / 100), int(given.photos / 10), int(given.photos)):
            identities = Path(scratch) / "identities.txt"
            if given.listed:
                with identities.open("w") as file:
                    file.writelines(f"{name_of(number, num)} {number % (num // 20 + 1)}\n" for number in range(num))
            figures.append(plan(num, str(identities) if given.listed else None))
            print(figures[-1], flush=True)
    print(json.dumps({"bench": "planning", "listed": given.listed, "figures": figures}))


if __name__ == "__main__":
    main()
