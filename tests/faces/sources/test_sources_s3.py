"""Every format on a real S3 server: many photos of one file are read by ranges."""

import zipfile
from pathlib import Path

import pytest

from lib import storage
from lib.errors import UserError
from lib.faces.sources import recordio
from lib.faces.sources.opening import open_source
from tests.faces.sources.test_archives import SAMPLES, scanned, tar
from tests.faces.sources.test_recordio import images, in_a_run, insightface
from tests.faces.sources.test_tables import save_to_disk


def test_a_bucket_gives_what_a_disk_gives(tmp_path: Path, s3_bucket: str, monkeypatch) -> None:
    monkeypatch.setattr(recordio, "SHARD_BYTES", 1000)
    for name in ("rec", "tar", "gz", "zip"):
        (tmp_path / name).mkdir()
    insightface(tmp_path / "rec" / "train.rec", images(40), [float(n) for n in range(40)])
    tar(tmp_path / "tar" / "a b.tar", SAMPLES)
    tar(tmp_path / "gz" / "a.tar.gz", SAMPLES, "w:gz")
    with zipfile.ZipFile(tmp_path / "zip" / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ada/1.jpg", b"a photo" * 1000)
    save_to_disk(tmp_path / "arrow")
    for info in storage.list_files(str(tmp_path)):
        data = storage.read_bytes(str(tmp_path / info.path))
        storage.write_bytes(storage.join(s3_bucket, info.path), data)
    for name, kind in {"rec": "rec", "tar": "tar", "gz": "tar", "zip": "zip", "arrow": "arrow"}.items():
        here, there = open_source(str(tmp_path / name)), open_source(storage.join(s3_bucket, name))
        assert there.format == kind
        rows, remote = scanned(here), scanned(there)
        assert remote.drop_columns(["mark"]).equals(rows.drop_columns(["mark"]))
        assert all(remote["mark"].to_pylist())
        wanted = [data for _, data in here.read(rows.to_pylist(), num_ahead=2)]
        assert [data for _, data in there.read(remote.to_pylist(), num_ahead=2)] == wanted
    whole = open_source(str(tmp_path / "rec"))
    rows = scanned(whole)
    there = open_source(storage.join(s3_bucket, "rec/train.rec"))
    assert in_a_run(there, scanned(there)) == in_a_run(whole, rows)


def test_damage_in_a_bucket_is_told_as_on_a_disk(s3_bucket: str, tmp_path: Path, caplog) -> None:
    insightface(tmp_path / "a.rec", images(40), [float(n) for n in range(40)])
    tar(tmp_path / "a.tar", SAMPLES)
    records, archive = (tmp_path / "a.rec").read_bytes(), (tmp_path / "a.tar").read_bytes()
    index = (tmp_path / "a.idx").read_bytes()
    folder = storage.join(s3_bucket, "it's damaged")

    def refused(name: str, data: bytes, **others: bytes) -> str:
        for path, content in {f"{name}/a.{name}": data, **{f"{name}/a.{k}": v for k, v in others.items()}}.items():
            storage.write_bytes(storage.join(folder, path), content)
        with pytest.raises(UserError) as caught:
            scanned(open_source(storage.join(folder, name)))
        return str(caught.value)

    assert "is no RecordIO file" in refused("rec", b"never" * 99)
    assert "is the index of another file" in refused("rec", records, idx=b"1\t4\n2\t44\n")
    assert "is no whole tar file" in refused("tar", b"never" * 999)
    assert "is no whole Arrow stream" in refused("arrow", b"never" * 99)
    with pytest.raises(UserError, match=r"a\.idx is a file, and not one that holds photos"):
        open_source(storage.join(folder, "rec/a.idx"))
    storage.write_bytes(storage.join(folder, "cut/a.rec"), records[: len(records) // 2])
    storage.write_bytes(storage.join(folder, "cut/a.idx"), index)
    (tmp_path / "a.rec").write_bytes(records[: len(records) // 2])
    kept = len(scanned(open_source(str(tmp_path / "a.rec"))))
    assert len(scanned(open_source(storage.join(folder, "cut")))) == kept > 15
    assert "a.idx names" in caplog.text
    storage.write_bytes(storage.join(folder, "half/a.tar"), archive[: len(archive) // 2])
    assert 0 < len(scanned(open_source(storage.join(folder, "half/a.tar")))) < 6
    assert "is cut off or damaged" in caplog.text
