"""The cache against the rows it was made from; builders that race, die and run out of disk are real processes."""

import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import storage
from lib.errors import JobError, UserError
from lib.faces import table
from lib.training import cache_building, cache_files, face_cache
from lib.training.cache_building import build_cache
from lib.training.face_cache import FaceCache, decode_jpeg
from lib.training.face_names import limited_identities, read_identities
from tests.training.learnable_faces import write_faces as write_many

SIZE = 24


def picture(number: int) -> np.ndarray:
    """Return a smooth picture, a different one for each number."""
    small = np.random.default_rng(number).integers(0, 256, (3, 3, 3), np.uint8)
    return cv2.resize(small, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)


def face(number: int, identity: str | None, status: str = table.ALIGNED) -> dict:
    crop = cv2.imencode(".jpg", picture(number), [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    photo = f"{identity}/it's “photo” {number}.jpg"
    return {"photo": photo, "identity": identity, "status": status, "crop": crop if status == table.ALIGNED else None}


def write_faces(url: str, parts: dict[str, list[dict]], run_id: str = "run 1") -> str:
    for name, rows in parts.items():
        storage.write_parquet(storage.join(url, name), table.faces_table(rows, "{}"), row_group_size=3)
    success = {"run_id": run_id, "fingerprint": {"id": "f"}, "counts": {"aligned": 1}}
    storage.write_json(storage.join(url, table.SUCCESS_NAME), success)
    return url


@pytest.fixture
def faces(tmp_path: Path) -> str:
    return write_faces(
        str(tmp_path / "a face's “folder” é"),
        {
            "split=train/part-00001.parquet": [face(4, "zoë"), face(5, "10")],
            "split=train/part-00000.parquet": [
                face(0, "zoë"),
                face(1, "9"),
                face(2, "9", table.NO_FACE),
                face(3, None),
            ],
            "split=val/part-00000.parquet": [face(n, "val") for n in range(6, 10)],
        },
    )


@pytest.fixture
def cache_dir(tmp_path: Path) -> str:
    return str(tmp_path / "it's a cache")


def start_builder(faces_url: str, cache_dir: str, prelude: str = "") -> subprocess.Popen:
    code = (
        "import logging, os, sys\n"
        "logging.basicConfig(level=logging.INFO)\n"
        f"{prelude}\n"
        "from lib.training.cache_building import build_cache\n"
        "print(build_cache(sys.argv[1], ['train'], sys.argv[2]), flush=True)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, faces_url, cache_dir],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


HANG_BEFORE_RENAME = "os.fsync = lambda _: (print('written', flush=True), sys.stdin.readline())"


def wait_until_waiting(builder: subprocess.Popen) -> None:
    while "waiting for another process" not in builder.stderr.readline():
        assert builder.poll() is None


def test_rows_stand_in_the_order_of_file_and_row_and_only_usable_ones(faces, cache_dir):
    cache = FaceCache(build_cache(faces, ["train"], cache_dir))
    expected = [face(0, "zoë"), face(1, "9"), face(4, "zoë"), face(5, "10")]
    assert len(cache) == 4
    assert cache.photos.to_pylist() == [row["photo"] for row in expected]
    assert [cache.crop_bytes(row).tobytes() for row in range(4)] == [row["crop"] for row in expected]
    assert cache.identities == ["10", "9", "zoë"]
    assert cache.labels_N.dtype == np.int32
    assert cache.labels_N.tolist() == [2, 1, 2, 0]
    assert cache.crop_size == SIZE


def test_decoded_crops_are_rgb_in_the_order_asked_for(faces, cache_dir):
    cache = FaceCache(build_cache(faces, ["train"], cache_dir))
    images_NHWC, failed_N = cache.decode(np.array([3, 0, 3]))
    assert images_NHWC.shape == (3, SIZE, SIZE, 3)
    assert not failed_N.any()
    for image_HWC, number in zip(images_NHWC, (5, 0, 5), strict=True):
        assert np.abs(image_HWC[..., ::-1].astype(int) - picture(number)).mean() < 4
    smaller_NHWC, _ = cache.decode(np.array([3]), size=SIZE // 2)
    area_means = images_NHWC[0].reshape(SIZE // 2, 2, SIZE // 2, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(smaller_NHWC[0], area_means, atol=0.6)


@pytest.mark.parametrize("splits", [["train", "val"], ["val"]])
def test_several_splits_stand_one_after_the_other_in_a_file_of_their_own(faces, cache_dir, splits):
    path = build_cache(faces, splits, cache_dir)
    assert path != build_cache(faces, ["train"], cache_dir)
    photos = FaceCache(path).photos.to_pylist()
    assert len(photos) == {1: 4, 2: 8}[len(splits)]
    assert photos[-4:] == [face(n, "val")["photo"] for n in range(6, 10)]


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(any), st.integers(1, 4))
def test_any_row_is_found_whatever_the_files_and_batches(tmp_path_factory, part_sizes, rows_per_batch):
    folder = tmp_path_factory.mktemp("faces")
    rows = [face(n, f"person {n % 3}") for n in range(sum(part_sizes))]
    ends = np.cumsum(part_sizes)
    parts = {
        f"split=train/part-{n:05d}.parquet": rows[end - size : end]
        for n, (size, end) in enumerate(zip(part_sizes, ends, strict=True))
    }
    with pytest.MonkeyPatch.context() as patch:
        for module in (cache_building, face_cache):
            patch.setattr(module, "ROWS_PER_BATCH", rows_per_batch)
        cache = FaceCache(build_cache(write_faces(str(folder / "faces"), parts), ["train"], str(folder / "cache")))
        assert [cache.crop_bytes(row).tobytes() for row in range(len(cache))] == [row["crop"] for row in rows]
        assert cache.photos.to_pylist() == [row["photo"] for row in rows]


def test_a_cache_that_is_there_is_not_made_again(faces, cache_dir):
    path = Path(build_cache(faces, ["train"], cache_dir))
    made = path.stat()
    assert build_cache(faces, ["train"], cache_dir) == str(path)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)


def test_faces_made_anew_get_a_cache_of_their_own_and_the_old_one_stays(faces, cache_dir, caplog):
    old = build_cache(faces, ["train"], cache_dir)
    write_faces(faces, {"split=train/part-00000.parquet": [face(8, "9"), face(9, "9")]}, run_id="run 2")
    with caplog.at_level(logging.INFO):
        new = build_cache(faces, ["train"], cache_dir)
    assert len(FaceCache(old)) == 4
    assert FaceCache(new).photos[0].as_py() == face(8, "9")["photo"]
    assert Path(old).name in caplog.text


def test_a_corrupt_crop_is_black_counted_and_named_once(tmp_path, cache_dir, caplog):
    rows = [face(n, "a") for n in range(4)]
    rows[0]["crop"] = b""
    rows[2]["crop"] = rows[2]["crop"][: len(rows[2]["crop"]) // 2]
    faces = write_faces(str(tmp_path / "faces"), {"split=train/part-0.parquet": rows})
    cache = FaceCache(build_cache(faces, ["train"], cache_dir))
    for _ in range(2):
        images_NHWC, failed_N = cache.decode(np.arange(4))
    assert failed_N.tolist() == [True, False, True, False]
    assert not images_NHWC[[0, 2]].any()
    assert images_NHWC[[1, 3]].any(axis=(1, 2, 3)).all()
    assert cache.failed_rows == {0, 2}
    assert caplog.text.count(rows[2]["photo"]) == 1


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_a_crop_can_be_decoded_at_a_fraction_of_its_size(reduction):
    jpeg = np.frombuffer(face(1, "a")["crop"], np.uint8)
    pixels = decode_jpeg(jpeg, reduction)
    side = SIZE // reduction
    area_means = picture(1)[..., ::-1].reshape(side, reduction, side, reduction, 3).mean(axis=(1, 3))
    assert pixels.shape == (side, side, 3)
    assert np.abs(pixels - area_means).mean() < 4


def test_a_folder_that_preprocess_has_not_finished_is_refused(faces, cache_dir):
    Path(faces, table.SUCCESS_NAME).unlink()
    for url in (faces, faces + " elsewhere"):
        with pytest.raises(UserError, match=r"run jobs/preprocess.py first"):
            build_cache(url, ["train"], cache_dir)


def test_splits_without_an_aligned_face_are_refused_and_leave_nothing(tmp_path, cache_dir):
    faces = write_faces(str(tmp_path / "f"), {"split=train/part-0.parquet": [face(0, "a", table.NO_FACE)]})
    for split in ("train", "test"):
        with pytest.raises(UserError, match=f"no photo in split {split} .* jobs/preprocess.py"):
            build_cache(faces, [split], cache_dir)
    assert not list(Path(cache_dir).glob("*.arrow"))
    assert not list(Path(cache_dir).glob("*.unfinished"))


def test_a_cache_folder_that_cannot_be_made_is_the_users_mistake(faces, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="--cache-dir"):
        build_cache(faces, ["train"], str(tmp_path / "file"))


def test_caches_are_their_users_alone(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = Path(cache_files.default_folder())
    assert folder.parent == tmp_path
    made = Path(build_cache(faces, ["train"], str(folder)))
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, made, made.with_suffix(".lock"))] == [
        *(0o700, 0o600, 0o600)
    ]
    folder.chmod(0o755)
    cache_files.default_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_default_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"conv-facenet-{os.geteuid()}").symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"is a link or another user's: name .* by --cache-dir"):
        cache_files.default_folder()
    monkeypatch.setattr(cache_files.os, "geteuid", lambda: 12345)
    (tmp_path / "conv-facenet-12345").mkdir()
    with pytest.raises(UserError, match="another user's"):
        cache_files.default_folder()


@pytest.mark.parametrize("suffix", [".lock", ".unfinished", ".arrow"])
def test_links_planted_in_the_folder_harm_nothing(faces, cache_dir, tmp_path, suffix):
    path = Path(build_cache(faces, ["train"], cache_dir))
    content = path.read_bytes()
    path.unlink()
    path.with_suffix(".lock").unlink()
    (tmp_path / "precious").write_text("precious")
    path.with_suffix(suffix).symlink_to(tmp_path / "precious")
    if suffix == ".unfinished":
        assert Path(build_cache(faces, ["train"], cache_dir)).read_bytes() == content
    else:
        with pytest.raises(UserError, match="--cache-dir"):
            build_cache(faces, ["train"], cache_dir)
    assert (tmp_path / "precious").read_text() == "precious"


def test_caches_that_no_training_uses_go_from_the_default_folder_alone(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for folder in (Path(cache_files.default_folder()), tmp_path / "named"):
        folder.mkdir(exist_ok=True)
        for days in (6, 8):
            (folder / f"faces-{days}.arrow").touch()
            os.utime(folder / f"faces-{days}.arrow", (time.time() - days * 24 * 3600,) * 2)
        build_cache(faces, ["train"], str(folder))
        assert (folder / "faces-6.arrow").exists()
        assert (folder / "faces-8.arrow").exists() == (folder.name == "named")


def test_a_cache_in_use_stays(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = build_cache(faces, ["train"], cache_files.default_folder())
    os.utime(path, (0, 0))
    build_cache(faces, ["train"], cache_files.default_folder())
    build_cache(faces, ["val"], cache_files.default_folder())
    assert Path(path).exists()


def test_faces_whose_crops_are_all_corrupt_are_refused(tmp_path, cache_dir):
    rows = [{**face(n, "a"), "crop": b"no picture"} for n in range(3)]
    faces = write_faces(str(tmp_path / "f"), {"split=train/part-0.parquet": rows})
    with pytest.raises(UserError, match="--overwrite"):
        FaceCache(build_cache(faces, ["train"], cache_dir))


def test_a_disk_known_to_be_too_small_fails_before_the_copy(faces, cache_dir, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 0, 10))
    with pytest.raises(JobError, match=r"it's a cache.* is full: the crops need [\d,]+ bytes"):
        build_cache(faces, ["train"], cache_dir)
    assert not list(Path(cache_dir).glob("*.arrow"))


def test_a_disk_that_fills_up_while_writing_leaves_nothing_behind(faces, cache_dir):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"
    out, err = start_builder(faces, cache_dir, limit).communicate(timeout=60)
    assert not out
    assert "CacheFullError" in err
    assert "bytes" in err.splitlines()[-1]
    assert [path.suffix for path in Path(cache_dir).iterdir()] == [".lock"]


def test_of_two_processes_one_builds_and_the_other_waits(faces, cache_dir):
    first = start_builder(faces, cache_dir, HANG_BEFORE_RENAME)
    assert first.stdout.readline() == "written\n"
    second = start_builder(faces, cache_dir)
    wait_until_waiting(second)
    out_1, err_1 = first.communicate("go on\n", timeout=60)
    out_2, err_2 = second.communicate(timeout=60)
    assert out_1 == out_2 == build_cache(faces, ["train"], cache_dir) + "\n"
    assert "made" in err_1
    assert "made" not in err_2


def test_a_builder_killed_at_its_end_leaves_nothing_and_the_waiting_one_takes_over(faces, cache_dir):
    first = start_builder(faces, cache_dir, HANG_BEFORE_RENAME)
    assert first.stdout.readline() == "written\n"
    second = start_builder(faces, cache_dir)
    wait_until_waiting(second)
    assert not list(Path(cache_dir).glob("*.arrow"))
    first.kill()
    first.communicate(timeout=10)
    out, err = second.communicate(timeout=60)
    assert "made" in err
    assert len(FaceCache(out.rstrip("\n"))) == 4
    assert not list(Path(cache_dir).glob("*.unfinished"))


def test_a_limit_keeps_whole_people_by_a_hash_and_a_larger_one_keeps_them_too(tmp_path, cache_dir):
    people = {"train": 20, "val": 2}
    url = write_many(str(tmp_path / "many"), people=people, photos=5)
    kept = {}
    for limit in (10, 33, 60, 1000):
        cache = FaceCache(build_cache(url, ["train"], cache_dir, photos_limit=limit))
        assert len(cache) == min(limit // 5, 20) * 5  # five photos of each, so that a limit is met but for the rest
        assert read_identities(url, ["train"], photos_limit=limit).to_pylist() == [
            cache.identities[label] for label in cache.labels_N
        ]
        kept[limit] = set(cache.identities)
    assert kept[10] < kept[33] < kept[60] < kept[1000]
    names = pa.chunked_array([[f"person {n}" for n in (7, 3, 5, 1)]])
    chosen = limited_identities(names, 2).to_pylist()
    assert chosen == limited_identities(pa.chunked_array([names.to_pylist()[::-1]]), 2).to_pylist()
    with pytest.raises(UserError, match="--photos-limit 9 leaves 1 of 20 people"):
        build_cache(url, ["train"], cache_dir, photos_limit=9)


def test_threads_read_at_once(faces, cache_dir):
    cache = FaceCache(build_cache(faces, ["train"], cache_dir))
    alone, _ = cache.decode(np.arange(4))
    with ThreadPoolExecutor(8) as pool:
        for images_NHWC, _ in pool.map(lambda _: cache.decode(np.arange(4)), range(50)):
            assert (images_NHWC == alone).all()


def test_faces_in_object_storage_are_cached_on_the_node(s3_bucket, faces, cache_dir, tmp_path):
    url = f"{s3_bucket}/it's “faces”"
    for path in sorted(Path(faces).rglob("*")):
        if path.is_file():
            storage.write_bytes(storage.join(url, *path.relative_to(faces).parts), path.read_bytes())
    local = FaceCache(build_cache(faces, ["train"], str(tmp_path / "local")))
    remote = FaceCache(build_cache(url, ["train"], cache_dir))
    assert remote.photos.equals(local.photos)
    assert (remote.decode(np.arange(4))[0] == local.decode(np.arange(4))[0]).all()
