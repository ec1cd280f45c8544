"""A folder that many workers list: it has the photos that one listing finds, after any number of kills too."""

import json
import os
import time
from collections import Counter
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lib import storage
from lib.errors import JobError, UserError
from lib.faces import scanning, shared_listing
from lib.faces.manifest import read_manifest
from lib.faces.shared_listing import Lister, SharedListing, _prefixes
from lib.faces.sources.folder import FolderSource
from lib.faces.sources.opening import open_source
from tests.job_runner import RayHead

PEOPLE = [f"person{n:03d}" for n in range(25)] + ["person", "é", "a b", "x-y", "X"]
NAMES = [f"{person}/{n}.jpg" for person in PEOPLE for n in range(4)]
NAMES += ["top.jpg", "person00.jpg", "notes.txt", ".hidden/1.jpg", "x/deep/er/1.PNG", "x/deep/2.doc", "x y/#1+%20.jpg"]


def listed(source: FolderSource, kept_url: str) -> list[dict[str, Any]]:
    shared = SharedListing(source, kept_url)
    shared.make(lambda _: None)
    return sorted_rows(pa.Table.from_batches(shared.batches()))


def sorted_rows(table: pa.Table) -> list[dict[str, Any]]:
    return table.sort_by("photo").to_pylist()


def by_one(source: FolderSource) -> list[dict[str, Any]]:
    return sorted_rows(pa.Table.from_batches(batch for shard in source.shards() for batch in source.scan(shard)))


def opened(url: str) -> FolderSource:
    source = open_source(url)
    assert isinstance(source, FolderSource)
    return source


