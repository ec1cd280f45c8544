"""What jobs/preprocess.py refuses, in one line and before it starts."""

import io
from pathlib import Path

import pytest
from PIL import Image

from tests.job_runner import RayHead, run_here


def test_a_list_of_photos_decides_which_are_planned(sample_data: Path, tmp_path: Path) -> None:
    names = [line.rsplit(" ", 1)[0] for line in (sample_data / "identities.txt").read_text().splitlines()]
    (tmp_path / "few names.txt").write_text("".join(f"{name}\n" for name in [*names[:7], "gone.jpg"]))
    flags = ("--data", str(sample_data), "--faces", str(tmp_path / "out"), "--photo-list")
    done = run_here("preprocess.py", *flags, str(tmp_path / "few names.txt"), "--dry-run")
    assert (done.status, done.result["photos"]) == (0, 8), done.errors
    refused = run_here("preprocess.py", *flags, str(tmp_path / "few names.txt"), "--photos-format", "zip")
    assert refused.status == 2
    assert "leave --photos-format zip out" in refused.errors


def test_dry_run_writes_nothing(sample_data: Path, tmp_path: Path) -> None:
    done = run_here("preprocess.py", "--data", str(sample_data), "--faces", str(tmp_path / "out"), "--dry-run")
    assert done.status == 0
    assert done.result["photos"] > 0
    assert not (tmp_path / "out").exists()


def _photo_folder(root: Path, identities: str | None) -> None:
    (root / "photos").mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    (root / "photos" / "a b.jpg").write_bytes(buffer.getvalue())
    if identities is not None:
        (root / "identities.txt").write_text(identities)


@pytest.mark.parametrize(
    ("identities", "flags", "said"),
    [
        (None, [], "identities.txt is not there"),
        ("a b.jpg 1\nbroken\n\nagain\n", [], "line 2, 4"),
        ("a b.jpg 1\n../../etc/passwd 2\n", [], "line 2 (../../etc/passwd) leads out of the photo folder"),
        ("a b.jpg 1\na b.jpg 2\n", [], "two identities"),
        ("a b.jpg 1\n", ["--detector", "guess"], "--detector is 'guess'"),
        ("a b.jpg 1\n", ["--detector", "batch-face"], "never downloaded"),
        ("a b.jpg 1\n", ["--detector-weights", "/nowhere/w.onnx"], "/nowhere/w.onnx"),
        ("a b.jpg 1\n", ["--photos", "foo://bucket/x"], "'foo'"),
        ("a b.jpg 1\n", ["--photos", "/nowhere/photos"], "/nowhere/photos is not there"),
        ("a b.jpg 1\n", ["--identities", "/nowhere/i.txt"], "/nowhere/i.txt is not there"),
        ("a b.jpg 1\n", ["--image-size", "3"], "--image-size is 3"),
        ("a b.jpg 1\n", ["--faces", "/proc/faces"], "/proc/faces"),
    ],
)
def test_what_cannot_start_says_so_in_one_line(
    tmp_path: Path, identities: str | None, flags: list[str], said: str
) -> None:
    _photo_folder(tmp_path, identities)
    refused = run_here("preprocess.py", "--data", str(tmp_path), *flags)
    assert refused.status == 2, refused.errors
    assert said in refused.last_error
    assert refused.last_error.startswith("error: ")
    assert "Traceback" not in refused.errors
    assert refused.output == ""


def test_gpus_that_the_cluster_does_not_have_are_refused(
    connected_head: RayHead, sample_data: Path, tmp_path: Path
) -> None:
    refused = run_here(
        "preprocess.py",
        "--data",
        str(sample_data),
        "--faces",
        str(tmp_path),
        "--gpus",
        "1",
        extra=connected_head.environment,
    )
    assert refused.status == 2, refused.errors
    assert "--gpus is 1, but the cluster has " in refused.last_error


@pytest.mark.parametrize("flags", [["--no-such-flag", "1"], ["--image-size", "large"]])
def test_a_flag_that_is_not_understood_is_named(tmp_path: Path, flags: list[str]) -> None:
    refused = run_here("preprocess.py", "--data", str(tmp_path), *flags)
    assert refused.status == 2
    assert flags[0] in refused.errors
    assert "Traceback" not in refused.errors


@pytest.mark.parametrize("folder", ["photos", "photos/faces", "photos/../photos/faces/"])
def test_faces_among_the_photos_are_refused(tmp_path: Path, folder: str) -> None:
    _photo_folder(tmp_path, "a b.jpg 1\n")
    refused = run_here("preprocess.py", "--data", str(tmp_path), "--faces", str(tmp_path / folder))
    assert refused.status == 2
    assert "lies in --photos" in refused.last_error
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a b.jpg"]


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    refused = run_here("preprocess.py", "--data", str(tmp_path))
    assert refused.status == 2
    assert "holds no photos" in refused.last_error


def test_a_foreign_folder_is_never_overwritten(sample_data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    refused = run_here("preprocess.py", "--data", str(sample_data), "--faces", str(tmp_path), "--overwrite")
    assert refused.status == 2
    assert "mine.txt" in refused.last_error
    assert (tmp_path / "mine.txt").read_text() == "keep me"
