"""Lists of photos and identities: their dialects, their names, and what is wrong in them."""

import os
import unicodedata
from pathlib import Path

import pytest

from lib.errors import UserError
from lib.faces import table
from lib.faces.photo_names import name_on_disk, safe_name, stored_name
from tests.faces.photo_folders import PHOTO, STRANGE_NAMES, manifest_of, place, rows_of


@pytest.mark.parametrize("name", STRANGE_NAMES)
@pytest.mark.parametrize("separator", [" ", "\t", "   "])
def test_names_may_hold_spaces_quotes_and_any_letters(root: Path, name: str, separator: str) -> None:
    place(root, name)
    assert rows_of(manifest_of(root, f"{name}{separator}7\n")) == {name: ("7", None)}


@pytest.mark.parametrize(
    "text",
    [
        b"a.jpg 1\r\nb.jpg 2\r\n",
        b"\xef\xbb\xbfa.jpg 1\nb.jpg 2",
        b"\n\n  a.jpg 1  \n\t\nb.jpg\t2\n\n",
        b"a.jpg 1\nb.jpg 2\na.jpg 1\n",
    ],
    ids=["Windows", "byte order mark", "blank lines and spaces", "the same line twice"],
)
def test_ways_to_write_the_same_file(root: Path, text: bytes) -> None:
    place(root, "a.jpg", "b.jpg")
    assert rows_of(manifest_of(root, text)) == {"a.jpg": ("1", None), "b.jpg": ("2", None)}


def test_malformed_lines_are_named_by_number(root: Path) -> None:
    place(root, "a.jpg")
    with pytest.raises(UserError, match=r'identities\.txt: 2 lines are not "photo-name identity", such as line 2, 4: '):
        manifest_of(root, "a.jpg 1\na.jpg\n\nonly-a-name.jpg\n")


def test_of_many_malformed_lines_the_first_are_named(root: Path) -> None:
    with pytest.raises(UserError, match=r"1000 lines .* such as line 1, 2, 3, 4, 5: "):
        manifest_of(root, "word\n" * 1000)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a/../../b.jpg", "..", "..\\..\\secret.jpg", "\\\\server\\share\\a.jpg"]
)
def test_a_name_that_leads_out_of_the_photo_folder_is_refused(root: Path, name: str) -> None:
    place(root, "a.jpg")
    with pytest.raises(UserError, match=r"line 2 \(.*\) leads out of the photo folder") as refused:
        manifest_of(root, f"a.jpg 1\n{name} 2\n")
    assert name in str(refused.value)


@pytest.mark.parametrize("name", ["a..b.jpg", "...jpg", "x/..hidden.jpg"])
def test_dots_inside_a_name_are_no_way_out(name: str) -> None:
    assert safe_name(name)


def test_a_name_with_two_identities_is_refused(root: Path) -> None:
    place(root, "a.jpg")
    with pytest.raises(UserError, match=r"line 3 \(a\.jpg: 1 and 2\) has two identities"):
        manifest_of(root, "a.jpg 1\nb.jpg 5\na.jpg 2\n")


def test_a_list_that_is_no_text_is_refused(root: Path) -> None:
    place(root, "a.jpg")
    with pytest.raises(UserError, match=r"identities\.txt is not UTF-8 text .*: save it as UTF-8"):
        manifest_of(root, "café.jpg 1\n".encode("latin-1"))


def test_an_identity_with_one_photo_is_kept(root: Path) -> None:
    place(root, "a.jpg")
    assert rows_of(manifest_of(root, "a.jpg 1")) == {"a.jpg": ("1", None)}


