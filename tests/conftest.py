"""What the tests of several rooms share: a real S3 server, a fresh bucket on it, and the real photos."""

import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pyarrow.parquet as pq
import pytest
import s3fs
import torch

from lib import storage
from lib.faces import table
from lib.faces.extraction import ExtractionSettings, fingerprint
from lib.part_workers import Share
from lib.recognition.model import EmbeddingModel, ModelSpec, save_model
from lib.sample.sample_job import SampleConfig, make_sample
from tests.job_runner import RayHead, connected, ray_head, run_job
from tests.s3_server import S3Server

# How long an example takes says nothing on a machine that others use too.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files whose tests run jobs first: they take longest, and processes side by side then end together."""
    with_jobs = {item.path for item in items if {"head", "faces_url"} & set(getattr(item, "fixturenames", ()))}
    items.sort(key=lambda item: item.path not in with_jobs)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """Start a real S3 server at its first use; it ends with the tests."""
    server = S3Server()
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def s3_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the URL of a fresh bucket; the environment says where it is, to this process and its children."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    # An instance keeps the endpoint and the credentials of the environment in which it was made.
    s3fs.S3FileSystem.clear_instance_cache()
    url = f"s3://bucket-{uuid.uuid4().hex[:12]}"
    files, bucket = storage.filesystem(url)
    files.mkdir(bucket)
    yield url
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def real_photos() -> Path:
    """Return the folder of real photos beside the project, which is no part of it."""
    folder = Path(os.environ.get("REAL_PHOTOS") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        assert not os.environ.get("REAL_PHOTOS_REQUIRED"), (
            f"the real photos must be tested on, but {folder} is not there"
        )
        pytest.skip(f"no real photos in {folder}: set REAL_PHOTOS to the folder that holds lfw/ and celeba/")
    return folder


@pytest.fixture(scope="session")
def head(s3_server: S3Server) -> Iterator[RayHead]:
    """Start the Ray cluster of 2 logical CPUs on which the tests of this process run their jobs.

    Its nodes know the keys of the buckets. What tests the start of a cluster, or kills parts of it, starts its own.
    """
    with ray_head(num_cpus=2, extra=s3_server.environment()) as head:
        yield head


@pytest.fixture(scope="module")
def connected_head(head: RayHead) -> Iterator[RayHead]:
    """Connect this process to that cluster: what jobs call runs there, without the start of a process for each.

    Their parts go to one worker: most of its cost is the start. Jobs with a process of their own have two.
    """
    of_gpus = Share.of_gpus

    def one_without_gpus(gpus: int, *, most_a_gpu: int) -> Share:
        return of_gpus(gpus, most_a_gpu=most_a_gpu) if gpus else Share(num_workers=1, num_cpus=2)

    with connected(head), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Share, "of_gpus", one_without_gpus)
        yield head


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return what makes a folder by name, once for all processes that test side by side."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, finished = shared / name, shared / f"{name}.finished"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not finished.exists():
                make(folder)
                finished.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def sample_data(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """Return a data folder of drawn people, with a path that has spaces and letters beyond ASCII."""

    def draw(folder: Path) -> None:
        make_sample(SampleConfig(data=str(folder), identities=14, photos_per_identity=8, seed=7))

    return made_once("drawn people é", draw)


@pytest.fixture(scope="session")
def model_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a small model of random weights, with a threshold, in a path with spaces."""
    torch.manual_seed(0)
    url = str(tmp_path_factory.mktemp("a run é") / "model")
    spec = ModelSpec(
        backbone="test_convnext",
        image_size=64,
        embedding_dim=16,
        threshold=0.1,
        fingerprint=fingerprint(ExtractionSettings()),
    )
    save_model(EmbeddingModel(spec), url)
    return url


@pytest.fixture(scope="session")
def faces_rows(faces_url: str) -> list[dict]:
    """Return the rows of that table, with their splits, by photo."""
    rows = [
        {**row, "split": path.parent.name.removeprefix("split=")}
        for path in Path(faces_url).glob("split=*/*.parquet")
        for row in pq.ParquetFile(path).read().to_pylist()
    ]
    return sorted(rows, key=lambda row: row["photo"])


@pytest.fixture(scope="session")
def aligned(faces_rows: list[dict]) -> list[dict]:
    """Return those with a face: which of the drawn photos that is differs a little between CPUs."""
    return [row for row in faces_rows if row["status"] == table.ALIGNED]


@pytest.fixture(scope="session")
def faces_url(
    made_once: Callable[[str, Callable[[Path], object]], Path], sample_data: Path, request: pytest.FixtureRequest
) -> str:
    """Return the faces table that preprocess makes of the drawn people."""

    def preprocess(folder: Path) -> None:
        head: RayHead = request.getfixturevalue("head")  # only where the table is made
        done = run_job("preprocess.py", "--data", str(sample_data), "--faces", str(folder), extra=head.environment)
        assert done.status == 0, done.errors

    return str(made_once("faces é", preprocess))
