"""Tables in several versions, and copies on nodes, without Ray: what forgetting takes out, and what it keeps."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from lib import parts, storage
from lib.faces import table
from lib.forgetting.forget_job import ForgetConfig, forget
from lib.recognition import embeddings_table
from lib.training.cache_files import CACHE_SCHEMA

PLAN = {"job": "embed", "fingerprint": {"faces_policy": "prominent"}}


def write_version(url: str, rows_of: dict[str, Sequence[tuple[str, str]]], keep_versions: int = 9) -> str:
    """Write a version of a table of embeddings with rows (photo, identity) by part; return its run_id."""
    schema = embeddings_table.schema(2, "{}", "{}")
    names = {
        parts.part_name("train", key, parts.digest_of(map(str, rows))): rows for key, rows in sorted(rows_of.items())
    }
    begun = parts.begin(parts.found_at(url), PLAN, list(names))
    for name, rows in names.items():
        columns = {
            "photo": [photo for photo, _ in rows],
            "identity": [identity for _, identity in rows],
            "status": [table.ALIGNED] * len(rows),
        }
        arrays = [pa.array(columns.get(field.name, [None] * len(rows)), field.type) for field in schema]
        storage.write_parquet(storage.join(url, name), pa.Table.from_arrays(arrays, schema=schema))
    about = {"fingerprint": PLAN["fingerprint"], "counts": {}}
    parts.finish_version(url, begun, list(names), about, keep_versions=keep_versions)
    return str(begun["run_id"])


def photos_of(url: str, run_id: str) -> list[str]:
    """Return the photos in the version with this id."""
    success = parts.read_success(url, what="embeddings", job="jobs/embed.py", run_id=run_id)
    assert success["run_id"] == run_id, f"version {run_id} is gone"
    tables = [storage.read_parquet(storage.join(url, name), table.columns("photo")) for name in success["parts"]]
    return sorted(pa.concat_tables(tables)["photo"].to_pylist())


def test_older_versions_without_the_person_stay_readable_and_others_go(tmp_path: Path) -> None:
    url = str(tmp_path / "embeddings é" / "m")
    ann, bob, cy = [("a.jpg", "Ann")], [("b.jpg", "Bob")], [("c.jpg", "Cy")]
    before = write_version(url, {"0": ann})
    with_bob = write_version(url, {"0": ann, "1": bob})
    relabelled = write_version(url, {"0": ann, "1": [("b.jpg", "Cy")], "2": cy})  # Bob's photo under another name
    without = write_version(url, {"0": ann, "2": cy})
    done = forget(ForgetConfig(data=str(tmp_path), identities=("Bob",)))
    assert (done["rows"], done["parts_removed"], done["parts_rewritten"]) == (0, 2, 0)
    assert (photos_of(url, before), photos_of(url, without)) == (["a.jpg"], ["a.jpg", "c.jpg"])
    kept = {success["run_id"] for success in parts.kept_successes(url)}
    assert kept == {before}
    assert not kept & {with_bob, relabelled}
    assert not any(b"b.jpg" in path.read_bytes() for path in Path(url).rglob("*") if path.is_file())


def test_the_version_that_readers_see_is_made_anew_and_an_older_one_stays(tmp_path: Path) -> None:
    url = str(tmp_path / "galleries" / "m")
    before = write_version(url, {"0": [("a.jpg", "Ann")]})
    write_version(url, {"0": [("a.jpg", "Ann")], "1": [("b.jpg", "Bob"), ("c.jpg", "Cy")]})
    for _ in range(2):  # the second time there is nothing to do
        forget(ForgetConfig(data=str(tmp_path), photos=("b.jpg",)))
        now = parts.finished_run_id(url)
        assert (photos_of(url, str(now)), photos_of(url, before)) == (["a.jpg", "c.jpg"], ["a.jpg"])


def write_cache(folder: Path, rows: Sequence[tuple[str, str]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "faces-0123.arrow"
    columns = [[photo for photo, _ in rows], [identity for _, identity in rows], [b"jpeg"] * len(rows)]
    batch = pa.RecordBatch.from_arrays([pa.array(column) for column in columns], names=CACHE_SCHEMA.names)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, CACHE_SCHEMA) as writer:
        writer.write_batch(batch.cast(CACHE_SCHEMA))
    return path


def test_another_node_loses_its_copy_even_if_it_knows_the_photo_by_an_older_label(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lib")
    data, url = tmp_path / "data", str(tmp_path / "data" / "embeddings" / "m")
    write_version(url, {"0": [("a.jpg", "Ann"), ("b.jpg", "Bob")]})
    first, second = tmp_path / "first node", tmp_path / "second node"
    copies = [write_cache(first, [("b.jpg", "Bob")]), write_cache(second, [("x.jpg", "X"), ("b.jpg", "Old label")])]
    innocent = second / "faces-4567.arrow"
    write_cache(tmp_path / "other", [("x.jpg", "X")]).rename(innocent)
    forget(ForgetConfig(data=str(data), identities=("Bob",), cache_dir=str(first)))
    assert [path.exists() for path in copies] == [False, True]
    done = forget(ForgetConfig(data=str(data), identities=("Bob",), cache_dir=str(second)))
    assert [path.exists() for path in (*copies, innocent)] == [False, False, True]
    assert (done["rows"], done["caches_removed"]) == (0, 1)
    assert forget(ForgetConfig(data=str(data), identities=("Bob",), cache_dir=str(second)))["receipt"] is None
