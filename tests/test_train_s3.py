"""`jobs/train.py` from and to a bucket of a real S3 server, which goes away in the middle and comes back."""

import time
from pathlib import Path
from typing import Any

import pytest
import s3fs

from lib import storage
from lib.recognition.model import load_model
from tests.job_runner import RayHead, finish, kill_session, run_here, run_job, start_job, wait_until
from tests.s3_server import S3Server
from tests.test_train_job import TINY
from tests.training.learnable_faces import write_faces
from tests.training.test_validation_sources import write_pairs

EPOCHS = 4


@pytest.fixture
def data(s3_bucket: str) -> str:
    url = f"{s3_bucket}/face data"
    write_faces(f"{url}/faces")
    return url


def flags(data: str, cache_dir: Any) -> list[str]:
    sizes = ["--epochs", str(EPOCHS), "--triplets-per-epoch", "960"]
    return ["--data", data, "--cache-dir", str(cache_dir), *sizes, *TINY]


def epochs(data: str) -> list[int]:
    url = f"{data}/runs/default/history.parquet"
    return storage.read_parquet(url)["epoch"].to_pylist() if storage.exists(url) else []


@pytest.mark.slow
def test_a_run_lives_in_a_bucket(head: RayHead, data: str, tmp_path: Any) -> None:
    pairs = write_pairs(tmp_path / "pairs.csv", range(32, 40), photos=8)
    storage.write_bytes(f"{data}/my pairs.csv", Path(pairs).read_bytes())
    watched = ["--val-pairs", "400", f"{data}/my pairs.csv", "--track", f"mlflow:{tmp_path}/mlflow"]
    done = run_job("train.py", *flags(data, tmp_path), *watched, extra=head.environment)
    assert done.status == 0, done.errors
    assert 0.5 < done.result["pairs_of_files"]["my_pairs"] <= 1
    assert storage.read_json(f"{data}/runs/default/tracking.json")[f"mlflow:{tmp_path}/mlflow"]["epoch"] == EPOCHS
    assert epochs(data) == list(range(1, EPOCHS + 1))
    assert load_model(f"{data}/runs/default/model").spec.metrics["accuracy"] == done.result["accuracy"]
    names = {info.path for info in storage.list_files(f"{data}/runs/default")}
    assert {"config.json", "history.csv", "history.xlsx", "usage.parquet"} <= names
    assert any(name.startswith("tensorboard/events") for name in names)
    assert run_here("train.py", *flags(data, tmp_path), *watched).result["epochs"] == EPOCHS


@pytest.mark.slow
def test_a_server_that_goes_and_comes_back_costs_no_epoch(
    head: RayHead, data: str, tmp_path: Any, s3_server: S3Server
) -> None:
    with start_job("train.py", *flags(data, tmp_path), extra=head.environment) as job:
        try:
            wait_until(lambda: bool(epochs(data)), job)
            s3_server.stop()
            time.sleep(6)
            s3_server.start()  # by this thread: the server ends with the one that started it
            done = finish(job, 200)
        finally:
            kill_session(job.pid)
    assert done.status == 0, done.errors
    assert epochs(data) == list(range(1, EPOCHS + 1))


def test_a_wrong_secret_is_refused_in_one_line_without_the_secret(data: str, tmp_path: Any) -> None:
    s3fs.S3FileSystem.clear_instance_cache()  # it holds the right one
    refused = run_here("train.py", *flags(data, tmp_path), extra={"AWS_SECRET_ACCESS_KEY": "a-wrong-secret"})
    assert refused.status == 2
    assert "a-wrong-secret" not in refused.errors
    assert "Traceback" not in refused.errors
