"""`jobs/export.py --to` as a user runs it: out of the project, back in again, killed on the way, on S3."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from lib import storage
from lib.errors import UserError
from lib.faces import table
from lib.recognition.export_job import ExportConfig, FacesOut, export
from tests.job_runner import RayHead, kill_session, run_here, run_job, start_job, wait_until
from tests.training.learnable_faces import SIZE, write_faces

FORMATS = ("webdataset", "folder", "parquet")
NUM_FACES = 40 * 8


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_faces(tmp_path_factory.mktemp("it's é") / "faces")


def faces_in(url: str) -> list[tuple[str, str, bytes]]:
    """Return split, identity and JPEG of every aligned face of a table, sorted."""
    names = table.part_names(table.read_success(url), table.SPLITS)
    rows = [
        (name.split("/")[0].removeprefix("split="), row)
        for name in names
        for row in storage.read_parquet(storage.join(url, name)).to_pylist()
    ]
    return sorted((split, row["identity"], row["crop"]) for split, row in rows if row["status"] == table.ALIGNED)


@pytest.mark.parametrize("to", [FORMATS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in FORMATS[1:])])
def test_what_leaves_comes_back_with_the_same_bytes_people_and_splits(
    connected_head: RayHead, faces: str, tmp_path: Path, to: str
) -> None:
    output = tmp_path / "out é"
    done = run_here("export.py", "--faces", faces, "--to", to, "--output", str(output), "--shard-faces", "50")
    assert done.status == 0, done.errors
    result = done.result
    assert (result["faces"], result["faces_written"], result["identities"]) == (NUM_FACES, NUM_FACES, 40)
    assert result["shards"] == 4 + 2 + 2
    assert result["left_out"] == {}
    flags = ["--data", str(tmp_path / "data"), "--photos", str(output), "--aligned", "none", "--image-size", str(SIZE)]
    split_from = "1"
    if to == "parquet":  # whose photos have their own names
        split_from = str(tmp_path / "splits.csv")
        lines = {f"{identity},{split}" for split, identity, _ in faces_in(faces)}
        Path(split_from).write_text("\n".join(sorted(lines)))
    back = run_here("preprocess.py", *flags, "--split-from", split_from)
    assert back.status == 0, back.errors
    assert back.result["aligned"] == NUM_FACES
    assert faces_in(str(tmp_path / "data" / "faces")) == faces_in(faces)
    if to == "webdataset":
        check_that_webdataset_reads(output / "val")
    again = run_here("export.py", "--faces", faces, "--to", to, "--output", str(output), "--shard-faces", "50")
    assert again.result["faces_written"] == 0
    assert again.result["faces"] == NUM_FACES
    assert "nothing to do" in again.errors


def test_one_split_lies_in_the_folder_itself_as_insightface_trains_on(
    connected_head: RayHead, faces: str, tmp_path: Path
) -> None:
    done = run_here(
        "export.py", "--faces", faces, "--to", "folder", "--output", str(tmp_path / "o"), "--splits", "train"
    )
    assert done.status == 0, done.errors
    photos = sorted(str(path.relative_to(tmp_path / "o")) for path in (tmp_path / "o").glob("*/*.jpg"))
    assert photos == sorted(f"person {person}/“{photo}”.jpg" for person in range(24) for photo in range(8))
    people = (tmp_path / "o" / "_identities.jsonl").read_text().splitlines()
    assert json.loads(people[1]) == {"label": 1, "identity": "person 1", "folder": "person 1"}


def check_that_webdataset_reads(folder: Path) -> None:
    """Read the two tars of 64 faces, 50 in the first, by the library whose format they have."""
    script = """
