"""Training and evaluation on faces of some quality: counted, the same for all workers, and said in the model."""

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib import storage
from lib.errors import UserError
from lib.faces import table
from lib.faces.face_filter import face_filter
from lib.training.cache_building import build_cache
from lib.training.face_cache import FaceCache
from lib.training.face_names import read_identities
from lib.training.settings import TrainConfig
from lib.training.train_job import train
from tests.job_runner import run_here
from tests.training.learnable_faces import SIZE, crop


@pytest.fixture
def faces(tmp_path: Path) -> str:
    """Return a table whose photo n of 8 of each person has the quality n / 8."""
    url = str(tmp_path / "faces")
    for split, people in (("train", range(6)), ("val", range(6, 10))):
        rows: list[dict[str, Any]] = [
            {
                "photo": f"{person}/{n}.jpg",
                "identity": str(person),
                "status": table.ALIGNED,
                "crop": crop(person, n),
                "quality": n / 8,
                "yaw": float(person),
            }
            for person in people
            for n in range(8)
        ]
        storage.write_parquet(f"{url}/split={split}/part-0.parquet", table.faces_table(rows, "{}"))
    fingerprint = {"id": "f", "image_size": SIZE}
    storage.write_json(f"{url}/_SUCCESS", {"run_id": "r", "fingerprint": fingerprint, "counts": {}})
    return url


def test_a_cache_holds_the_chosen_faces_in_the_order_of_their_identities(faces: str, tmp_path: Path) -> None:
    taken = face_filter(0.5, "yaw=:4")
    path = build_cache(faces, ["train"], str(tmp_path), taken=taken)
    cache = FaceCache(path)
    assert cache.photos.to_pylist() == [f"{person}/{n}.jpg" for person in range(5) for n in range(4, 8)]
    identities = read_identities(faces, ["train"], taken=taken)
    assert [cache.identities[label] for label in cache.labels_N] == identities.to_pylist()
    assert build_cache(faces, ["train"], str(tmp_path), photos_limit=8, taken=taken) != path
    assert build_cache(faces, ["train"], str(tmp_path)) != path


def test_training_says_how_many_are_left_out_in_log_and_model(
    faces: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lib")
    config = TrainConfig.of(
        data=str(tmp_path), backbone="test_convnext", init="none", min_quality=0.5, where="yaw=:4", gpus=0
    )
    seen: dict[str, Any] = {}

    def workers(job: Any, labels_N: np.ndarray) -> dict[str, Any]:
        seen.update(training=job.spec.training, photos=len(labels_N))
        return {}

    train(config, workers)
    assert seen == {"training": {"faces within": "quality=0.5:,yaw=:4", "faces left out": 28}, "photos": 20}
    assert "28 of 48 faces are left out: not within quality=0.5:,yaw=:4" in caplog.text
    with pytest.raises(UserError, match="min_quality"):
        train(config.replaced(min_quality=0.25), workers)


def test_nobody_within_and_tables_without_the_columns_are_told_in_one_line(faces: str, tmp_path: Path) -> None:
    flags = ["--data", str(tmp_path), "--backbone", "test_convnext", "--init", "none", "--dry-run"]
    done = run_here("train.py", *flags, "--where", "quality=0.99:")
    assert (done.status, "no face to train on is within quality=0.99:" in done.last_error) == (2, True)
    path = Path(faces) / "split=train" / "part-0.parquet"
    rows = storage.read_parquet(str(path)).drop_columns(["quality"])
    storage.write_parquet(str(path), rows)
    done = run_here("train.py", *flags, "--min-quality", "0.5")
    assert (done.status, "has no column quality" in done.last_error) == (2, True)


def test_evaluation_leaves_other_faces_out_and_says_so(
    faces_url: str, aligned: list[dict], model_url: str, tmp_path: Path
) -> None:
    flags = ["--model", model_url, "--faces", faces_url, "--split", "all", "--output", str(tmp_path / "out")]
    middle = float(np.median([row["quality"] for row in aligned]))
    num_in = sum(row["quality"] >= middle for row in aligned if row["identity"] is not None)
    done = run_here("evaluate.py", *flags, "--min-quality", str(middle), "--dry-run")
    assert done.status == 0, done.errors
    assert done.result["photos"] == num_in
    assert f"{len(aligned) - num_in} not within quality=" in done.errors
    names = [row["photo"] for row in sorted(aligned, key=lambda row: row["quality"])]
    pairs = [f"{a},{b},{n % 2}" for n, (a, b) in enumerate(itertools.pairwise(names))]
    (tmp_path / "pairs.csv").write_text("\n".join(["photo_a,photo_b,same", *pairs]))
    done = run_here(
        "evaluate.py", *flags, "--where", f"quality={middle}:", "--pairs", str(tmp_path / "pairs.csv"), "--dry-run"
    )
    assert done.status == 0, done.errors
    assert done.result["num_pairs"] == num_in - 1
    assert f"photos are left out ({len(aligned) - num_in} not within quality=" in done.errors
    done = run_here("evaluate.py", "--photos", str(tmp_path), "--min-quality", "0.5")
    assert (done.status, "leave --photos out" in done.last_error) == (2, True)
