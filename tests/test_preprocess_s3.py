"""`jobs/preprocess.py` with photos and faces in a bucket of a real S3 server, which refuses, breaks and comes back."""

import json
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import s3fs

from lib import storage
from lib.faces import table
from tests.job_runner import RayHead, finish, run_here, run_job, start_job, wait_until
from tests.s3_server import S3Server


@pytest.fixture
def data(s3_bucket: str, sample_data: Path) -> str:
    """Return the URL of the sample photos in a bucket, by folders, with names that a URL would have to escape."""
    url = f"{s3_bucket}/people ü/data"
    for line in (sample_data / "identities.txt").read_text().splitlines():
        name, identity = line.rsplit(" ", 1)
        content = (sample_data / "photos" / name).read_bytes()
        storage.write_bytes(f"{url}/photos/person {identity} #1?/{name}", content)
    return url


def parts(data: str) -> list[str]:
    return [info.path for info in storage.list_files(f"{data}/faces", suffix=".parquet")]


def rows(data: str) -> list[str]:
    faces = (storage.read_parquet(f"{data}/faces/{part}") for part in parts(data))
    return sorted(name for part in faces for name in part["photo"].to_pylist())


def photos(data: str) -> list[str]:
    return sorted(info.path for info in storage.list_files(f"{data}/photos"))


def test_a_bucket_is_read_and_written_and_a_second_run_does_nothing(head: RayHead, data: str) -> None:
    done = run_job("preprocess.py", "--data", data, extra=head.environment)
    assert done.status == 0, done.errors
    assert rows(data) == photos(data)
    assert done.result["photos_processed"] == done.result["rows"] == len(photos(data))
    assert done.result["aligned"] > 0.9 * len(photos(data))
    success = json.loads(storage.read_bytes(f"{data}/faces/{table.SUCCESS_NAME}"))
    assert success["counts"]["aligned"] == done.result["aligned"]
    sheet = np.frombuffer(storage.read_bytes(f"{data}/faces/contact_sheet.jpg"), np.uint8)
    assert cv2.imdecode(sheet, cv2.IMREAD_COLOR) is not None

    again = run_here("preprocess.py", extra={"DATA_URL": data})
    assert again.status == 0, again.errors
    assert again.result["photos_processed"] == 0
    assert again.result["aligned"] == done.result["aligned"]


@pytest.mark.slow
def test_after_kill_9_the_same_command_does_what_is_missing(head: RayHead, data: str) -> None:
    with start_job("preprocess.py", "--data", data, extra=head.environment) as job:
        wait_until(lambda: bool(parts(data)), job)
        job.send_signal(signal.SIGKILL)
        job.wait()
        num_present = len(rows(data))
        assert 0 < num_present < len(photos(data))
        again = run_job("preprocess.py", "--data", data, extra=head.environment)
    assert again.status == 0, again.errors
    assert 0 < again.result["photos_processed"] <= len(photos(data)) - num_present
    assert rows(data) == photos(data)


@pytest.mark.slow
def test_a_server_that_goes_and_comes_back_costs_no_photo(head: RayHead, data: str, s3_server: S3Server) -> None:
    names = photos(data)
    with start_job("preprocess.py", "--data", data, extra=head.environment) as job:
        try:
            wait_until(lambda: bool(parts(data)), job)
            s3_server.stop()
            with pytest.raises(AssertionError, match="never came"):
                wait_until(lambda: job.poll() is not None, timeout_s=5)
        finally:
            s3_server.start()
        done = finish(job)
    assert done.status == 0, done.errors
    assert rows(data) == names
    assert done.result["missing"] == 0


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "a-wrong-secret"}, "Forbidden"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "AWS_ACCESS_KEY_ID"),
        ({"AWS_ACCESS_KEY_ID": "ro-key", "AWS_SECRET_ACCESS_KEY": "ro-secret"}, "cannot write to"),
    ],
    ids=["wrong secret", "unknown key", "read-only user"],
)
def test_who_may_not_is_told_so_in_one_line_without_the_secret(data: str, changed: dict[str, str], said: str) -> None:
    s3fs.S3FileSystem.clear_instance_cache()  # it holds the right ones
    refused = run_here("preprocess.py", "--data", data, extra=changed)
    assert refused.status == 2, refused.errors
    assert refused.last_error.startswith("error: ")
    assert said in refused.last_error
    assert "Traceback" not in refused.errors
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        assert changed.get(name, "ci-secret") not in refused.errors
    s3fs.S3FileSystem.clear_instance_cache()
    assert parts(data) == []


def test_a_bucket_that_is_not_there_is_named(s3_bucket: str) -> None:
    refused = run_here("preprocess.py", "--data", "s3://no-such-bucket/data")
    assert refused.status == 2, refused.errors
    assert refused.last_error.startswith("error: ")
    assert "no-such-bucket" in refused.last_error
    assert "Traceback" not in refused.errors


def test_local_photos_go_to_a_bucket_of_another_name(s3_bucket: str, sample_data: Path) -> None:
    """The plan alone is looked at: no cluster is started."""
    planned = run_here("preprocess.py", "--data", str(sample_data), "--faces", f"{s3_bucket}/faces", "--dry-run")
    assert planned.status == 0, planned.errors
    assert planned.result["faces"] == f"{s3_bucket}/faces"
    assert list(storage.list_files(s3_bucket)) == []
