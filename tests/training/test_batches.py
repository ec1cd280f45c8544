"""The batches of an epoch on plain objects: which photos they hold, and that an epoch goes on where it was."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.training.batches import EpochBatches, EpochPlan
from lib.training.cache_building import build_cache
from lib.training.face_cache import FaceCache
from lib.training.settings import TrainConfig
from lib.training.suspects import SuspectLog
from lib.training.triplets import PhotoIndex
from tests.training.learnable_faces import write_faces

NUM_STEPS = 6
SETTINGS: dict[str, Any] = {"data": "d", "batch_size": 24}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FaceCache:
    folder = tmp_path_factory.mktemp("data")
    write_faces(folder / "faces", people={"train": 10}, photos=5)
    return FaceCache(build_cache(str(folder / "faces"), ["train"], str(folder)))


def epoch(cache: FaceCache, *, excluded: tuple[int, ...] = (), size: int = 16, **plan: Any) -> list[Any]:
    settings = plan.pop("settings", {})
    whole = EpochPlan(
        **{
            "config": TrainConfig.of(**{**SETTINGS, **settings}),
            "epoch": 1,
            "rank": 0,
            "first_step": 0,
            "num_steps": NUM_STEPS,
            "negatives": "random",
            **plan,
        }
    )
    index = PhotoIndex(cache.labels_N, excluded_rows=excluded)
    with EpochBatches(
        whole, cache, index, image_size=size, num_threads=2, store=None, suspects=SuspectLog()
    ) as batches:
        return [batch.loaded for batch in batches]


def test_a_batch_of_people_holds_as_many_different_photos_of_each(cache: FaceCache) -> None:
    made = epoch(cache)
    assert len(made) == NUM_STEPS
    for batch in made:
        assert batch.rows.shape == (6, 4)
        assert batch.images.shape == (24, 16, 16, 3)
        labels_PK = cache.labels_N[batch.rows]
        assert (labels_PK == labels_PK[:, :1]).all()
        assert len(set(labels_PK[:, 0])) == 6
        assert all(len(set(photos)) == 4 for photos in batch.rows.tolist())


def test_a_batch_of_triplets_has_its_positives_and_negatives(cache: FaceCache) -> None:
    for batch in epoch(cache, settings={"batch": "triplets"}):
        anchors, positives, negatives = batch.rows
        assert batch.rows.shape == (3, 8)
        assert (cache.labels_N[anchors] == cache.labels_N[positives]).all()
        assert (anchors != positives).all()
        assert (cache.labels_N[anchors] != cache.labels_N[negatives]).all()


@pytest.mark.parametrize("settings", [{}, {"batch": "triplets"}, {"batch": "photos", "loss": "arcface"}], ids=str)
def test_an_epoch_that_goes_on_has_the_batches_that_were_left(cache: FaceCache, settings: dict[str, Any]) -> None:
    whole = epoch(cache, settings=settings)
    rest = epoch(cache, settings=settings, first_step=4)
    assert len(rest) == 2
    for batch, again in zip(whole[4:], rest, strict=True):
        np.testing.assert_array_equal(batch.rows, again.rows)
        np.testing.assert_array_equal(batch.images, again.images)


def test_workers_share_an_order_in_which_each_photo_comes_once(cache: FaceCache) -> None:
    settings = {"batch": "photos", "loss": "arcface", "batch_size": 5}
    batches = [
        batch.rows
        for rank in range(2)
        for batch in epoch(cache, settings=settings, rank=rank, num_workers=2, num_steps=5)
    ]
    assert {rows.shape for rows in batches} == {(5, 1)}
    assert sorted(np.concatenate(batches).ravel().tolist()) == list(range(len(cache)))


@pytest.mark.parametrize("other", [{"epoch": 2}, {"rank": 1}, {"settings": {"seed": 5}}], ids=str)
def test_other_epochs_workers_and_seeds_draw_other_batches(cache: FaceCache, other: dict[str, Any]) -> None:
    assert not np.array_equal([batch.rows for batch in epoch(cache)], [batch.rows for batch in epoch(cache, **other)])


def test_photos_that_cannot_be_decoded_are_not_drawn_again(cache: FaceCache) -> None:
    excluded = tuple(range(0, len(cache), 7))
    for kind in ("identities", "triplets"):
        drawn = np.concatenate([b.rows.ravel() for b in epoch(cache, excluded=excluded, settings={"batch": kind})])
        assert not np.isin(drawn, excluded).any()


def test_a_crop_that_cannot_be_decoded_is_black_and_marked(tmp_path: Path) -> None:
    broken = ("person 0/“1”.jpg", "person 2/“0”.jpg")
    write_faces(tmp_path / "faces", people={"train": 6}, photos=4, broken=broken)
    damaged = FaceCache(build_cache(str(tmp_path / "faces"), ["train"], str(tmp_path)))
    bad_rows = {row for row, photo in enumerate(damaged.photos.to_pylist()) if photo in broken}
    for batch in epoch(damaged):
        assert np.isin(batch.rows.ravel(), list(bad_rows)).tolist() == batch.failed.tolist()
        assert not batch.images[batch.failed].any()
        assert batch.images[~batch.failed].any(axis=(1, 2, 3)).all()
    assert damaged.failed_rows == bad_rows