@pytest.fixture(params=["disk", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    url = request.getfixturevalue("s3_bucket") + "/a b" if request.param == "s3" else str(tmp_path / "my photos")
    for name in NAMES:
        storage.write_bytes(storage.join(url, name), name.encode())
    return url


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run the units in this process, as a worker would; return the list of those that ran."""
    ran: list[str] = []

    def run_parts(items: list[dict[str, Any]], worker: type, arguments: tuple[Any, ...], **_: Any) -> None:
        for item in items:
            ran.append(item["unit"])
            done = worker(*deepcopy(arguments))(item)
            if done["failure"]:
                raise JobError(done["failure"])

    monkeypatch.setattr(shared_listing, "run_parts", run_parts)
    monkeypatch.setattr(shared_listing.cluster, "connected", nullcontext)
    monkeypatch.setattr(shared_listing, "UNITS", 6)
    return ran


@pytest.mark.parametrize("enough", [2, 16, 1000])
def test_many_workers_find_what_one_finds(
    url: str, tmp_path: Path, here: list[str], monkeypatch: pytest.MonkeyPatch, enough: int
) -> None:
    monkeypatch.setattr(shared_listing, "ENOUGH_FOLDERS", enough)
    monkeypatch.setattr(shared_listing, "PIECE_FILES", 5)
    one, many = opened(url), opened(url)
    assert listed(many, str(tmp_path / "kept")) == by_one(one)
    assert many.passed_over == one.passed_over == {".txt": 1, "hidden": 1, ".doc": 1}
    assert here


@pytest.mark.parametrize("is_large", [False, True])
def test_the_plan_shares_the_listing_of_a_large_folder_alone(
    tmp_path: Path, here: list[str], monkeypatch: pytest.MonkeyPatch, is_large: bool
) -> None:
    for name in NAMES:
        storage.write_bytes(str(tmp_path / "photos" / name), b"")
    if is_large:
        monkeypatch.setattr(scanning, "BATCH_ROWS", 10)
    source = opened(str(tmp_path / "photos"))
    manifest = read_manifest(source, None, identities_required=True, kept_url=str(tmp_path / "kept"))
    alone = read_manifest(opened(source.url), None, identities_required=True)
    assert manifest.photos.equals(alone.photos)
    assert manifest.num_passed_over == alone.num_passed_over
    assert bool(here) == (tmp_path / "kept").exists() == is_large


def test_workers_of_ray_find_what_one_finds(url: str, tmp_path: Path, connected_head: RayHead) -> None:
    assert listed(opened(url), str(tmp_path / "kept")) == by_one(opened(url))


def test_a_listing_that_was_cut_goes_on(
    url: str, tmp_path: Path, here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_listing, "PIECE_FILES", 10 if storage.is_local(url) else 3)
    kept, pieces = str(tmp_path / "kept"), Counter[str]()
    write = storage.write_parquet

    def cut(url: str, *arguments: Any, **options: Any) -> None:
        write(url, *arguments, **options)
        pieces[url] += 1
        if pieces.total() % 7 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(storage, "write_parquet", cut)
    rows = None
    for _ in range(100):
        try:
            rows = listed(opened(url), kept)
            break
        except KeyboardInterrupt:
            continue
    assert rows == by_one(opened(url))
    if not storage.is_local(url):
        assert max(pieces.values()) == 1  # a unit goes on after its last piece
    else:
        assert max(count for name, count in pieces.items() if Path(name).name.count(".") == 1) == 1
    here.clear()
    assert listed(opened(url), kept) == rows
    assert not here


@pytest.mark.parametrize("why", ["old", "of another folder"])
def test_a_listing_that_does_not_count_is_made_anew(tmp_path: Path, here: list[str], why: str) -> None:
    for name in NAMES:
        storage.write_bytes(str(tmp_path / "photos" / name), b"")
    kept = tmp_path / "kept"
    listed(opened(str(tmp_path / "photos")), str(kept))
    (tmp_path / "photos" / "new.jpg").write_bytes(b"")
    assert "new.jpg" not in {row["photo"] for row in listed(opened(str(tmp_path / "photos")), str(kept))}
    about = json.loads((kept / "begun.json").read_text())
    changed = {"time": time.time() - 2 * shared_listing.KEPT_FOR_S} if why == "old" else {"of": "other"}
    (kept / "begun.json").write_text(json.dumps({**about, **changed}))
    assert "new.jpg" in {row["photo"] for row in listed(opened(str(tmp_path / "photos")), str(kept))}


def test_links_are_followed_once(tmp_path: Path, here: list[str]) -> None:
    root, outside = tmp_path / "photos", tmp_path / "outside"
    for name in NAMES:
        storage.write_bytes(str(root / name), b"")
    for name in ("one/1.jpg", "one/sub/2.jpg"):
        storage.write_bytes(str(outside / name), b"")
    (root / os.fsdecode(b"caf\xe9")).mkdir()
    (root / os.fsdecode(b"caf\xe9") / "1.jpg").write_bytes(b"")
    (root / "link").symlink_to(outside / "one")
    (root / "x" / "again").symlink_to(outside / "one")
    (root / "person" / "sub").symlink_to(outside / "one" / "sub")
    (root / "person" / "loop").symlink_to(root)
    rows = listed(opened(str(root)), str(tmp_path / "kept"))
    assert rows == by_one(opened(str(root)))
    assert "caf\\xe9/1.jpg" in {row["photo"] for row in rows}


def test_files_of_two_formats_in_folders_of_two_workers_are_refused(url: str, tmp_path: Path, here: list[str]) -> None:
    source = opened(url)
    storage.write_bytes(storage.join(url, "zz other/a.tar"), b"")
    with pytest.raises((UserError, JobError), match=r"holds both pictures .*zz other/a\.tar"):
        listed(source, str(tmp_path / "kept"))


def test_a_failure_on_a_worker_ends_the_job(tmp_path: Path, here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Lister, item: dict[str, Any]) -> tuple[int, int]:
        raise UserError("the disk is full")

    for name in NAMES:
        storage.write_bytes(str(tmp_path / "photos" / name), b"")
    shared = SharedListing(opened(str(tmp_path / "photos")), str(tmp_path / "kept"))
    original = Lister.list_unit
    monkeypatch.setattr(
        Lister, "list_unit", lambda self, item: (fail if '"person' in item["unit"] else original)(self, item)
    )
    with pytest.raises(JobError, match="the disk is full"):
        shared.make(lambda _: None)


@pytest.mark.parametrize("most", [1, 3, 100])
def test_each_name_has_one_prefix_of_few_names(most: int) -> None:
    names = sorted({f"{name.partition('/')[0]}/" for name in NAMES if "/" in name})
    found = list(_prefixes(pa.array(names), 0, len(names), most))
    for name in names:
        assert sum(name.startswith(prefix) for prefix, _ in found) == 1
    for prefix, num in found:
        assert num == sum(name.startswith(prefix) for name in names) <= most
