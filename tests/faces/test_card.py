import itertools
import json
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from lib import storage
from lib.faces import card, row_counts, table
from lib.faces.images import to_jpeg
from lib.faces.part_plan import BUCKETS, SIZE
from lib.faces.plan_files import Part, PartPlan
from lib.parts import Found, begin, split_in

FINGERPRINT = {"id": "0123456789abcdef", "detector": "retinaface", "faces_policy": "prominent"}
PLAN = {"fingerprint": FINGERPRINT, SIZE: 32, BUCKETS: {"train": 2, "val": 1, "test": 1}}
COLOURS = {"Zoë": (40, 40, 230), "2": (40, 230, 40), "3": (230, 40, 40)}

Row = tuple[str, str | None, str]


def write_part(faces: Path, name: str, rows: list[Row], num_bytes: int) -> None:
    content: list[dict[str, Any]] = []
    for photo, identity, status in rows:
        crop = None
        if status == table.ALIGNED:
            crop = to_jpeg(np.full((64, 64, 3), COLOURS.get(identity or "", (128, 128, 128)), np.uint8), 95)
        content.append({"photo": photo, "identity": identity, "status": status, "crop": crop})
    part = table.faces_table(content, json.dumps(FINGERPRINT))
    metadata = {**part.schema.metadata, table.BYTES_KEY: str(num_bytes).encode()}
    storage.write_parquet(str(faces / name), part.replace_schema_metadata(metadata), compression="none")


def plan_of(sizes: dict[str, int], passed_over: dict[str, int]) -> PartPlan:
    """Return a plan of parts of so many photos."""
    parts = [Part(key=name, shard=0, start=0, stop=num, names={split_in(name): name}) for name, num in sizes.items()]
    num_photos = sum(sizes.values())
    return PartPlan(url="", parts=parts, layout={}, num_photos=num_photos, num_bytes=0, num_passed_over=passed_over)


def finish(faces: Path, parts: dict[str, list[Row]], *, passed_over: dict[str, int] | None = None) -> dict[str, Any]:
    for name, rows in parts.items():
        write_part(faces, name, rows, num_bytes=10_000 * len(rows))
    plan = plan_of({name: len(rows) for name, rows in parts.items()}, passed_over or {})
    begun = begin(Found(str(faces)), PLAN, plan.file_names())
    return card.finish(str(faces), plan, begun=begun, photos_per_s=123.456)


PARTS: dict[str, list[Row]] = {
    "split=train/part-000000.parquet": [("a.jpg", "Zoë", table.ALIGNED), ("b.jpg", "Zoë", table.ALIGNED)],
    "split=train/part-000001.parquet": [
        ("c.jpg", "2", table.ALIGNED),
        ("d.jpg", "2", table.NO_FACE),
        ("new\nline.jpg", "4", table.CORRUPT),
    ],
    "split=test/part-000002.parquet": [
        ("e.jpg", "3", table.ALIGNED),
        ("f.jpg", None, table.NO_IDENTITY),
        ("g.jpg", "3", table.MISSING),
        ("h.jpg", "3", table.LOW_SCORE),
        ("i.jpg", "3", table.TOO_SMALL),
        ("j.jpg", "3", table.TOO_LARGE),
        ("l.jpg", "3", table.CHANGED),
        ("k.jpg", "3", table.IMPLAUSIBLE),
    ],
}


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    return tmp_path / "visages d'été" / "faces"


def test_counts_reconcile_over_every_status(faces: Path) -> None:
    counts = finish(faces, PARTS)
    assert counts == {
        "photos": 13,
        "rows": 13,
        "aligned": 4,
        "no_face": 1,
        "low_score": 1,
        "too_small": 1,
        "implausible": 1,
        "corrupt": 1,
        "too_large": 1,
        "changed": 1,
        "missing": 1,
        "no_identity": 1,
        "identities": 3,
    }
    assert sum(counts[status] for status in table.STATUSES) == counts["rows"]


def test_card_success_and_readme_say_the_same(faces: Path) -> None:
    counts = finish(faces, PARTS, passed_over={".gif": 2})
    written = json.loads((faces / "card.json").read_text())
    success = json.loads((faces / "_SUCCESS").read_text())
    readme = (faces / "README.md").read_text()
    sizes = {name: (faces / name).stat().st_size for name in PARTS}
    assert success.pop("content")
    about = {"run_id": written["run_id"], "version": 1, "format": 1}
    assert success == {**PLAN, **about, "counts": counts, "parts": sizes}
    assert written["counts"] == counts
    assert written["fingerprint"] == FINGERPRINT
    assert written["passed_over"] == {".gif": 2}
    assert written["photos_per_s"] == 123.5
    assert written["bytes_before"] == 130_000
    assert 0 < written["bytes_after"] < sum(path.stat().st_size for path in faces.glob("split=*/*.parquet"))
    assert "no of train identities=2 no of train photos=3 mean of photo count for each identity=1.5" in readme
    assert "no of test identities=1 no of test photos=1 mean of photo count for each identity=1.0" in readme
    assert "no of val identities=0 no of val photos=0 mean of photo count for each identity=0.0" in readme
    assert "2 .gif" in readme
    assert all(f"| {status} | {counts[status]} |" in readme for status in table.STATUSES)


