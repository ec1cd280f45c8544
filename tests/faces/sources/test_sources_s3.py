"""Every format on a real S3 server: many photos of one file are read by ranges."""

import zipfile
from pathlib import Path

from lib import storage
from lib.faces.sources import recordio
from lib.faces.sources.opening import open_source
from tests.faces.sources.test_archives import SAMPLES, scanned, tar
from tests.faces.sources.test_recordio import images, insightface
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
