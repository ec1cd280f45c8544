"""Seconds to forget one person: a faces table and its embeddings, of many people.

    python -m bench.forgetting --photos 1000000

Makes both tables of made-up rows (4 KB a crop, 128 numbers an embedding, 1,000 photos a part, 20 photos a person), then
runs jobs/forget.py as a process, and checks that no row of the person is left. Prints one line of JSON last.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bench.inputs import ROOT
from lib import parts, storage
from lib.faces import table
from lib.faces.images import to_jpeg
from lib.forgetting.tables import look_for
from lib.forgetting.targets import of_names
from lib.recognition import embeddings_table

PART, PHOTOS_PER_PERSON, CROP_BYTES, DIMENSION = 1000, 20, 4096, 128
PERSON = "person 7"


def write_tables(data: Path, num_photos: int) -> None:
    """Write the faces table and the embeddings of so many photos."""
    rng = np.random.default_rng(0)
    num_people = max(1, num_photos // PHOTOS_PER_PERSON)
    schema = embeddings_table.schema(DIMENSION, "{}", "{}")
    jpeg = to_jpeg(np.full((48, 48, 3), 128, np.uint8), 90)
    for number in range(num_photos // PART):
        people = [f"person {n}" for n in rng.integers(0, num_people, PART)]
        if number % (num_photos // PART // PHOTOS_PER_PERSON or 1) == 0:
            people[0] = PERSON
        columns: dict[str, Any] = {
            "photo": [f"{person}/{number}-{n}.jpg" for n, person in enumerate(people)],
            "identity": people,
            "status": [table.ALIGNED] * PART,
            # Bytes after the end of a JPEG do not count.
            "crop": [jpeg + rng.bytes(CROP_BYTES - len(jpeg)) for _ in range(PART)],
            "quality": rng.uniform(0, 1, PART).astype(np.float32),
        }
        rows = {each.name: pa.array(columns.get(each.name, [None] * PART), each.type) for each in table.SCHEMA}
        name = parts.part_name("train", f"{number:06d}", f"{number:012x}")
        storage.write_parquet(str(data / "faces" / name), pa.table(rows), compression="none")
        vectors = pa.FixedSizeListArray.from_arrays(rng.normal(size=PART * DIMENSION).astype(np.float32), DIMENSION)
        columns["embedding"] = vectors
        embedded = [pa.array(columns.get(each.name, [None] * PART), each.type) for each in schema]
        storage.write_parquet(str(data / "embeddings" / "m" / name), pa.Table.from_arrays(embedded, schema=schema))
    for folder, job in ((data / "faces", {}), (data / "embeddings" / "m", {"job": "embed"})):
        about = {"run_id": "r", "version": 1, "content": "c", "fingerprint": {"faces_policy": "prominent"}}
        storage.write_json(str(folder / parts.PLAN_NAME), {**about, **job})
        success = {**about, "counts": {"photos": num_photos}, "parts": parts.present_files(str(folder))}
        storage.write_json(str(folder / parts.SUCCESS_NAME), success)


def main() -> None:
    """Make the tables, forget a person, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=200_000)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        started = time.monotonic()
        write_tables(data, wanted.photos)
        made_s = time.monotonic() - started
        command = [sys.executable, str(ROOT / "jobs" / "forget.py"), "--data", folder, "--identities", PERSON]
        started = time.monotonic()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.monotonic() - started
        result = json.loads(done.stdout.splitlines()[-1])
        left = [look_for(str(data / name), of_names([], [PERSON])).rows for name in ("faces", "embeddings/m")]
        assert left == [{}, {}], left
        num_bytes = sum(path.stat().st_size for path in data.rglob("*.parquet"))
    told = ("rows", "parts_rewritten", "photos")
    about = {"photos_in_tables": wanted.photos, "gigabytes": round(num_bytes / 1e9, 2), "made_s": round(made_s, 1)}
    print(json.dumps({**about, **{name: result[name] for name in told}, "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