def test_what_was_refused_is_named_with_its_reason(faces: Path) -> None:
    finish(faces, PARTS)
    refused = json.loads((faces / "card.json").read_text())["refused"]
    rows = [row for part in PARTS.values() for row in part]
    assert refused == [{"photo": name, "status": status} for name, _, status in rows if status != table.ALIGNED]
    # A name with a line break must not break the list.
    assert "- `'new\\nline.jpg'`: corrupt\n" in (faces / "README.md").read_text()


def test_of_very_many_refused_photos_the_first_are_named(faces: Path) -> None:
    rows: list[Row] = [(f"{number}.jpg", "2", table.NO_FACE) for number in range(1000)]
    counts = finish(faces, {"split=val/part-000000.parquet": rows})
    assert counts["no_face"] == 1000
    assert len(json.loads((faces / "card.json").read_text())["refused"]) == 200


def test_the_contact_sheet_shows_faces_of_every_part(faces: Path) -> None:
    finish(faces, PARTS)
    sheet = cv2.imread(str(faces / "contact_sheet.jpg"))
    assert sheet.shape == (120, 1440, 3)
    tiles = [tuple(int(v) for v in sheet[60, 120 * tile + 60]) for tile in range(5)]
    wanted = [COLOURS["Zoë"], COLOURS["Zoë"], COLOURS["2"], COLOURS["3"], (255, 255, 255)]
    assert np.abs(np.subtract(tiles, wanted)).max() <= 3


def test_the_contact_sheet_takes_no_more_than_it_has_room_for(faces: Path) -> None:
    rows: list[Row] = [(f"{number}.jpg", "2", table.ALIGNED) for number in range(200)]
    finish(faces, {f"split=train/part-{part:06d}.parquet": rows[part::80] for part in range(80)})
    assert cv2.imread(str(faces / "contact_sheet.jpg")).shape == (720, 1440, 3)


def test_a_table_without_a_single_face_is_finished_too(faces: Path) -> None:
    counts = finish(faces, {"split=train/part-000000.parquet": [("a.jpg", "1", table.NO_FACE)]})
    assert counts["identities"] == counts["aligned"] == 0
    assert cv2.imread(str(faces / "contact_sheet.jpg")) is not None
    assert (faces / "_SUCCESS").exists()


def test_a_table_of_nobody_counts_photos_and_no_identities(faces: Path) -> None:
    counts = finish(faces, {"split=train/part-000000.parquet": [("a.jpg", None, table.ALIGNED)]})
    assert counts["aligned"] == 1
    assert counts["identities"] == 0


def test_a_row_too_few_is_never_called_a_success(faces: Path) -> None:
    write_part(faces, "split=train/part-000000.parquet", [("a.jpg", "1", table.ALIGNED)], 10)
    two = plan_of({"split=train/part-000000.parquet": 2}, {})
    begun = begin(Found(str(faces)), PLAN, two.file_names())
    with pytest.raises(AssertionError, match="exactly one row"):
        card.finish(str(faces), two, begun=begun, photos_per_s=None)
    assert not (faces / "_SUCCESS").exists()


def test_a_crop_that_cannot_be_decoded_leaves_its_place_in_the_contact_sheet_empty(tmp_path: Path) -> None:
    parts = {name: list(rows) for name, rows in PARTS.items()}
    for name, rows in parts.items():
        write_part(tmp_path, name, rows, num_bytes=1)
    name = next(iter(parts))
    rows = storage.read_parquet(str(tmp_path / name)).to_pylist()
    broken = table.faces_table([{**row, "crop": b"no picture"} for row in rows], json.dumps(FINGERPRINT))
    storage.write_parquet(str(tmp_path / name), broken)
    plan = plan_of({name: len(rows) for name, rows in parts.items()}, {})
    begun = begin(Found(str(tmp_path)), PLAN, plan.file_names())
    counts = card.finish(str(tmp_path), plan, begun=begun, photos_per_s=None)
    sheet = cv2.imread(str(tmp_path / card.SHEET_NAME))
    assert counts["aligned"] == 4
    assert (sheet[:110, :230] > 250).all()


def test_few_parts_are_in_memory_while_they_are_counted(faces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, rows = next(iter(PARTS.items()))
    write_part(faces, name, rows, num_bytes=0)
    read, most_ahead, num_added = row_counts._read_part, 0, 0
    num_read = itertools.count(1)

    def reading(url: str, name: str) -> row_counts._Part:
        nonlocal most_ahead
        most_ahead = max(most_ahead, next(num_read) - num_added)
        return read(url, name)

    add = row_counts._add

    def adding(*arguments: Any) -> None:
        nonlocal num_added
        time.sleep(0.002)  # the readers could be far ahead
        add(*arguments)
        num_added += 1

    monkeypatch.setattr(row_counts, "_read_part", reading)
    monkeypatch.setattr(row_counts, "_add", adding)
    assert row_counts.count_rows(str(faces), [name] * 300).num_rows == 300 * len(rows)
    assert most_ahead <= 2 * row_counts._READERS
