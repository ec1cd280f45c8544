"""A node holds the crops of some people, others in each epoch, and trains on them alone."""

import errno
import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lib import storage
from lib.errors import UserError
from lib.faces import table
from lib.recognition.model import ModelSpec
from lib.training import cache_files, collective, confusable, mining, node_share
from lib.training.augmentation import Making
from lib.training.cache_building import build_cache, size_of_crops
from lib.training.control import StopRequests, WorkerJob
from lib.training.decoders import Decoders
from lib.training.embedding_passes import StoreUpkeep
from lib.training.face_cache import FaceCache
from lib.training.first_checkpoint import begin
from lib.training.loop import Worker
from lib.training.meeting import Meeting
from lib.training.node_share import NodeShare, dealt_people, own_place
from lib.training.settings import TrainConfig
from lib.training.triplets import PhotoIndex
from tests.training.learnable_faces import write_faces

PEOPLE, PHOTOS = 24, 6
NONE: Any = SimpleNamespace(remote=lambda *_, **__: None)
CONTROL: Any = SimpleNamespace(tell=NONE, count=NONE)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("data") / "it's faces")
    return write_faces(url, people={"train": PEOPLE, "val": 3}, photos=PHOTOS, broken=("person 5/“3”.jpg",))


def gb_of(faces: str, share: float) -> float:
    """Return a share of the table's crops, in GB."""
    urls = [storage.join(faces, "split=train", f"part-00000{number}.parquet") for number in range(2)]
    return size_of_crops(urls)[0] * share / 1e9


def worker_of(faces: str, folder: Path, share: float, **settings: Any) -> Worker:
    config = TrainConfig.of(
        **{
            "data": str(folder),
            "faces": faces,
            "cache_dir": str(folder / "a cache"),
            "cache_size": gb_of(faces, share),
            "backbone": "test_convnext",
            "init": "none",
            "batch_size": 16,
            "negatives": "random",
            **settings,
        }
    )
    spec = begin(config, {}, ModelSpec(backbone=config.backbone, embedding_dim=8, image_size=32))
    return Worker(WorkerJob(config=config, spec=spec), CONTROL, torch.device("cpu"))


def shares(folder: Path) -> list[Path]:
    return sorted((folder / "a cache").glob("faces-share-*.arrow"))


def test_people_are_dealt_out_whole_within_the_bound_and_anew_in_each_epoch() -> None:
    labels_N = np.random.default_rng(0).integers(0, 40, 400)
    counts_I = np.bincount(labels_N)
    met = set()
    for epoch in range(200):
        dealt = dealt_people(labels_N, num_nodes=3, most_photos=90, seed=1, epoch=epoch)
        assert (np.sum(dealt, axis=0) <= 1).all()
        for held_I in dealt:
            assert 60 < counts_I[held_I].sum() <= 90
            met |= set(itertools.combinations(np.flatnonzero(held_I).tolist(), 2))
    assert met == set(itertools.combinations(range(40), 2))
    roomy = dealt_people(labels_N, num_nodes=3, most_photos=400, seed=1, epoch=0)
    assert (np.sum(roomy, axis=0) == 1).all()


