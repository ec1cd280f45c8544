"""A disk that is full costs the cache and not the run: the same crops are read from the table, in the same rows."""

import errno
import logging
import os
import shutil
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lib import storage
from lib.faces import table
from lib.faces.face_filter import face_filter
from lib.scratch import node_scratch
from lib.training import cache_files
from lib.training.augmentation import Making
from lib.training.cache_building import Only, _kept_rows, build_cache
from lib.training.cache_files import CacheFullError, default_folder
from lib.training.decoders import Decoders
from lib.training.face_cache import FaceCache
from lib.training.loading import BatchLoader, LoadTask
from lib.training.set_cache import SetFaces
from lib.training.settings import TrainConfig
from lib.training.table_crops import cached_faces, cached_set
from lib.training.validation import Validation
from lib.training.validation_sources import own_people
from tests.training.learnable_faces import write_faces as write_many
from tests.training.test_face_cache import face
from tests.training.test_validation_sources import write_set

ROWS = [
    *(face(number, f"person {number % 5}") for number in range(40)),
    face(3, "person 3, whose photo is a copy"),
    face(40, None),
    face(41, "person 1", table.NO_FACE),
    {**face(42, "person 2"), "crop": b"no picture"},
    {**face(43, "person 2"), "crop": b""},
]


@pytest.fixture
def faces(tmp_path: Path) -> str:
    """Make a table as preprocess does, without compression: the middle part has more than a dictionary holds."""
    url = str(tmp_path / "a face's “folder” é")
    large = np.random.default_rng(0).bytes(300_000)
    many = [{**face(100 + number, f"person {number % 7}"), "crop": large[number:]} for number in range(9)]
    for name, rows in (("part-0", ROWS[:20]), ("part-1", many), ("part-2", ROWS[20:])):
        made = table.faces_table([{**row, "quality": float(place % 3)} for place, row in enumerate(rows)], "{}")
        storage.write_parquet(storage.join(url, f"split=train/{name}.parquet"), made, compression="none")
    storage.write_json(storage.join(url, table.SUCCESS_NAME), {"run_id": "1", "fingerprint": {}, "counts": {}})
    return url


