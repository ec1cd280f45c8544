"""Tars and zip files, written by Python's own modules and by the package webdataset."""

import gzip
import io
import json
import random
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
import webdataset

from lib.errors import UserError
from lib.faces import table
from lib.faces.manifest import read_manifest
from lib.faces.sources.opening import open_source
from lib.faces.sources.source import SCAN_SCHEMA, Source

LONG = "a folder with a very long name " * 5


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def scanned(source: Source) -> pa.Table:
    return pa.Table.from_batches([batch for shard in source.shards() for batch in source.scan(shard)], SCAN_SCHEMA)


def read(source: Source) -> dict[str, tuple[str | None, bytes | str]]:
    rows = scanned(source).to_pylist()
    return {row["photo"]: (row["identity"], data) for row, data in source.read(rows, num_ahead=4)}  # type: ignore[index]


SAMPLES = {
    "000.jpg": b"first",
    "000.cls": b"7",
    "sub/001.face.png": b"second",
    "sub/001.json": json.dumps({"key": "001", "label": 8}).encode(),
    "002.jpg": b"third",
    "002.txt": b"Ada Lovelace\nsecond line",
    "003.jpg": b"no label",
    "004.cls": b"9",
    "005.jpg": b"sixth",
    "005.cls": b"no number",
    f"{LONG}/006.jpg": b"long",
    f"{LONG}/006.cls": b"3",
}
PEOPLE = {
    "000.jpg": ("7", b"first"),
    "sub/001.face.png": ("8", b"second"),
    "002.jpg": ("Ada Lovelace", b"third"),
    "003.jpg": (None, b"no label"),
    "005.jpg": ("no number", b"sixth"),
    f"{LONG}/006.jpg": ("3", b"long"),
}


@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tgz", "w:gz"), ("tar.xz", "w:xz")])
def test_samples_of_webdataset_in_tars(tmp_path, suffix, mode, caplog):
    tar(tmp_path / f"a b.{suffix}", SAMPLES, mode)
    source = open_source(str(tmp_path))
    assert source.format == "tar"
    assert read(source) == {f"a b.{suffix}/{name}": wanted for name, wanted in PEOPLE.items()}
    assert source.passed_over["samples without a picture"] == 1
    assert "1 samples have no label" in caplog.text
    assert "1 classes are no numbers, such as 'no number'" in caplog.text


