"""After forgetting, a search of every byte finds neither names nor crops, wherever a job writes them; without Ray."""

import base64
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import parts, storage
from lib.curation import page
from lib.curation.changes import changes_table
from lib.faces import table
from lib.faces.plan_files import PLAN_SCHEMA
from lib.faces.shared_listing import _SCHEMA as LISTING
from lib.forgetting.forget_job import ForgetConfig, forget
from lib.training.suspects import SuspectLog
from lib.training.usage import usage_table
from tests.curation.test_review import proposal
from tests.forgetting.test_tables import write_cache, write_version
from tests.test_forget_job import files_with
from tests.training.learnable_faces import crop, write_faces

GONE, OTHER = "person 17", "person 18"
MINE = [f"{GONE}/“{photo}”.jpg" for photo in range(8)]
THEIRS = [f"{OTHER}/“{photo}”.jpg" for photo in range(8)]
CROPS = {name: crop(17 if name in MINE else 18, photo) for names in (MINE, THEIRS) for photo, name in enumerate(names)}


def write_run(run: Path) -> None:
    """Write what names photos in the folder of a run, of one alone or of a trial of a sweep."""
    run.mkdir(parents=True)
    run.joinpath("config.json").write_text(json.dumps({"faces_run_id": "made for tests", "fingerprint": {}}))
    photos = pa.chunked_array([pa.array([*MINE, *THEIRS])])
    identities = pa.chunked_array([pa.array([GONE] * 8 + [OTHER] * 8)])
    pq.write_table(usage_table(photos, np.ones((3, 16), np.int32)), run / "usage.parquet")
    suspects = SuspectLog()
    suspects.add(np.arange(15), np.arange(15) + 1, np.linspace(0.1, 0.9, 15))
    pq.write_table(suspects.table(photos, identities, np.repeat([0, 1], 8)), run / "suspects.parquet")
    pq.write_table(pa.table({"identity": [GONE, OTHER]}), run / "identities.parquet")
    report = run / "report"
    report.mkdir()
    report.joinpath("report.html").write_bytes(page_with(MINE[:2]))
    metrics = {"suspects": [{"photo": MINE[0], "identity": GONE}], "notes": [f"{MINE[1]} has no face", "fine"]}
    report.joinpath("metrics.json").write_text(json.dumps(metrics))
    report.joinpath("suspects.csv").write_text(f"photo,identity\r\n{MINE[0]},{GONE}\r\n{THEIRS[0]},{OTHER}\r\n")


def page_with(photos: Sequence[str]) -> bytes:
    """Return a page of the curate job with these photos and their crops."""
    changes = changes_table(
        [proposal("relabel", [0], 0, 1, (1,))], [], photos, ["train"] * len(photos), [GONE, OTHER], []
    )
    return page.html("faces", changes, page.shown_rows(changes, 9), CROPS, {})