import json, sys, webdataset
samples = webdataset.WebDataset(sys.argv[1], shardshuffle=False).to_tuple("__key__", "jpg", "json")
found = [(key, jpeg[:2], json.loads(about)) for key, jpeg, about in samples]
print(json.dumps([[key, start.hex(), about["identity"], about["label"]] for key, start, about in found]))
"""
    command = [sys.executable, "-W", "ignore", "-c", script, str(folder / "{000000..000001}.tar")]
    read = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert read.returncode == 0, read.stderr
    samples = json.loads(read.stdout)
    assert len(samples) == 64
    assert [key for key, *_ in samples[49:51]] == ["0000000049", "0000010000"]
    assert {start for _, start, _, _ in samples} == {"ffd8"}
    people = sorted(f"person {n}" for n in range(40))
    assert {(identity, label) for _, _, identity, label in samples} == {
        (f"person {n}", people.index(f"person {n}")) for n in range(24, 32)
    }


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS)
def test_killed_at_any_moment_the_same_command_goes_on(head: RayHead, tmp_path: Path, to: str) -> None:
    faces = write_faces(tmp_path / "faces", people={"train": 400}, photos=10)
    output = tmp_path / "o"
    flags = ["--faces", faces, "--to", to, "--output", str(output), "--shard-faces", "20", "--splits", "train"]
    written = output / "_written" if to == "folder" else output
    pattern = {"folder": "0*", "webdataset": "*.tar", "parquet": "train-*.parquet"}[to]
    with start_job("export.py", *flags, extra=head.environment) as job:
        try:
            wait_until(lambda: len(list(written.glob(pattern))) > 3, job)
        finally:
            kill_session(job.pid)
    assert not (output / "_EXPORTED").exists()
    done = run_job("export.py", *flags, extra=head.environment)
    assert done.status == 0, done.errors
    assert done.result["faces"] == 4000
    assert 0 < done.result["faces_written"] < 4000
    assert not list(output.rglob(".*.tmp"))
    if to == "folder":
        assert len(list(output.glob("*/*.jpg"))) == 4000
    assert len(list(written.glob(pattern))) == 200


@pytest.mark.slow
def test_s3_and_other_settings(connected_head: RayHead, faces: str, s3_bucket: str) -> None:
    for info in storage.list_files(faces, skip_prefixes=(".",)):
        storage.write_bytes(f"{s3_bucket}/faces/{info.path}", storage.read_bytes(f"{faces}/{info.path}"))
    out = FacesOut(splits=("test",), shard_faces=20)
    config = ExportConfig(to="parquet", data=s3_bucket, output=f"{s3_bucket}/out ü", faces_out=out)
    assert export(config)["faces_written"] == 64
    names = [info.path for info in storage.list_files(f"{s3_bucket}/out ü")]
    assert names == [f"test-{n:05d}-of-00004.parquet" for n in range(4)]
    rows = pa.concat_tables([storage.read_parquet(f"{s3_bucket}/out ü/{name}") for name in names])
    assert sorted(image["bytes"] for image in rows["image"].to_pylist()) == sorted(
        crop for split, _, crop in faces_in(faces) if split == "test"
    )
    other = ExportConfig(
        to="webdataset", data=s3_bucket, output=f"{s3_bucket}/out ü", faces_out=FacesOut(splits=("test",))
    )
    with pytest.raises(UserError, match=r"to: parquet there, webdataset now.*--overwrite"):
        export(other)
    replacing = ExportConfig(
        to="webdataset",
        data=s3_bucket,
        output=f"{s3_bucket}/out ü",
        faces_out=FacesOut(splits=("test",), overwrite=True),
    )
    assert export(replacing)["faces_written"] == 64
    assert [info.path for info in storage.list_files(f"{s3_bucket}/out ü")] == ["000000.tar"]
    with pytest.raises(UserError, match="holds files but no _export"):
        export(ExportConfig(to="folder", faces=faces, output=f"{s3_bucket}/faces", faces_out=FacesOut(overwrite=True)))


def refused(**settings: object) -> str:
    with pytest.raises(UserError) as caught:
        export(ExportConfig(**settings))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_input_is_refused_before_anything_starts(faces: str, tmp_path: Path) -> None:
    output = str(tmp_path / "o")
    assert "name a folder for them by --output" in refused(to="folder")
    assert "leave out --model" in refused(to="folder", output=output, model="m")
    assert "no finished faces at" in refused(to="folder", output=output, faces=str(tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    mine = str(tmp_path / "mine")
    assert "thesis.txt" in refused(to="folder", output=mine, faces=faces, faces_out=FacesOut(overwrite=True))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "dear"
    planned = export(ExportConfig(to="folder", output=output, faces=faces, dry_run=True))
    assert (planned["faces"], planned["shards"]) == (NUM_FACES, 3)
    assert not Path(output).exists()