@pytest.mark.parametrize(
    "text",
    [
        "./a.jpg 1\n./p/b.jpg 2\n",
        "photos/a.jpg 1\nphotos/p/b.jpg 2\n",
        "a.png 1\np/b.png 2\n",
        "a 1\np/b 2\n",
        "a.JPG 1\np/b.Jpeg 2\n",
        "a.jpg 1\np\\b.jpg 2\n",
        "a.jpg,1\np/b.jpg,2\n",
        "photo,identity\na.jpg,1\np/b.jpg,2\n",
        ",image,label,split\n0,a.jpg,1,train\n1,p/b.jpg,2,test\n",
        "identity;filename\n1;a.jpg\n2;p/b.jpg\n",
        "a.jpg\t1\np/b.jpg\t2\n",
        "photo identity\na.jpg 1\np/b.jpg 2\n",
        "1 a.jpg\n2 p/b.jpg\n",
        '"a.jpg", "1"\n"p/b.jpg", "2"\n',
        "a.jpg 1\rp/b.jpg 2\r",
    ],
)
def test_dialects_of_lists(root: Path, text: str) -> None:
    place(root, "a.jpg", "p/b.jpg")
    assert rows_of(manifest_of(root, text)) == {"a.jpg": ("1", None), "p/b.jpg": ("2", None)}


def test_an_identity_after_a_tab_may_hold_spaces(root: Path) -> None:
    place(root, "my a.jpg", "b.jpg")
    rows = rows_of(manifest_of(root, "my a.jpg\tAda Lovelace\nb.jpg\tBob\n"))
    assert rows == {"my a.jpg": ("Ada Lovelace", None), "b.jpg": ("Bob", None)}


@pytest.mark.parametrize(("on_disk", "listed"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_accents_may_be_composed_or_not(root: Path, on_disk: str, listed: str) -> None:
    name = unicodedata.normalize(on_disk, "José_é.jpg")
    place(root, name)
    assert rows_of(manifest_of(root, unicodedata.normalize(listed, "José_é.jpg 7\n"))) == {name: ("7", None)}


def test_a_name_that_two_photos_answer_to_is_missing(root: Path) -> None:
    place(root, "a.jpg", "a.png", "b.jpg")
    rows = rows_of(manifest_of(root, "a.webp 1\nb.jpg 2\n"))
    assert rows["a.webp"] == ("1", table.MISSING)
    assert rows["a.jpg"] == rows["a.png"] == (None, table.NO_IDENTITY)


def test_a_list_of_other_photos_is_refused_with_an_example_of_each_side(root: Path) -> None:
    place(root, "a.jpg", "b.jpg")
    text = "x1.jpg 1\nx2.jpg 1\na.jpg 1\n"
    wanted = r"lists 3 photos, and 1 of them lie in .*lists x1\.jpg, there lies b\.jpg.*--min-listed-share 0"
    with pytest.raises(UserError, match=wanted):
        manifest_of(root, text)
    assert rows_of(manifest_of(root, text, min_listed_share=0.3))["x1.jpg"] == ("1", table.MISSING)


def test_a_listed_nobody_is_nobody(root: Path) -> None:
    place(root, "a.jpg", "b.jpg", "c.jpg")
    rows = rows_of(manifest_of(root, "photo,identity\na.jpg,1\nb.jpg,\nc.jpg,nan\n"))
    nobody = (None, table.NO_IDENTITY)
    assert rows == {"a.jpg": ("1", None), "b.jpg": nobody, "c.jpg": nobody}


def test_names_of_any_bytes_survive_the_table() -> None:
    names = ["plain.jpg", "caf\udce9.jpg", "a\\xe9.jpg", "a\\x5c.jpg", "\\x5cxe9\udcff", "é.jpg"]
    stored = [stored_name(name) for name in names]
    assert len(set(stored)) == len(names)
    assert [name_on_disk(name) for name in stored] == names
    assert all(name.encode() for name in stored)


def test_a_list_may_name_photos_of_any_bytes(root: Path) -> None:
    for name in (b"caf\xe9.jpg", b"a\\xe9.jpg"):
        Path(os.fsdecode(os.fsencode(root / "photos") + b"/" + name)).write_bytes(PHOTO)
    rows = rows_of(manifest_of(root, b"caf\xe9.jpg 1\na\\xe9.jpg 2\n"))
    assert rows == {"caf\\xe9.jpg": ("1", None), "a\\x5cxe9.jpg": ("2", None)}
