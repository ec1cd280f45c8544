"""Who was forgotten is known by keyed hashes alone, and is left out of the manifest."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from lib.errors import UserError
from lib.faces.manifest import MANIFEST_SCHEMA, Manifest
from lib.faces.tombstones import keyed, make_key, read_key, read_tombstones, without_forgotten, write_tombstones


def manifest(*rows: tuple[str, str | None]) -> Manifest:
    photos = [{"photo": photo, "identity": identity, "split": "train"} for photo, identity in rows]
    return Manifest.of(pa.Table.from_pylist(photos, schema=MANIFEST_SCHEMA))


def test_forgotten_photos_and_people_are_left_out_and_counted(tmp_path: Path) -> None:
    data = str(tmp_path / "a é")
    key = make_key(data)
    assert make_key(data) == key
    write_tombstones(data, key, "one", ["x/1.jpg"], [])
    write_tombstones(data, key, "two", [], ["Ada é"])
    rows = [("x/1.jpg", "x"), ("x/2.jpg", "x"), ("y/1.jpg", "Ada é"), ("z.jpg", None)]
    kept, num = without_forgotten(manifest(*rows), read_tombstones(data))
    assert kept.photos["photo"].to_pylist() == ["x/2.jpg", "z.jpg"]
    assert num == 2
    with pytest.raises(UserError, match="all 1 photos"):
        without_forgotten(manifest(rows[0]), read_tombstones(data))


def test_hashes_depend_on_the_key_the_kind_and_the_name(tmp_path: Path) -> None:
    # RFC 4231, test case 2, with the prefix of our own as part of the message.
    assert keyed(b"Jefe", "photo", "a") != keyed(b"Jefe", "identity", "a") != keyed(b"jefe", "identity", "a")
    data = str(tmp_path)
    write_tombstones(data, make_key(data), "one", ["secret.jpg"], ["Secret Name"])
    text = (tmp_path / "forgotten" / "tombstones" / "one.json").read_text()
    assert "ecret" not in text
    assert {len(each) for each in json.loads(text)["photos"]} == {64}


def test_nobody_was_forgotten_where_there_are_no_hashes(tmp_path: Path) -> None:
    assert read_tombstones(str(tmp_path)) is None
    one = manifest(("a", "b"))
    assert without_forgotten(one, None) == (one, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [("00" * 32, "is another one .*put that key back"), ("hello", "no key of 64"), (None, "is not there")],
)
def test_hashes_of_another_key_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    write_tombstones(str(tmp_path), make_key(str(tmp_path)), "one", ["a"], [])
    key = tmp_path / "forgotten" / "key"
    key.unlink()
    if content is not None:
        key.write_text(content)
    with pytest.raises(UserError, match=message):
        read_tombstones(str(tmp_path))
    assert (read_key(str(tmp_path)) is None) if content is None else True