def write_lists_of_killed_jobs(faces: Path, *, has_plan: bool = True) -> None:
    """Write a plan of photos and a kept listing, as jobs leave them that were killed."""
    if has_plan and not (faces / "_plan.json").exists():
        storage.write_json(str(faces / "_plan.json"), {"run_id": "r", "fingerprint": {}})
    rows = {"photo": [*MINE, *THEIRS], "identity": [GONE] * 8 + [OTHER] * 8, "split": ["train"] * 16}
    rows |= {"num_bytes": [1] * 16, "mark": ["m"] * 16}
    folders = {"photo": [f"{GONE}/", f"{OTHER}/"], "num_bytes": [0] * 2, "mark": [""] * 2}
    for path, schema, columns in (
        *([(faces / "_manifest" / "0a1b" / "photos-00000.parquet", PLAN_SCHEMA, rows)] if has_plan else []),
        (faces / "_manifest" / "listing" / "0123456789abcdef.00000.parquet", LISTING, rows),
        # Folders that are still to be listed name people, too.
        (faces / "_manifest" / "listing" / "0123456789abcdef.parquet", LISTING, folders),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        num = len(columns["photo"])
        arrays = [pa.array(columns.get(field.name, [None] * num), field.type) for field in schema]
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path)
    (faces / "_manifest" / "listing" / "begun.json").write_text(json.dumps({"folders": [GONE, OTHER]}))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return a folder with a file of each kind that the jobs write."""
    folder = tmp_path / "the data é"
    write_faces(folder / "faces")
    write_lists_of_killed_jobs(folder / "faces")
    write_lists_of_killed_jobs(folder / "faces of a job that was killed at once", has_plan=False)
    for name in ("embeddings/m", "galleries/guests"):
        both = [*((photo, GONE) for photo in MINE), *((photo, OTHER) for photo in THEIRS)]
        write_version(str(folder / name), {"0": [("once theirs.jpg", GONE), *both]})
        write_version(str(folder / name), {"0": both, "1": [("x.jpg", "X")]})
    for run in ("runs/first", "sweeps/s/runs/a", "sweeps/s/runs/b"):
        write_run(folder / run)
    curation = folder / "curation"
    curation.mkdir()
    curation.joinpath("curation.html").write_bytes(page_with([MINE[0], THEIRS[0]]))
    found = [proposal("relabel", [0], 1, 0, (1,)), proposal("relabel", [1], 1, 1, (2,))]
    photos = [THEIRS[0], THEIRS[1], MINE[0]]
    changes = changes_table(found, [], photos, ["train"] * 3, [OTHER, "X"], [])
    storage.write_parquet(str(curation / "curation.parquet"), changes)
    rows = "".join(f"{photo},{photo.split('/')[0]}\n" for photo in CROPS)
    (folder / "identities.txt").write_text(f"photo,identity\n{rows}")
    (curation / "identities-before.csv").write_text(rows.replace(",", " "))
    matches = folder / "matches"
    matches.mkdir()
    columns = {"photo": [MINE[0], THEIRS[0], THEIRS[1]], "decision": [OTHER, GONE, OTHER]}
    pq.write_table(pa.table(columns), matches / "matches.parquet")
    matches.joinpath("matches.csv").write_text(f"photo,decision\n{MINE[0]},{OTHER}\n{THEIRS[0]},{GONE}\n")
    matches.joinpath("matches.jpg").write_bytes(CROPS[MINE[0]])
    half = curation / f".{'0a' * 16}.tmp"
    half.write_bytes(page_with([MINE[0], THEIRS[0]])[:-20])
    os.utime(half, (time.time() - 3600,) * 2)
    write_cache(folder / "cache", [(MINE[0], GONE), (THEIRS[0], OTHER)])
    return folder


def needles() -> list[bytes]:
    """Return bytes of the person alone."""
    mine = [CROPS[name] for name in MINE]
    return [GONE.encode(), *(jpeg[-60:-20] for jpeg in mine), *(base64.b64encode(jpeg)[-120:-60] for jpeg in mine)]


def test_no_byte_stays_in_any_file_and_everybody_else_does(data: Path) -> None:
    before = files_with(data, needles(), outside=())
    assert {name.split("/")[0] for name in before} == {path.name for path in data.iterdir()}
    assert len(before) >= 30
    done = forget(ForgetConfig(data=str(data), identities=(GONE,), cache_dir=str(data / "cache"), names=False))
    assert files_with(data, needles(), outside=()) == set()  # the receipt holds no names either
    assert not (data / "faces" / "_manifest").exists()
    assert done["models"] == [str(data / run) for run in ("runs/first", "sweeps/s/runs/a", "sweeps/s/runs/b")]
    for run in ("runs/first", "sweeps/s/runs/b"):
        assert pq.read_table(data / run / "usage.parquet")["photo"].to_pylist() == THEIRS
        assert json.loads((data / run / "report" / "metrics.json").read_text())["notes"][-1] == "fine"
    assert (data / "identities.txt").read_text().count(f",{OTHER}\n") == 8
    assert (data / "curation" / "identities-before.csv").read_text().count(f" {OTHER}\n") == 8
    assert pq.read_table(data / "curation" / "curation.parquet")["photos"].to_pylist() == [[THEIRS[0]]]
    assert pq.read_table(data / "matches" / "matches.parquet")["photo"].to_pylist() == [THEIRS[1]]
    for url in ("embeddings/m", "galleries/guests"):
        names = parts.read_success(str(data / url), what="embeddings", job="jobs/embed.py")["parts"]
        kept = pa.concat_tables([pq.ParquetFile(data / url / name).read(["photo"]) for name in names])
        assert sorted(kept["photo"].to_pylist()) == sorted([*THEIRS, "x.jpg"])
    faces = table.read_success(str(data / "faces"))
    assert faces["counts"]["aligned"] == 40 * 8 - 8


def test_a_listing_that_a_killed_job_left_later_goes_with_the_same_command_again(data: Path) -> None:
    config = ForgetConfig(data=str(data), identities=(GONE,), cache_dir=str(data / "cache"), names=False)
    forget(config)
    write_lists_of_killed_jobs(data / "later", has_plan=False)
    assert forget(config)["receipt"] is None
    assert files_with(data, needles()) == set()
    write_lists_of_killed_jobs(data / "later")
    forget(config)
    assert files_with(data, needles()) == set()