@contextmanager
def full_disk() -> Iterator[None]:
    usage = namedtuple("usage", "total used free")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10, 0, 10))
        yield


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"photos_limit": 20},
        {"only": Only(column="identity", names=pa.array(["person 1", "person 6"]))},
        {"taken": face_filter(0.5, "")},
    ],
    ids=["all", "some people", "some names", "some faces"],
)
def test_the_rows_and_crops_are_those_of_the_cache(
    faces: str, tmp_path: Path, choice: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    cache = FaceCache(build_cache(faces, ["train"], str(tmp_path / "cache"), **choice))
    with full_disk():
        found = cached_faces(faces, ["train"], str(tmp_path / "full"), **choice)
    assert not found.path
    assert len(found) > 4
    assert found.photos.to_pylist() == cache.photos.to_pylist()
    assert found.identities == cache.identities
    assert found.labels_N.tolist() == cache.labels_N.tolist()
    rows = np.random.default_rng(0).permutation(len(cache))
    at_hand = found.at_hand(rows)
    for row in rows.tolist():
        assert found.crop_bytes(row).tobytes() == at_hand.crop_bytes(row).tobytes() == cache.crop_bytes(row).tobytes()
    (line,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert line.startswith("--cache-dir ")
    assert line.endswith("choose another folder: this node reads the crops from the table instead, which is slower")
    assert not list((tmp_path / "full").glob("*.arrow"))


def test_batches_have_the_same_images(faces: str, tmp_path: Path) -> None:
    with full_disk():
        found = cached_faces(faces, ["train"], str(tmp_path / "full"))
    cache = FaceCache(build_cache(faces, ["train"], str(tmp_path / "cache")))
    task = LoadTask(rows=np.array([[0, 3], [3, len(cache) - 2]]), first_draw=5)
    ours, theirs = (BatchLoader(cache=each, size=16, level="strong", seed=1, epoch=2)(task) for each in (found, cache))
    np.testing.assert_array_equal(ours.images, theirs.images)
    assert ours.failed.tolist() == theirs.failed.tolist() == [False, False, False, True]
    making, rows = Making(level="none", crop_size=cache.crop_size, size=16), task.rows.ravel()
    images = np.empty((2, len(rows), 16, 16, 3), np.uint8)
    with Decoders(1) as decoders:
        for each, filled in zip((cache, found), images, strict=True):
            decoders.filling(making)(filled, each.at_hand(rows), rows, None)
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_array_equal(found.decode(task.rows.ravel(), 16)[0], cache.decode(task.rows.ravel(), 16)[0])


def test_compressed_parts_cannot_be_read_so_and_the_disk_is_named(faces: str, tmp_path: Path) -> None:
    url = storage.join(faces, "split=train/part-0.parquet")
    storage.write_parquet(url, storage.read_parquet(url), compression="zstd")
    with full_disk(), pytest.raises(CacheFullError, match="is full: the crops need"):
        cached_faces(faces, ["train"], str(tmp_path / "full"))


def test_one_worker_of_a_node_tells_it(
    faces: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with full_disk():
        cached_faces(faces, ["train"], str(tmp_path / "full"))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_disk_that_fills_while_a_cache_is_written_or_is_full_before_is_the_same(
    faces: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_files, "_written", fail)
    assert not cached_faces(faces, ["train"], str(tmp_path / "full")).path
    monkeypatch.setattr(Path, "mkdir", fail)
    assert not cached_faces(faces, ["train"], str(tmp_path / "fuller")).path


def test_a_set_is_then_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    url = write_set(tmp_path / "lfw.bin", range(20, 30))
    faces = SetFaces(url=url, num_bytes=1, mark="1")
    cache = cached_set(faces, str(tmp_path / "cache"))
    assert cache.path
    monkeypatch.setattr(cache_files, "_written", fail)
    found = cached_set(faces, str(tmp_path / "full"))
    assert not found.path
    assert found.photos.to_pylist() == cache.photos.to_pylist()
    assert [bytes(found.crop_bytes(row)) for row in range(120)] == [bytes(cache.crop_bytes(row)) for row in range(120)]


@pytest.mark.parametrize("val_photos", [16, 40, 1000])
def test_validation_copies_its_own_people_alone_and_judges_by_the_same_pairs(tmp_path: Path, val_photos: int) -> None:
    url = write_many(tmp_path / "faces", people={"train": 4, "val": 20}, photos=4)
    config = TrainConfig.of(data=str(tmp_path), val_photos=val_photos, val_pairs=100, seed=3)
    people = own_people(config, None).people
    assert people.only is not None
    own = FaceCache(build_cache(url, ["val"], str(tmp_path / "own"), only=people.only))
    whole = FaceCache(build_cache(url, ["val"], str(tmp_path / "whole")))
    assert len(own) == min(val_photos, 80)
    by_own, by_whole = Validation(own, config), Validation(whole, config)
    assert by_own.rows_V.tolist() == list(range(len(own)))
    assert own.photos.to_pylist() == whole.photos.take(pa.array(by_whole.rows_V)).to_pylist()
    assert by_own.problem == by_whole.problem == ""
    for name in ("a_P", "b_P", "same_P", "fold_P"):
        assert getattr(by_own._pairs, name).tolist() == getattr(by_whole._pairs, name).tolist()
    assert by_own._triplets.negatives.tolist() == by_whole._triplets.negatives.tolist()


def test_parts_without_a_wanted_face_are_not_copied_from(tmp_path: Path) -> None:
    url = write_many(tmp_path / "faces", people={"val": 8}, photos=4)
    only = Only(column="identity", names=pa.array(["person 6"]))
    parts = [storage.join(url, f"split=val/part-00000{number}.parquet") for number in range(2)]
    batches = [_kept_rows(only, face_filter(0.0, ""), part) for part in parts]
    assert batches[0] == []
    assert sum(map(len, batches[1])) == 4


def test_copies_stay_where_the_next_job_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NODE_SCRATCH", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "of a job"))
    assert node_scratch() == tmp_path / "of a job"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert node_scratch() == Path("/tmp"), "the temporary folder of a Slurm job goes with it"
    monkeypatch.setenv("NODE_SCRATCH", str(tmp_path / "site"))
    assert node_scratch() == tmp_path / "site"
    (tmp_path / "site").mkdir()
    assert default_folder() == str(tmp_path / "site" / f"conv-facenet-{os.geteuid()}")