@pytest.mark.parametrize(
    "settings",
    [{}, {"batch": "triplets"}, {"batch": "photos", "loss": "arcface", "center_lr": 0.01}],
    ids=["identities", "triplets", "photos"],
)
def test_an_epoch_trains_on_the_people_that_are_held_and_the_next_on_others(
    faces: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(StopRequests, "was_asked", lambda _: False)
    worker = worker_of(faces, tmp_path, 0.5, **settings)
    cache = worker.data.train
    assert len(cache) == PEOPLE * PHOTOS
    used, held = [], []
    for epoch in (1, 2):
        worker.state.progress = worker.state.progress.__class__(epoch=epoch)
        worker._hold_share()
        assert cache.held is not None
        assert 8 <= cache.held.people_I.sum() <= PEOPLE / 2
        steps = worker.train_epoch()
        used.append(steps.was_used_N)
        held.append(cache.held.rows_N)
        assert (used[-1] <= held[-1]).all()
        assert worker.anchors_per_epoch == held[-1].sum()
        (file,) = shares(tmp_path)
        assert file.stat().st_size <= 1.3 * gb_of(faces, 0.5) * 1e9 + 10_000
    assert (held[0] != held[1]).any()
    assert used[1].sum() > 20
    assert len(cache.failed_rows) <= 1


def test_held_rows_have_the_crops_of_the_table_and_others_none(faces: str, tmp_path: Path) -> None:
    worker = worker_of(faces, tmp_path, 0.4)
    cache, whole = worker.data.train, FaceCache(build_cache(faces, ["train"], str(tmp_path / "whole")))
    assert cache.photos.to_pylist() == whole.photos.to_pylist()
    assert cache.labels_N.tolist() == whole.labels_N.tolist()
    assert cache.crop_size == whole.crop_size
    assert cache.held is not None
    rows = np.flatnonzero(cache.held.rows_N)
    for row in rows.tolist():
        assert cache.crop_bytes(row).tobytes() == whole.crop_bytes(row).tobytes()
    with pytest.raises(KeyError):
        cache.crop_bytes(int(np.flatnonzero(~cache.held.rows_N)[-1]))
    making = Making(level="none", crop_size=cache.crop_size, size=16)
    images = np.empty((2, len(rows), 16, 16, 3), np.uint8)
    with Decoders(1) as decoders:
        decoders.filling(making)(images[0], cache.at_hand(rows), rows, None)
        making.fill(images[1], whole, rows, None)
        np.testing.assert_array_equal(images[0], images[1])
        assert worker.data.share is not None
        worker.data.share.hold(2, Meeting(CONTROL))
        rows = np.flatnonzero(cache.held.rows_N)[: len(rows)]
        decoders.filling(making)(images[0, : len(rows)], cache.at_hand(rows), rows, None)
        making.fill(images[1, : len(rows)], whole, rows, None)
        np.testing.assert_array_equal(images[0, : len(rows)], images[1, : len(rows)])


def test_a_part_without_a_face_keeps_the_numbers_of_the_rows(faces: str, tmp_path: Path) -> None:
    other = tmp_path / "faces"
    shutil.copytree(faces, other)
    rows = [{"photo": f"{n}.jpg", "identity": None, "status": table.NO_FACE, "crop": None} for n in range(5)]
    url = str(other / "split=train" / "part-0000005.parquet")  # between the two
    storage.write_parquet(url, table.faces_table(rows, "{}"), compression="none")
    worker = worker_of(str(other), tmp_path, 0.5)
    whole = FaceCache(build_cache(faces, ["train"], str(tmp_path / "whole")))
    cache = worker.data.train
    assert cache.held is not None
    assert cache.photos.to_pylist() == whole.photos.to_pylist()
    for row in np.flatnonzero(cache.held.rows_N).tolist():
        assert cache.crop_bytes(row).tobytes() == whole.crop_bytes(row).tobytes()


def test_a_start_within_an_epoch_finds_its_crops_again(faces: str, tmp_path: Path) -> None:
    worker_of(faces, tmp_path, 0.5)
    (file,) = shares(tmp_path)
    made = file.stat().st_mtime_ns
    worker_of(faces, tmp_path, 0.5)
    assert file.stat().st_mtime_ns == made


def test_crops_that_fit_are_all_there_as_without_a_bound(faces: str, tmp_path: Path) -> None:
    worker = worker_of(faces, tmp_path, 1.1)
    assert worker.data.share is None
    assert worker.data.train.held is None
    assert not shares(tmp_path)


def test_a_bound_too_small_for_a_batch_or_for_two_people_is_refused(faces: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--cache-size has room for too few people .* batches have 8 photos .* of 16"):
        worker_of(faces, tmp_path, 2.5 / PEOPLE)
    with pytest.raises(UserError, match="--cache-size has room for 1 people on a node: raise it"):
        worker_of(faces, tmp_path / "one", 1.5 / PEOPLE)
    with pytest.raises(UserError, match="--negatives exact"):
        TrainConfig.of(data="d", cache_size=1.0, negatives="exact", batch="triplets")
    with pytest.raises(UserError, match="--cache-size"):
        TrainConfig.of(data="d", cache_size=-1.0)


def test_a_full_disk_is_one_line_and_the_held_rows_come_from_the_table(
    faces: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = cache_files._written

    def fail(path: Path, batches: Any, schema: pa.Schema) -> int:
        if "share" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, batches, schema)

    monkeypatch.setattr(cache_files, "_written", fail)
    worker = worker_of(faces, tmp_path, 0.5)
    whole = FaceCache(build_cache(faces, ["train"], str(tmp_path / "whole")))
    assert caplog.text.count("this node reads the crops from the table instead") == 1
    assert worker.data.train.held is not None
    for row in range(len(whole)):
        assert worker.data.train.crop_bytes(row).tobytes() == whole.crop_bytes(row).tobytes()
    assert not shares(tmp_path)


def test_nodes_are_told_apart_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = ["b", "a", "b", "c", "b"]
    monkeypatch.setattr(collective, "from_all", lambda _: hosts)
    places = []
    for rank in range(5):
        monkeypatch.setattr(collective, "rank", lambda rank=rank: rank)
        places.append(own_place())
    assert [(place.node, place.worker, place.num_workers) for place in places] == [
        *((1, 0, 3), (0, 0, 1), (1, 1, 3), (2, 0, 1), (1, 2, 3))
    ]
    assert {place.num_nodes for place in places} == {3}


def two_nodes(faces: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[NodeShare]:
    """Return the shares of two nodes of one worker each."""
    found = []
    for rank in range(2):
        monkeypatch.setattr(node_share, "own_place", lambda rank=rank: node_share.Place(rank, 2, 0, 1))
        share = worker_of(faces, folder / f"node {rank}", 0.4).data.share
        assert share is not None
        found.append(share)
    return found


def test_two_nodes_hold_different_people_and_fill_the_store_with_all_that_they_hold(
    faces: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (share.cache for share in two_nodes(faces, tmp_path, monkeypatch))
    assert first.held is not None
    assert second.held is not None
    assert not (first.held.rows_N & second.held.rows_N).any()
    np.testing.assert_array_equal(first.held.on_any_node_N, first.held.rows_N | second.held.rows_N)
    embedded = []
    for rank, cache in enumerate((first, second)):
        stamps = np.full(len(cache), 7)
        stamps[:30] = -1
        store: Any = SimpleNamespace(stamps=lambda stamps=stamps: stamps, flush=lambda: None)
        seen: list[np.ndarray] = []
        over = SimpleNamespace(over=lambda rows, *_, seen=seen: seen.append(rows) or iter(()))
        upkeep = StoreUpkeep(store=store, cache=cache, embedding=over)  # type: ignore[arg-type]
        monkeypatch.setattr(collective, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(collective, "num_workers", lambda: 2)
        monkeypatch.setattr(collective, "broadcast", lambda value: value)
        rows = upkeep._rows_to_refresh(np.arange(60), 0.6)
        num = upkeep._embed(rows, None, 0)  # type: ignore[arg-type]
        (mine,) = seen
        assert cache.held is not None
        assert cache.held.rows_N[mine].all()
        embedded.append(mine)
        assert num == len(rows) == round(0.6 * first.held.on_any_node_N.sum())
    both = np.sort(np.concatenate(embedded))
    np.testing.assert_array_equal(both, rows)
    missing = np.flatnonzero(first.held.on_any_node_N[:30])
    assert set(missing) <= set(both.tolist())


def test_what_is_mined_is_held() -> None:
    labels_N = np.repeat(np.arange(20), 5)
    held_N = np.isin(labels_N, [1, 4, 9, 16])
    pool = mining.draw_candidates(
        labels_N[held_N][:4], labels_N, num_candidates=10, rng=np.random.default_rng(0), filled_N=held_N
    )
    assert held_N[pool.rows].all()
    means = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    among_I = np.isin(np.arange(20), [1, 4, 9, 16])
    found = confusable.confusable_people(np.array([1, 4]), [(0, lambda: means)], num_neighbours=5, among_I=among_I)
    assert set(found.ravel().tolist()) <= {1, 4, 9, 16, -1}
    assert (found >= 0).sum(axis=1).tolist() == [3, 3]
    index = PhotoIndex(labels_N, held_N=held_N)
    assert index.pairable.tolist() == [1, 4, 9, 16]
