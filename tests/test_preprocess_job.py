"""`jobs/preprocess.py` as a user runs it, on drawn people, and what it says to input that is bad."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lib.faces import table
from lib.faces.manifest import read_manifest
from lib.faces.preprocess_config import PreprocessConfig
from lib.faces.splits import split_of
from lib.parts import split_in
from tests.job_runner import ROOT, Finished, RayHead, environment, finish, run_here

ODD_NAMES = {
    'it\'s "odd" \n ü 字.jpg': table.ALIGNED,
    "zero.jpg": table.CORRUPT,
    "text.jpg": table.CORRUPT,
    "one pixel.png": table.TOO_SMALL,
    "huge.png": table.TOO_LARGE,
    "cut.jpg": table.CORRUPT,
    "alone/only photo.jpg": table.ALIGNED,
}


def huge_png() -> bytes:
    """Return a small PNG file whose header promises 30,000 x 30,000 pixels."""
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


@pytest.fixture(scope="module")
def data(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the sample people by folders, with bad and oddly named photos among them."""
    folder = tmp_path_factory.mktemp("odd data ü")
    photos = folder / "photos"
    for line in (sample_data / "identities.txt").read_text().splitlines():
        name, identity = line.rsplit(" ", 1)
        target = photos / f"person {identity}" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(sample_data / "photos" / name, target)
    good = next(p for p in sorted(photos.rglob("*.jpg")) if p.stat().st_size > 20_000).read_bytes()
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    contents = [good, b"", b"no picture at all", buffer.getvalue(), huge_png(), good[: len(good) // 2], good]
    for name, content in zip(ODD_NAMES, contents, strict=True):
        (photos / "odd ones" / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / "odd ones" / name).write_bytes(content)
    (photos / "flat.jpg").write_bytes(good)
    (photos / "notes.txt").write_text("not a photo")
    return folder


@pytest.fixture(scope="module")
def first_run(data: Path) -> Finished:
    """Return the first, whole run, started as an executable file."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    job = subprocess.Popen(
        [ROOT / "jobs" / "preprocess.py"],
        env=environment({"DATA_URL": str(data), "PATH": path}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=data,
        start_new_session=True,
    )
    return finish(job)


def read_faces(folder: Path) -> pa.Table:
    return pa.concat_tables(pq.ParquetFile(path).read() for path in sorted(folder.glob("split=*/part-*.parquet")))


def test_each_photo_has_one_row_and_a_status(data: Path, first_run: Finished) -> None:
    assert first_run.status == 0, first_run.errors
    assert len(first_run.output.splitlines()) == 1
    faces = read_faces(data / "faces")
    assert faces.schema.remove_metadata().equals(table.SCHEMA)
    photos = sorted(str(p.relative_to(data / "photos")) for p in (data / "photos").rglob("*") if p.suffix != ".txt")
    photos = [p for p in photos if (data / "photos" / p).is_file()]
    assert sorted(faces["photo"].to_pylist()) == sorted(photos)
    status = dict(zip(faces["photo"].to_pylist(), faces["status"].to_pylist(), strict=True))
    assert {name: status[f"odd ones/{name}"] for name in ODD_NAMES} == ODD_NAMES
    assert status["flat.jpg"] == table.NO_IDENTITY
    assert first_run.result["photos"] == first_run.result["rows"] == len(photos)
    assert sum(first_run.result[name] for name in table.STATUSES) == len(photos)


def test_crops_are_square_and_only_where_aligned(data: Path, first_run: Finished) -> None:
    assert first_run.status == 0
    for row in read_faces(data / "faces").to_pylist():
        assert (row["crop"] is not None) == (row["status"] == table.ALIGNED)
        if row["crop"]:
            assert cv2.imdecode(np.frombuffer(row["crop"], np.uint8), cv2.IMREAD_COLOR).shape == (240, 240, 3)
            assert row["score"] >= 0.9
            assert len(row["landmarks"]) == 10


def test_splits_follow_the_identities(data: Path, first_run: Finished) -> None:
    assert first_run.status == 0
    for path in (data / "faces").glob("split=*/part-*.parquet"):
        for identity in pq.ParquetFile(path).read(columns=["identity"])["identity"].to_pylist():
            if identity is not None:
                assert path.parent.name == f"split={split_of(identity, 0)}"


def test_card_sheet_and_success_say_the_same(data: Path, first_run: Finished) -> None:
    faces = data / "faces"
    card, success = (json.loads((faces / name).read_text()) for name in ("card.json", "_SUCCESS"))
    assert card["counts"] == success["counts"]
    assert card["fingerprint"] == success["fingerprint"]
    metadata = pq.read_schema(next(faces.glob("split=*/part-*.parquet"))).metadata
    assert json.loads(metadata[table.FINGERPRINT_KEY]) == success["fingerprint"]
    assert cv2.imread(str(faces / "contact_sheet.jpg")).shape[1] == 12 * 120
    readme = (faces / "README.md").read_text()
    for split in table.SPLITS:
        assert f"no of {split} identities={card['splits'][split]['identities']}" in readme
    assert card["passed_over"] == {".txt": 1}
    assert card["bytes_before"] > card["bytes_after"] > 0
    assert first_run.result["photos_per_s"] > 0


def test_a_second_run_does_nothing(data: Path, first_run: Finished) -> None:
    before = {p: p.stat().st_mtime_ns for p in (data / "faces").rglob("*")}
    again = run_here("preprocess.py", "--data", str(data))
    assert again.status == 0
    assert again.result["photos_processed"] == 0
    assert again.result["aligned"] == first_run.result["aligned"]
    assert before == {p: p.stat().st_mtime_ns for p in (data / "faces").rglob("*")}


def test_other_settings_over_a_table_are_refused_by_name(data: Path, first_run: Finished) -> None:
    assert first_run.status == 0
    refused = run_here("preprocess.py", "--data", str(data), "--image-size", "112", "--split-seed", "3")
    assert refused.status == 2
    assert "image_size: 240 there, 112 now" in refused.last_error
    assert "split_seed: 0 there, 3 now" in refused.last_error
    assert "--overwrite" in refused.last_error


def test_photos_that_have_little_to_do_with_the_table_are_refused(
    data: Path, first_run: Finished, sample_data: Path
) -> None:
    assert first_run.status == 0
    flags = ("--photos", str(sample_data / "photos"), "--identities", str(sample_data / "identities.txt"))
    others = run_here("preprocess.py", "--data", str(data), *flags)
    assert others.status == 2
    num = first_run.result["photos"]
    assert f"{num} of the {num} photos of {data}/faces are not in {sample_data}/photos: correct" in others.last_error


@pytest.fixture
def grown(data: Path, first_run: Finished, tmp_path: Path) -> Path:
    """Return a copy of the data and its table."""
    assert first_run.status == 0
    return Path(shutil.copytree(data, tmp_path / "grown é"))


def version(faces: Path) -> tuple[dict, dict[str, dict]]:
    """Return the version that readers see: what it says of itself, and its rows by photo."""
    success = table.read_success(str(faces))
    rows = [row for name in success["parts"] for row in pq.ParquetFile(faces / name).read().to_pylist()]
    assert len(rows) == success["counts"]["photos"]
    return success, {row["photo"]: row for row in rows}


@pytest.mark.usefixtures("connected_head")
def test_the_same_command_over_photos_that_changed_does_those_alone(grown: Path) -> None:
    before, rows_before = version(grown / "faces")
    good = (grown / "photos" / "flat.jpg").read_bytes()
    (grown / "photos" / "odd ones" / "new.jpg").write_bytes(good)
    (grown / "photos" / "odd ones" / "zero.jpg").write_bytes(good)
    (grown / "photos" / "odd ones" / "text.jpg").unlink()
    moved = next(path for path in sorted((grown / "photos").glob("person */*.jpg")))
    (grown / "photos" / "somebody else").mkdir()
    moved.rename(grown / "photos" / "somebody else" / moved.name)
    done = run_here("preprocess.py", "--data", str(grown))
    assert done.status == 0, done.errors
    assert "2 photos are new, 1 changed, 2 gone, 0 of another identity" in done.errors
    assert done.result["photos_processed"] == 3
    assert done.result["version"] == 2
    after, rows = version(grown / "faces")
    assert rows["odd ones/zero.jpg"]["status"] == table.ALIGNED
    assert "odd ones/text.jpg" not in rows
    same = rows.keys() & rows_before.keys() - {"odd ones/zero.jpg"}
    assert all(rows[photo] == rows_before[photo] for photo in same)
    assert len(same) == len(rows) - 3
    # The version before can still be read, and a run on it goes on.
    old = table.read_success(str(grown / "faces"), run_id=before["run_id"])
    assert old["parts"] == before["parts"]
    assert after["run_id"] != before["run_id"]
    again = run_here("preprocess.py", "--data", str(grown))
    assert (again.status, again.result["photos_processed"]) == (0, 0)


@pytest.mark.usefixtures("connected_head")
def test_other_identities_cost_no_detection(grown: Path) -> None:
    _, rows_before = version(grown / "faces")
    lines = [
        f"{photo} {'joined' if (row['identity'] or '').startswith('person') else row['identity']}\n"
        for photo, row in rows_before.items()
        if row["identity"] is not None and "\n" not in photo
    ]
    (grown / "identities.txt").write_text("".join(lines))
    done = run_here("preprocess.py", "--data", str(grown))
    assert done.status == 0, done.errors
    # It is nobody's now, and is not looked at.
    assert done.result["photos_processed"] == 1
    success, rows = version(grown / "faces")
    people = [row for row in rows.values() if row["identity"] == "joined"]
    assert len(people) > 20
    assert [row["crop"] for row in people] == [rows_before[row["photo"]]["crop"] for row in people]
    splits = {
        split_in(name)
        for name in success["parts"]
        for photo in pq.ParquetFile(grown / "faces" / name).read(columns=["identity"])["identity"].to_pylist()
        if photo == "joined"
    }
    assert splits == {split_of("joined", 0)}


@pytest.mark.usefixtures("connected_head")
def test_a_retry_looks_again_at_what_failed(grown: Path) -> None:
    _, rows_before = version(grown / "faces")
    num = sum(row["status"] in (table.CORRUPT, table.TOO_SMALL) for row in rows_before.values())
    done = run_here("preprocess.py", "--data", str(grown), "--retry", "corrupt", "too_small")
    assert done.status == 0, done.errors
    assert done.result["photos_processed"] == num > 0
    success, rows = version(grown / "faces")
    assert rows == rows_before
    assert success["version"] == 2
    # What was retried is what there is: nothing is left to do.
    assert run_here("preprocess.py", "--data", str(grown)).result["photos_processed"] == 0


def test_an_unknown_status_to_retry_is_refused(data: Path) -> None:
    refused = run_here("preprocess.py", "--data", str(data), "--retry", "corupt")
    assert refused.status == 2
    assert "--retry is corupt: allowed are" in refused.last_error


@pytest.mark.usefixtures("connected_head")
def test_an_old_table_is_read_and_left_alone_until_it_grows(grown: Path) -> None:
    faces = grown / "faces"
    success, rows_before = version(faces)
    old = {}
    for number, name in enumerate(sorted(success["parts"])):
        old[name] = f"{name.split('/')[0]}/part-{number:06d}.parquet"
        (faces / name).rename(faces / old[name])
    config = PreprocessConfig(data=str(grown))
    manifest = read_manifest(config.source(), config.identities_url, split_seed=0, identities_required=True)
    about = {"photos": len(manifest), "photo_bytes": manifest.num_bytes, "manifest": manifest.old_digest()}
    plan = {name: json.loads((faces / "_plan.json").read_text())[name] for name in ("fingerprint", "split_seed")}
    plan |= {"max_megapixels": 100.0, "image_column": "image", "run_id": success["run_id"], **about}
    (faces / "_plan.json").write_text(json.dumps(plan))
    kept = {name: success[name] for name in ("run_id", "fingerprint", "counts")}
    (faces / "_SUCCESS").write_text(json.dumps(kept))
    left = run_here("preprocess.py", "--data", str(grown))
    assert (left.status, left.result["photos_processed"]) == (0, 0)
    assert json.loads((faces / "_plan.json").read_text()) == plan
    (grown / "photos" / "odd ones" / "text.jpg").unlink()
    done = run_here("preprocess.py", "--data", str(grown))
    assert done.status == 0, done.errors
    assert done.result["photos_processed"] == len(rows_before) - 1
    _, rows = version(faces)
    assert {photo: row["crop"] for photo, row in rows.items()} == {
        photo: row["crop"] for photo, row in rows_before.items() if photo != "odd ones/text.jpg"
    }
    assert set(table.read_success(str(faces), run_id=success["run_id"])["parts"]) == set(old.values())


def test_an_overwrite_that_cannot_start_leaves_the_table(data: Path, first_run: Finished) -> None:
    before = {path: path.read_bytes() for path in (data / "faces").rglob("*") if path.is_file()}
    flags = ["--min-face", "40", "--overwrite", "--detector-weights", str(data / "photos" / "flat.jpg")]
    refused = run_here("preprocess.py", "--data", str(data), *flags)
    assert refused.status == 2, refused.errors
    assert before == {path: path.read_bytes() for path in (data / "faces").rglob("*") if path.is_file()}
    assert first_run.status == 0


def test_a_limit_that_decides_what_is_refused_is_part_of_the_plan(data: Path, first_run: Finished) -> None:
    assert first_run.status == 0
    refused = run_here("preprocess.py", "--data", str(data), "--max-megapixels", "0.1")
    assert refused.status == 2
    assert "max_megapixels: 100.0 there, 0.1 now" in refused.last_error


def test_what_is_missing_is_done_again_and_comes_out_the_same(
    connected_head: RayHead, data: Path, first_run: Finished
) -> None:
    """What a kill at any moment leaves is some of the parts and no `_SUCCESS`."""
    faces = data / "faces"
    parts = sorted(faces.glob("split=*/part-*.parquet"))
    lost = {path: path.read_bytes() for path in parts[::2]}
    num_lost = sum(pq.ParquetFile(path).metadata.num_rows for path in lost)
    for path in lost:
        path.unlink()
    (faces / "_SUCCESS").unlink()
    (parts[1].parent / f".{0:032x}.tmp").write_bytes(b"half a file")
    again = run_here("preprocess.py", "--data", str(data))
    assert again.status == 0, again.errors
    assert again.result["photos_processed"] == num_lost
    assert {path: path.read_bytes() for path in lost} == lost
    assert again.result["aligned"] == first_run.result["aligned"]
    assert not list(faces.rglob(".*")), "leftovers of a killed writer are swept"


def test_overwrite_starts_anew_and_takes_parquet_input(
    connected_head: RayHead, data: Path, first_run: Finished, sample_data: Path, tmp_path: Path
) -> None:
    rows = []
    for line in (sample_data / "identities.txt").read_text().splitlines()[:40]:
        name, identity = line.rsplit(" ", 1)
        content = (sample_data / "photos" / name).read_bytes()
        rows.append({"image": {"bytes": content, "path": name}, "who": int(identity), "photo": name})
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:25]), tmp_path / "shards" / "a.parquet", row_group_size=7)
    pq.write_table(pa.Table.from_pylist(rows[25:]), tmp_path / "shards" / "b.parquet")
    faces = tmp_path / "faces"
    flags = ["--photos", str(tmp_path / "shards"), "--identity-column", "who", "--faces", str(faces)]
    first = run_here("preprocess.py", *flags, "--min-score", "0.95")
    assert first.status == 0, first.errors
    assert first.result["rows"] == 40
    second = run_here("preprocess.py", *flags, "--overwrite")
    assert second.status == 0, second.errors
    assert second.result["photos_processed"] == 40
    names = [row["photo"] for row in rows]
    ours = {row["photo"]: row["crop"] for row in read_faces(faces).to_pylist()}
    theirs = {
        row["photo"].rpartition("/")[2]: row["crop"]
        for row in read_faces(data / "faces").to_pylist()
        if row["photo"].rpartition("/")[2] in names
    }
    assert ours == theirs


def test_all_faces_of_photos_without_identities(connected_head: RayHead, sample_data: Path, tmp_path: Path) -> None:
    pair_names = {
        row["photo"] for row in pq.read_table(sample_data / "landmarks.parquet").to_pylist() if row["kind"] == "two"
    }
    (tmp_path / "photos").mkdir()
    for name in pair_names:
        os.link(sample_data / "photos" / name, tmp_path / "photos" / name)
    done = run_here("preprocess.py", "--data", str(tmp_path), "--faces-policy", "all")
    assert done.status == 0, done.errors
    faces = read_faces(tmp_path / "faces")
    assert done.result["photos"] == len(pair_names)
    assert done.result["aligned"] > len(pair_names)
    assert len(set(faces["photo"].to_pylist())) == len(faces)
    assert {name.rpartition("#")[0] for name in faces["photo"].to_pylist()} == pair_names
