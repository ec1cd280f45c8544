"""Augmentation against Pillow and SciPy, and the loader's promises: same images, same order, whatever the threads."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from scipy import ndimage

from lib.device import Upload
from lib.errors import UserError
from lib.faces import table
from lib.training.augmentation import MAX_ANGLE_DEG, Draw, augmented, auto_contrast_table, draws, output_to_crop
from lib.training.cache_building import build_cache
from lib.training.decoders import Decoders
from lib.training.face_cache import FaceCache, decode_jpeg
from lib.training.loading import BatchLoader, LoadTask, Prefetcher

UNCHANGED = Draw(
    flip=0.9,
    angle=0.5,
    auto_contrast=0.9,
    area=0.0,
    x=0.5,
    y=0.5,
    contrast=0.5,
    brightness=0.5,
    grey=0.9,
    blur=0.9,
    blur_sigma=0.5,
    jpeg=0.9,
    jpeg_quality=0.5,
)
shares = st.floats(0, 1, exclude_max=True)


def smooth(side: int, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(20, 220, (5, 5, 3), np.uint8)
    return cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC)


def encoded(side: int, seed: int = 0) -> np.ndarray:
    return cv2.imencode(".jpg", smooth(side, seed), [cv2.IMWRITE_JPEG_QUALITY, 95])[1]


@pytest.fixture
def cache(tmp_path: Path) -> FaceCache:
    rows = [
        {"photo": f"{n}.jpg", "identity": str(n % 3), "status": table.ALIGNED, "crop": encoded(48, n).tobytes()}
        for n in range(12)
    ]
    rows[5]["crop"] = b"no picture"
    (tmp_path / "faces" / "split=train").mkdir(parents=True)
    pq.write_table(table.faces_table(rows, "{}"), tmp_path / "faces" / "split=train" / "part-0.parquet")
    success = {"run_id": "made for tests", "fingerprint": {}, "counts": {}}
    (tmp_path / "faces" / table.SUCCESS_NAME).write_text(json.dumps(success))
    return FaceCache(build_cache(str(tmp_path / "faces"), ["train"], str(tmp_path / "cache")))


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(0, 255), st.integers(0, 255))
def test_auto_contrast_gives_what_pillow_gives(seed, side, low, high):
    low, high = min(low, high), max(low, high)
    image_HW3 = np.random.default_rng(seed).integers(low, high + 1, (side, side, 3), np.uint8)
    expected = np.array(ImageOps.autocontrast(Image.fromarray(image_HW3)))
    np.testing.assert_array_equal(cv2.LUT(image_HW3, auto_contrast_table(image_HW3)), expected)


def test_a_draw_of_no_change_gives_the_crop_and_a_flip_its_mirror_image():
    jpeg = encoded(40)
    plain = augmented(jpeg, UNCHANGED, level="original", crop_size=40, size=40)
    np.testing.assert_array_equal(plain, decode_jpeg(jpeg))
    flipped = augmented(jpeg, UNCHANGED._replace(flip=0.1), level="original", crop_size=40, size=40)
    np.testing.assert_array_equal(flipped, np.fliplr(plain))
    np.testing.assert_array_equal(augmented(jpeg, UNCHANGED, level="strong", crop_size=40, size=40), plain)


@settings(deadline=None, max_examples=30)
@given(shares, shares, shares, shares, st.floats(0.5, 1), st.sampled_from([24, 40, 56]))
def test_the_warp_is_the_crop_scaled_turned_and_mirrored_about_its_middle(flip, angle, x, y, side_share, size):
    side = 48
    pixels = smooth(side).astype(np.float64)
    draw = UNCHANGED._replace(flip=flip, angle=angle, x=x, y=y)
    matrix_23 = output_to_crop((side, side), size, draw, side_share)
    warped = cv2.warpAffine(
        pixels, matrix_23, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
    )

    # The same as complex numbers: offsets from the middle, in units of a side, mirrored, then turned.
    offsets = (np.arange(size) + 0.5) / size - 0.5
    points = (offsets[None, :] * (-1 if flip < 0.5 else 1)) + 1j * offsets[:, None]
    points = points * np.exp(1j * np.radians(MAX_ANGLE_DEG * (2 * angle - 1))) * side_share
    points += 0.5 + 0.5j + (1 - side_share) * ((x - 0.5) + 1j * (y - 0.5))
    places = np.stack([points.imag * side - 0.5, points.real * side - 0.5])
    expected = np.stack(
        [ndimage.map_coordinates(pixels[..., c], places, order=1, mode="nearest") for c in range(3)], -1
    )
    np.testing.assert_allclose(warped, expected, atol=2.0)  # OpenCV rounds places to 1/32 pixel


@pytest.mark.parametrize(("crop_size", "size"), [(240, 112), (240, 160), (96, 112), (240, 30), (50, 50)])
def test_shrinking_averages_areas_rather_than_skipping_pixels(crop_size, size):
    noise = np.random.default_rng(0).integers(0, 256, (crop_size // 2, crop_size // 2, 3), np.uint8)
    picture = cv2.resize(noise, (crop_size, crop_size), interpolation=cv2.INTER_LINEAR)
    jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 100])[1]
    image = augmented(jpeg, UNCHANGED, level="original", crop_size=crop_size, size=size)
    assert image.shape == (size, size, 3)
    by_area = cv2.resize(decode_jpeg(jpeg), (size, size), interpolation=cv2.INTER_AREA)
    by_skipping = cv2.resize(decode_jpeg(jpeg), (size, size), interpolation=cv2.INTER_NEAREST)
    error = np.abs(image.astype(int) - by_area).mean()
    if crop_size > size:
        assert error < 0.5 * np.abs(by_skipping.astype(int) - by_area).mean()
    else:
        assert error < 6


@settings(deadline=None)
@given(st.builds(Draw, *[shares] * len(Draw._fields)), st.sampled_from(["original", "strong"]))
def test_any_draw_gives_a_picture_of_the_size_asked_for(draw, level):
    image = augmented(encoded(48), draw, level=level, crop_size=48, size=20)
    assert image.shape == (20, 20, 3)
    assert image.dtype == np.uint8
    assert image.std() > 1


def test_strong_makes_grey_blurred_and_badly_compressed_pictures():
    jpeg = encoded(64)

    def made(**changes: float) -> np.ndarray:
        image = augmented(jpeg, UNCHANGED._replace(**changes), level="strong", crop_size=64, size=64)
        return image.astype(float)

    plain = made()
    grey = made(grey=0.0)
    assert (grey == grey[..., :1]).all()
    np.testing.assert_allclose(grey[..., 0], plain @ [0.299, 0.587, 0.114], atol=1)
    assert np.abs(np.diff(made(blur=0.0, blur_sigma=0.99), axis=0)).sum() < np.abs(np.diff(plain, axis=0)).sum()
    compressed = made(jpeg=0.0, jpeg_quality=0.0)
    assert 0 < np.abs(compressed - plain).mean() < 10
    assert made(brightness=0.99).mean() > plain.mean() > made(brightness=0.0).mean()
    assert made(contrast=0.99).std() > plain.std() > made(contrast=0.0).std()


def test_a_draw_depends_on_its_place_in_the_epoch_and_not_on_the_batch():
    all_NK = draws(0, 100, seed=3, epoch=2)
    np.testing.assert_array_equal(
        np.concatenate([draws(0, 33, seed=3, epoch=2), draws(33, 67, seed=3, epoch=2)]), all_NK
    )
    for others in ({"seed": 4}, {"epoch": 3}, {"rank": 1}):
        assert not (draws(0, 100, **{"seed": 3, "epoch": 2, **others}) == all_NK).any()
    assert len(np.unique(all_NK)) == all_NK.size
    np.testing.assert_allclose(draws(0, 20_000, seed=0, epoch=0).mean(axis=0), 0.5, atol=0.01)


@pytest.mark.parametrize("level", ["none", "original", "strong"])
def test_batches_come_in_order_and_alike_whatever_the_number_of_threads(cache, level):
    rows = np.random.default_rng(0).integers(0, 12, (20, 2, 3))
    tasks = [LoadTask(rows=rows_PK, first_draw=6 * n) for n, rows_PK in enumerate(rows)]
    loader = BatchLoader(cache=cache, size=24, level=level, seed=1, epoch=2)
    alone = [loader(task) for task in tasks]
    for num_threads in (1, 4):
        with Prefetcher(loader, tasks, num_threads=num_threads, num_ahead=3) as batches:
            for batch, expected in zip(batches, alone, strict=True):
                assert batch.rows is expected.rows
                np.testing.assert_array_equal(batch.images, expected.images)
    images = np.concatenate([batch.images for batch in alone])
    first_row, again = np.flatnonzero(rows.ravel() == rows.flat[0])[:2]
    assert (images[first_row] == images[again]).all() == (level == "none")


@pytest.mark.parametrize("level", ["none", "strong"])
def test_processes_make_the_images_that_threads_make(cache, level, caplog):
    rows = np.random.default_rng(0).integers(0, 12, (9, 5))
    task = LoadTask(rows=rows, first_draw=7)
    alone = BatchLoader(cache=cache, size=24, level=level, seed=1, epoch=2)(task)
    assert alone.failed.any()
    with Decoders(2) as decoders:
        pids = decoders.pids
        upload = Upload(torch.device("cpu"))
        loader = BatchLoader(cache=cache, size=24, level=level, seed=1, epoch=2, decoders=decoders, upload=upload)
        batch = loader(task)
        np.testing.assert_array_equal(batch.images, alone.images)
        np.testing.assert_array_equal(batch.failed, alone.failed)
        np.testing.assert_array_equal(batch.uploaded.tensor().numpy(), alone.images)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        np.testing.assert_array_equal(loader(task).images, alone.images)  # whatever becomes of the processes
        assert "a process that decodes crops died" in caplog.text
    assert not any(Path("/proc", str(pid)).exists() for pid in pids)


@pytest.mark.parametrize("level", ["none", "original", "strong"])
def test_a_corrupt_crop_is_marked_and_black(cache, level):
    loader = BatchLoader(cache=cache, size=24, level=level, seed=1, epoch=2)
    batch = loader(LoadTask(rows=np.array([4, 5, 6]), first_draw=0))
    assert batch.failed.tolist() == [False, True, False]
    assert not batch.images[1].any()
    assert cache.failed_rows == {5}


def test_an_error_while_loading_comes_in_its_turn():
    def load(number: int) -> int:
        if number == 3:
            raise UserError("number 3")
        return number

    seen = []
    with pytest.raises(UserError, match="number 3"), Prefetcher(load, range(9), num_threads=2, num_ahead=4) as loaded:
        seen.extend(loaded)
    assert seen == [0, 1, 2]


def test_no_more_is_drawn_than_is_kept_ahead():
    drawn = []

    def tasks():
        for number in range(100):
            drawn.append(number)
            yield number

    with Prefetcher(lambda number: number, tasks(), num_threads=2, num_ahead=3) as loaded:
        assert next(loaded) == 0
        assert len(drawn) == 4
        assert next(loaded) == 1
        assert len(drawn) == 5


def test_leaving_early_ends_the_threads_without_loading_the_rest():
    started = threading.Semaphore(0)
    loads = []

    def load(number: int) -> int:
        loads.append(number)
        started.release()
        time.sleep(0.02)
        return number

    before = threading.active_count()
    with Prefetcher(load, range(1000), num_threads=2, num_ahead=50) as loaded:
        next(loaded)
    assert threading.active_count() == before
    assert len(loads) < 20


def test_the_time_that_the_consumer_waited_is_measured_and_its_own_work_is_not():
    def load(number: int) -> int:
        time.sleep(0.05)
        return number

    began = time.perf_counter()
    with Prefetcher(load, range(2), num_threads=1, num_ahead=1) as loaded:
        for _ in loaded:
            time.sleep(0.1)
        assert 0.05 <= loaded.wait_s <= time.perf_counter() - began - 0.2


def test_no_tasks_give_no_batches():
    with Prefetcher(lambda task: task, [], num_threads=1, num_ahead=1) as loaded:
        assert list(loaded) == []
