"""Photos named by a list that exists already: all formats give the same photos, and wrong ones are told."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import storage
from lib.errors import UserError
from lib.faces import table
from lib.faces.manifest import Manifest, read_manifest
from lib.faces.sources.photo_list import PhotoList
from lib.faces.sources.source import PhotoColumns

NAMES = ["ada/a b.jpg", "ada/é.jpg", "bob/it's, 1.png", "eve/gone.jpg"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "my photos"
    for name in (*NAMES[:-1], "not/listed.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def manifest_of(
    photos: str | Path, names: str | Path, *, column: str = "photo", identities: Path | None = None
) -> Manifest:
    source = PhotoList(str(photos), PhotoColumns(photo=column), list_url=str(names))
    return read_manifest(source, str(identities) if identities else None, identities_required=True)


def text(path: Path) -> Path:
    path.write_text("".join(f"{name}\n" for name in NAMES), "utf-8")
    return path


def packed(path: Path) -> Path:
    written = path.with_suffix(".txt.gz")
    written.write_bytes(gzip.compress(text(path).read_bytes()))
    return written


def whole_paths(path: Path) -> Path:
    folder = path.parent / "my photos"
    path.write_text(f"file://{folder}/{NAMES[0]}\n\n" + "".join(f"{folder}/{name}\n" for name in NAMES[1:]), "utf-8")
    return path


def csv_file(path: Path) -> Path:
    written = path.with_suffix(".csv")
    written.write_text("size,Photo\n" + "".join(f'7,"{name}"\n' for name in NAMES), "utf-8")
    return written


def parquet(path: Path) -> Path:
    written = path.with_suffix(".parquet")
    columns = {"photo": NAMES, "num_bytes": [7] * len(NAMES), "image": [b"x"] * len(NAMES)}
    pq.write_table(pa.table(columns), written, row_group_size=2)
    return written


@pytest.mark.parametrize("write", [text, packed, whole_paths, csv_file, parquet])
def test_a_list_names_the_photos(photos: Path, tmp_path: Path, write: Callable[[Path], Path]) -> None:
    names = write(tmp_path / "the names.txt")
    manifest = manifest_of(photos, names)
    rows = manifest.photos.sort_by("photo").to_pylist()
    assert [(row["photo"], row["identity"], row["status"]) for row in rows] == [
        (name, name.split("/")[0], None) for name in NAMES
    ]
    assert manifest.num_bytes == (7 * len(NAMES) if names.suffix in (".csv", ".parquet") else 0)
    source = PhotoList(str(photos), PhotoColumns(), list_url=str(names))
    read = [data for _, data in source.read(rows, num_ahead=2)]
    assert read == [*(name.encode() for name in NAMES[:-1]), table.MISSING]


def test_a_list_may_name_few_photos_of_identities(photos: Path, tmp_path: Path) -> None:
    names, identities = tmp_path / "few.txt", tmp_path / "identities.txt"
    names.write_text("ada/a b.jpg\nbob/it's, 1.png\nada/a b.jpg\nnotes.doc\n")
    identities.write_text("".join(f"ada/{n}.jpg,7\n" for n in range(9)) + "ada/a b.jpg,8\n")
    manifest = manifest_of(photos, names, identities=identities)
    rows = {row["photo"]: (row["identity"], row["status"]) for row in manifest.photos.to_pylist()}
    assert rows == {"ada/a b.jpg": ("8", None), "bob/it's, 1.png": (None, table.NO_IDENTITY)}
    assert manifest.num_passed_over == {".doc": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ada/1.jpg\n../secret.jpg\n", r"a\.txt names \.\./secret\.jpg, which is not below .*my photos"),
        ("a.txt", b"s3://other/ada/1.jpg\n", r"names s3://other/ada/1\.jpg, which is not below"),
        ("a.txt", b"notes.doc\n", r"a\.txt holds no photos \(1 \.doc lie there\)"),
        ("a.csv", b"file,size\nada/1.jpg,1\n", r"a\.csv has no column 'photo', it has file, size: .*--photo-column"),
        ("a.csv", b"photo,size\nada/1.jpg,1\nada/2.jpg\n", r"a\.csv: row 2 has not the 2 columns"),
        ("a.csv", b"photo,size\nada/1.jpg,large\n", r"a\.csv: row 1 .* a size that is no number"),
        ("a.txt.gz", gzip.compress(b"ada/1.jpg\n" * 1000, mtime=0)[:-9], r"a\.txt\.gz is damaged"),
        ("a.txt.gz", b"ada/1.jpg\n", r"a\.txt\.gz is damaged"),
        ("a.parquet", b"ada/1.jpg\n", r"a\.parquet.* is no whole Parquet file"),
        ("manifest.json", b"{}", r"manifest\.json is no Inventory: name"),
    ],
)
def test_a_wrong_list_is_one_line(photos: Path, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        manifest_of(photos, tmp_path / name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("absent", ["photos", "list"])
def test_what_is_not_there_is_told(photos: Path, tmp_path: Path, absent: str) -> None:
    names = text(tmp_path / "a.txt")
    flag = "--photos" if absent == "photos" else "--photo-list"
    with pytest.raises(UserError, match=rf"{flag} .*gone.* is not there"):
        manifest_of(
            tmp_path / "gone" if absent == "photos" else photos, tmp_path / "gone" if absent == "list" else names
        )


def inventory(bucket: str, kind: str, where: str) -> str:
    """Write an Inventory as S3 does, with an older version, a removed photo and a key outside; return its URL."""
    keys = ["photos/ada/a b+c.jpg", "photos/bob/é.jpg", "photos/bob/é.jpg", "photos/gone.jpg", "other/x.jpg"]
    latest, removed = [True, True, False, True, True], [False, False, False, True, False]
    about = {"sourceBucket": bucket, "destinationBucket": f"arn:aws:s3:::{where[5:]}", "fileFormat": kind}
    data = f"inventory/{bucket}/daily/data/1.{'csv.gz' if kind == 'CSV' else 'parquet'}"
    if kind == "CSV":
        about["fileSchema"] = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, ETag"
        escaped = ["photos/ada/a+b%2Bc.jpg", *["photos/bob/%C3%A9.jpg"] * 2, "photos/gone.jpg", "other/x.jpg"]
        rows = zip(escaped, latest, removed, strict=True)
        lines = [
            f'"{bucket}","{key}","v1","{str(new).lower()}","{str(old).lower()}","9","tag"' for key, new, old in rows
        ]
        storage.write_bytes(storage.join(where, data), gzip.compress("\n".join(lines).encode()))
    else:
        about["fileSchema"] = "message s3.inventory { required binary bucket (UTF8); required binary key (UTF8); }"
        columns = {"bucket": [bucket] * 5, "key": keys, "is_latest": latest, "is_delete_marker": removed}
        rows = pa.table({**columns, "size": [9] * 5, "e_tag": ["tag"] * 5})
        storage.write_parquet(storage.join(where, data), rows)
    url = storage.join(where, f"inventory/{bucket}/daily/2026-11-06T01-00Z/manifest.json")
    storage.write_bytes(url, json.dumps({**about, "files": [{"key": data, "size": 1}]}).encode())
    return url


@pytest.mark.parametrize("kind", ["CSV", "Parquet"])
def test_an_inventory_names_the_photos_of_its_bucket(s3_bucket: str, kind: str) -> None:
    url = inventory(s3_bucket[5:], kind, s3_bucket)
    photos = storage.join(s3_bucket, "photos")
    storage.write_bytes(storage.join(photos, "ada/a b+c.jpg"), b"a photo")
    source = PhotoList(photos, PhotoColumns(), list_url=url)
    (shard,) = source.shards()
    (batch,) = source.scan(shard)
    rows = batch.select(["photo", "num_bytes", "mark"]).to_pylist()
    assert rows == [{"photo": name, "num_bytes": 9, "mark": "tag"} for name in ("ada/a b+c.jpg", "bob/é.jpg")]
    assert [data for _, data in source.read(batch.to_pylist(), num_ahead=2)] == [b"a photo", table.MISSING]


def test_an_inventory_is_read_beside_a_copy_of_its_manifest(s3_bucket: str, tmp_path: Path) -> None:
    url = inventory(s3_bucket[5:], "CSV", s3_bucket)
    for info in storage.list_files(storage.join(s3_bucket, "inventory")):
        content = storage.read_bytes(storage.join(s3_bucket, "inventory", info.path))
        storage.write_bytes(storage.join(str(tmp_path), info.path), content)
    storage.write_bytes(storage.join(s3_bucket, "photos", "x.jpg"), b"a photo")
    copy = storage.join(str(tmp_path), url.removeprefix(f"{s3_bucket}/inventory/"))
    source = PhotoList(storage.join(s3_bucket, "photos"), PhotoColumns(), list_url=copy)
    assert [len(batch) for shard in source.shards() for batch in source.scan(shard)] == [2]


def test_an_inventory_of_another_bucket_or_in_orc_is_refused(s3_bucket: str, tmp_path: Path) -> None:
    storage.write_bytes(storage.join(s3_bucket, "photos", "x.jpg"), b"a photo")
    about = {"sourceBucket": "another", "destinationBucket": "b", "fileFormat": "ORC", "fileSchema": "", "files": []}
    names = tmp_path / "manifest.json"
    for bucket, message in (("another", r"Inventory of the bucket another, and --photos is"), (s3_bucket[5:], "ORC")):
        names.write_text(json.dumps({**about, "sourceBucket": bucket}))
        source = PhotoList(storage.join(s3_bucket, "photos"), PhotoColumns(), list_url=str(names))
        with pytest.raises(UserError, match=message):
            source.shards()
