"""Faces that leave into a bucket, in each format, and come back. Shards are written in this process."""

from contextlib import nullcontext
from typing import Any

import pytest

from lib import storage
from lib.faces import export_faces
from lib.faces.aligned import aligned_tables
from lib.faces.manifest import read_manifest
from lib.faces.part_plan import plan_parts
from lib.faces.photo_parts import part_item
from lib.faces.sources.opening import open_source
from lib.part_workers import Processed
from lib.recognition.export_job import ExportConfig, FacesOut, export
from tests.faces.test_aligned import how
from tests.test_export_faces_job import faces_in
from tests.training.learnable_faces import SIZE, write_faces


def run_here(items: list[dict[str, Any]], worker: type, arguments: tuple, **_: Any) -> Processed:
    """Stand in for the cluster."""
    one = worker(*arguments)
    done = [one(item) for item in items]
    assert not [each["failure"] for each in done if each["failure"]]
    return Processed(num=sum(each["count"] for each in done))


def crops_of(url: str) -> list[tuple[str, bytes]]:
    """Return identity and JPEG of each photo that was exported to a URL."""
    source = open_source(url)
    plan = plan_parts(read_manifest(source, None, split_seed=0, identities_required=True), "content")
    parts = [part_item(plan, part) for part in plan.parts]
    tables = [made for part in parts for made, _ in aligned_tables(source, part, how("none", SIZE), 100).values()]
    return sorted((row["identity"], row["crop"]) for each in tables for row in each.to_pylist())


def test_faces_leave_into_a_bucket_in_each_format_and_come_back(
    tmp_path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_faces, "run_parts", run_here)
    monkeypatch.setattr(export_faces.cluster, "connected", nullcontext)
    local = write_faces(tmp_path / "it's é", people={"train": 6}, photos=3)
    for info in storage.list_files(local, skip_prefixes=(".",)):
        storage.write_bytes(f"{s3_bucket}/my faces é/{info.path}", storage.read_bytes(f"{local}/{info.path}"))
    expected = [(identity, crop) for _, identity, crop in faces_in(local)]
    out = FacesOut(splits=("train",), shard_faces=7)
    for to in ("webdataset", "folder", "parquet"):
        output = f"{s3_bucket}/out ü/{to}"
        config = ExportConfig(to=to, faces=f"{s3_bucket}/my faces é", output=output, faces_out=out)
        assert export(config)["faces_written"] == 18
        assert crops_of(output) == sorted(expected), to
        assert export(config)["faces_written"] == 0
        # A shard that a killed job had not written is written by the next.
        shard = {"webdataset": "000001.tar", "folder": "_written/000001", "parquet": "train-00001-of-00003.parquet"}[to]
        storage.remove(f"{output}/{shard}")
        storage.remove(f"{output}/_EXPORTED")
        assert export(config)["faces_written"] == 7
        assert crops_of(output) == sorted(expected), to