def test_shards_written_by_webdataset(tmp_path):
    with webdataset.ShardWriter(f"file:{tmp_path}/%06d.tar", maxcount=3, verbose=0) as writer:
        for n in range(8):
            writer.write({"__key__": f"{n:04d}", "jpg": f"image {n}".encode(), "cls": n // 2})
    photos = read(open_source(f"{tmp_path}/{{000000..000002}}.tar"))
    assert photos == {f"{n // 3:06d}.tar/{n:04d}.jpg": (str(n // 2), f"image {n}".encode()) for n in range(8)}
    assert len(read(open_source(f"{tmp_path}/00000[01].tar"))) == 6
    assert len(read(open_source(f"{tmp_path}/*2.tar"))) == 2
    assert len(read(open_source(f"{tmp_path}/000001.tar"))) == 3
    with pytest.raises(UserError, match=r"2 of the 5 files that --photos names are not in .*, such as 000003\.tar"):
        scanned(open_source(f"{tmp_path}/{{000000..000004}}.tar"))


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_of_photos_is_a_folder_of_photos(tmp_path, kind):
    members = {"ada/1.jpg": b"1", "bob/2.jpg": b"2" * 1000, "__MACOSX/ada/._1.jpg": b"junk", "notes.pdf": b""}
    path = tmp_path / f"faces.{kind}"
    if kind == "tar":
        tar(path, members)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for n, (name, data) in enumerate(members.items()):
                archive.writestr(name, data, zipfile.ZIP_DEFLATED if n % 2 else zipfile.ZIP_STORED)
    for url in (path, tmp_path):
        source = open_source(str(url))
        manifest = read_manifest(source, None, split_seed=0, identities_required=True)
        rows = manifest.photos.to_pylist()
        assert {row["photo"]: row["identity"] for row in rows} == {
            f"faces.{kind}/ada/1.jpg": "ada",
            f"faces.{kind}/bob/2.jpg": "bob",
        }
        assert [data for _, data in source.read(rows, num_ahead=4)] == [b"1", b"2" * 1000]
        assert manifest.num_passed_over == {"__MACOSX": 1, ".pdf": 1}


@pytest.mark.parametrize("above", ["", "img align/", "img.zip/img align/"])
def test_a_list_may_leave_out_the_archive_and_the_folder_in_it(tmp_path, above):
    with zipfile.ZipFile(tmp_path / "img.zip", "w") as archive:
        for number in range(1, 13):
            archive.writestr(f"img align/{number:06d}.jpg", b"photo")
    lines = [f"{above}{number:06d}.jpg {number // 3}" for number in range(1, 14)]  # the last one is not there
    (tmp_path / "identity_CelebA.txt").write_text("\n".join(lines))
    source = open_source(str(tmp_path / "img.zip"))
    manifest = read_manifest(source, str(tmp_path / "identity_CelebA.txt"), identities_required=True)
    found = dict(manifest.database.rows("select photo, identity from photos where status is null"))
    assert found == {f"img.zip/img align/{number:06d}.jpg": str(number // 3) for number in range(1, 13)}


def test_an_archive_for_each_person(tmp_path):
    for person in ("ada", "bob"):
        tar(tmp_path / f"{person}.tar", {"1.jpg": person.encode(), "2.jpg": b"2"})
    manifest = read_manifest(open_source(str(tmp_path)), None, split_seed=0, identities_required=True)
    assert manifest.photos["identity"].to_pylist() == ["ada", "ada", "bob", "bob"]


def test_a_zip_written_to_a_pipe_is_read(tmp_path):
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: int) -> int:
            raise io.UnsupportedOperation

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ada/1.jpg", b"streamed" * 50_000)
    (tmp_path / "a.zip").write_bytes(pipe.getvalue())
    assert read(open_source(str(tmp_path))) == {"a.zip/ada/1.jpg": (None, b"streamed" * 50_000)}


@pytest.mark.parametrize("packed", [False, True])
def test_a_tar_cut_in_the_middle_keeps_the_samples_before(tmp_path, packed, caplog):
    draw = random.Random(1)
    members = {}
    for n in range(10):
        members[f"{n}.jpg"] = draw.randbytes(3000)
        members[f"{n}.cls"] = str(n).encode()
    tar(tmp_path / "a.tar", members)
    data = (tmp_path / "a.tar").read_bytes()
    cut = data[: 5 * (512 + 3072 + 1024) + 700]
    (tmp_path / "a.tar").unlink()
    if packed:
        whole = gzip.compress(data)
        (tmp_path / "a.tar.gz").write_bytes(whole[: len(whole) // 2])
    else:
        (tmp_path / "a.tar").write_bytes(cut)
    source = open_source(str(tmp_path))
    found = [photo for _, photo in read(source).values()]
    assert found == [members[f"{n}.jpg"] for n in range(len(found))]
    assert len(found) == 5 if not packed else 3 <= len(found) <= 5
    assert source.passed_over["archives cut off"] == 1
    assert "is cut off or damaged" in caplog.text


def test_what_is_no_archive_is_refused(tmp_path):
    for name in ("a.tar", "a.tar.gz", "a.zip"):
        (tmp_path / name).write_bytes(b"never an archive" * 100)
        with pytest.raises(UserError, match=r"is no whole (tar|zip) file .*: copy it again, or unpack it and name the"):
            scanned(open_source(str(tmp_path / name)))


def test_a_tar_of_the_folder_itself_has_the_names_of_its_files(tmp_path):
    tar(tmp_path / "a.tar", {f"./{name}": data for name, data in SAMPLES.items()})
    assert read(open_source(str(tmp_path / "a.tar"))) == {f"a.tar/{name}": row for name, row in PEOPLE.items()}


def test_a_zip_of_a_version_that_nobody_knows_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("7/a.jpg", b"a")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.index(b"PK\1\2") + 6] = 255  # needed to extract
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"is no whole zip file \(zip file version 25\.5\)"):
        scanned(open_source(str(tmp_path / "a.zip")))


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_random_damage_ends_in_rows_or_one_line(tmp_path, kind):
    draw = random.Random(5)
    path = tmp_path / f"a.{kind}"
    if kind == "tar":
        tar(path, SAMPLES)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in SAMPLES.items():
                archive.writestr(name, data * 20)
    whole = path.read_bytes()
    lines: list[str] = []
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data[: draw.randint(1, len(data))] if draw.random() < 0.5 else data)
        try:
            photos = read(open_source(str(path)))
        except UserError as refused:
            lines.append(str(refused))
        else:
            assert all(isinstance(data, bytes) or data == table.CORRUPT for _, data in photos.values())
    assert all("\n" not in line for line in lines)
