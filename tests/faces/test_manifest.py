import os
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.errors import UserError
from lib.faces import table
from lib.faces.manifest import Manifest, read_manifest
from lib.faces.photo_names import name_on_disk, safe_name, stored_name
from lib.faces.sources.opening import open_source
from lib.faces.sources.source import PhotoColumns
from lib.faces.splits import split_of

PHOTO = b"never opened here"
STRANGE_NAMES = [
    "two words.jpg",
    'it\'s "quoted".jpg',
    "Zoë 名前 🙂.JPEG",
    "percent%20 #1 [x] {y} $HOME *.png",
    "-leading.webp",
    "many.dots.in.it.bmp",
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "fotos d'été"
    (folder / "photos").mkdir(parents=True)
    return folder


def place(root: Path, *names: str) -> None:
    for name in names:
        path = root / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PHOTO)


def manifest_of(
    root: Path,
    identities: str | bytes | None = None,
    *,
    photos: str = "photos",
    seed: int = 0,
    required: bool = True,
    min_listed_share: float = 0.5,
    **columns: str,
) -> Manifest:
    if identities is not None:
        content = identities.encode() if isinstance(identities, str) else identities
        (root / "identities.txt").write_bytes(content)
    has_list = (root / "identities.txt").exists()
    named = PhotoColumns(**columns)
    source = open_source(
        str(root / photos),
        columns=replace(named, identity=None) if has_list else named,
        identities_required=required,
    )
    return read_manifest(
        source,
        str(root / "identities.txt"),
        split_seed=seed,
        identities_required=required,
        min_listed_share=min_listed_share,
    )


def rows_of(manifest: Manifest) -> dict[str, tuple[str | None, str | None]]:
    rows = manifest.photos.to_pylist()
    assert len({row["photo"] for row in rows}) == len(rows) == len(manifest)
    return {row["photo"]: (row["identity"], row["status"]) for row in rows}


# identities.txt


def test_each_photo_gets_its_identity_and_the_split_of_that_identity(root: Path) -> None:
    place(root, "a.jpg", "b.png", "sub folder/c.webp", "d.bmp")
    manifest = manifest_of(root, "a.jpg 1\nb.png 2\nsub folder/c.webp 1\nd.bmp Zoë\n", seed=3)
    assert rows_of(manifest) == {
        "a.jpg": ("1", None),
        "b.png": ("2", None),
        "sub folder/c.webp": ("1", None),
        "d.bmp": ("Zoë", None),
    }
    for row in manifest.photos.to_pylist():
        assert row["split"] == split_of(row["identity"], 3)


def test_rows_are_sorted_by_split_and_name_whatever_the_order_of_the_lines(root: Path) -> None:
    names = [f"{number:03d}.jpg" for number in range(60)]
    place(root, *names)
    lines = [f"{name} {index % 17}\n" for index, name in enumerate(names)]
    manifest = manifest_of(root, "".join(lines))
    keys = [(row["split"], row["photo"]) for row in manifest.photos.to_pylist()]
    assert keys == sorted(keys)
    assert len({split for split, _ in keys}) == 3
    again = manifest_of(root, "".join(reversed(lines)))
    assert again.photos.equals(manifest.photos)
    assert again.old_digest() == manifest.old_digest()


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


def test_listed_but_missing_and_there_but_not_listed_are_rows_too(root: Path) -> None:
    place(root, "a.jpg", "stranger.jpg")
    manifest = manifest_of(root, "a.jpg 1\ngone.jpg 2\n")
    assert rows_of(manifest) == {
        "a.jpg": ("1", None),
        "gone.jpg": ("2", table.MISSING),
        "stranger.jpg": (None, table.NO_IDENTITY),
    }


def test_an_empty_folder_with_a_list_is_a_table_of_missing_photos(root: Path) -> None:
    assert rows_of(manifest_of(root, "a.jpg 1\n", min_listed_share=0)) == {"a.jpg": ("1", table.MISSING)}


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


# What is passed over


def test_what_devices_and_systems_leave_is_nobody(root: Path) -> None:
    junk = ["p/@eaDir/a.jpg/SYNO_THUMB_M.jpg", "#recycle/p/a.jpg", "__MACOSX/p/._a.jpg", "p/._a.jpg", ".Trash/a.jpg"]
    place(root, "p/a.jpg", "p/Thumbs.db", "$RECYCLE.BIN/x.jpg", *junk)
    manifest = manifest_of(root)
    assert rows_of(manifest) == {"p/a.jpg": ("p", None)}
    passed_over = {"@eaDir": 1, "#recycle": 1, "__MACOSX": 1, "hidden": 2, "$RECYCLE.BIN": 1, ".db": 1}
    assert manifest.num_passed_over == passed_over


def test_pictures_beside_parquet_files_are_refused(root: Path) -> None:
    write(root / "photos" / "data" / "a.parquet", image=IMAGES, identity=["p", "q", "p"])
    place(root, "assets/page.jpg")
    wanted = (
        r"both pictures \(such as assets/page\.jpg\) and Parquet files \(such as data/a\.parquet\): .*--photos-format"
    )
    with pytest.raises(UserError, match=wanted):
        manifest_of(root)


@pytest.mark.parametrize("name", ["faces.zip", "faces.tar.gz", "a.jpg"])
def test_an_archive_or_one_photo_is_no_folder(root: Path, name: str) -> None:
    place(root, name)
    with pytest.raises(UserError, match="name the folder"):
        manifest_of(root, photos=f"photos/{name}")


def test_links_that_loop_cost_nothing_and_no_photo_comes_twice(root: Path) -> None:
    place(root, "a/1.jpg", "b/2.jpg")
    photos = root / "photos"
    for link, target in {"a/see-b": "../b", "b/see-a": "../a", "c": "c", "d": ".", "e": "..", "f": "nowhere"}.items():
        (photos / link).symlink_to(target)
    (root / "elsewhere" / "ada").mkdir(parents=True)
    (root / "elsewhere" / "ada" / "3.jpg").write_bytes(PHOTO)
    (photos / "farm").symlink_to(root / "elsewhere")
    (photos / "x").mkdir()
    (photos / "x" / "again").symlink_to(root / "elsewhere")
    assert set(rows_of(manifest_of(root))) == {"a/1.jpg", "b/2.jpg", "farm/ada/3.jpg"}


# Folders


def test_folders_of_splits_are_no_part_of_a_person(root: Path) -> None:
    place(root, "train/ada/1.jpg", "train/bob/1.jpg", "val/ada/2.jpg", "test/eve/1.jpg")
    rows = rows_of(manifest_of(root))
    assert rows == {
        "train/ada/1.jpg": ("ada", None),
        "train/bob/1.jpg": ("bob", None),
        "val/ada/2.jpg": ("ada", None),
        "test/eve/1.jpg": ("eve", None),
    }


def test_a_person_called_as_a_split_is_a_person(root: Path) -> None:
    place(root, "test/1.jpg", "ada/1.jpg", "eval/x/1.jpg", "bob/1.jpg")
    assert rows_of(manifest_of(root))["eval/x/1.jpg"] == ("eval/x", None)
    assert rows_of(manifest_of(root))["test/1.jpg"] == ("test", None)


def test_without_a_list_the_folder_is_the_identity(root: Path) -> None:
    place(root, "Ada Lovelace/1.jpg", "Ada Lovelace/2.jpg", "名前/1.jpg", "group/Bob/1.jpg", "at the root.jpg")
    assert rows_of(manifest_of(root)) == {
        "Ada Lovelace/1.jpg": ("Ada Lovelace", None),
        "Ada Lovelace/2.jpg": ("Ada Lovelace", None),
        "名前/1.jpg": ("名前", None),
        "group/Bob/1.jpg": ("group/Bob", None),
        "at the root.jpg": (None, table.NO_IDENTITY),
    }


def test_names_of_any_bytes_can_be_listed_and_told_apart(root: Path) -> None:
    place(root, "p/new\nline.jpg", "p/tab\t.jpg", *(f"p/{name}" for name in STRANGE_NAMES))
    for latin in (b"caf\xe9.jpg", b"caf\xe8.jpg"):
        path = os.fsencode(root / "photos" / "p") + b"/" + latin
        Path(os.fsdecode(path)).write_bytes(PHOTO)
    rows = rows_of(manifest_of(root))
    assert len(rows) == 4 + len(STRANGE_NAMES)
    assert {"p/new\nline.jpg", "p/tab\t.jpg", "p/caf\\xe9.jpg", "p/caf\\xe8.jpg"} <= set(rows)
    assert set(rows.values()) == {("p", None)}


def test_files_that_are_no_photos_are_counted_by_suffix(root: Path) -> None:
    place(root, "p/a.jpg", "p/b.JPG", "p/notes.txt", "p/more.TXT", "p/Makefile", "p/old.svg", "p/.hidden.jpg")
    manifest = manifest_of(root)
    assert set(rows_of(manifest)) == {"p/a.jpg", "p/b.JPG"}
    assert manifest.num_passed_over == {".txt": 2, "no suffix": 1, ".svg": 1, "hidden": 1}


def test_flat_photos_without_a_list_are_refused(root: Path) -> None:
    place(root, "a.jpg", "b.jpg")
    with pytest.raises(UserError, match=r'identities\.txt is not there, .* "photo-name identity" .* --identities'):
        manifest_of(root)


def test_flat_photos_without_a_list_are_nobodys_where_no_identity_is_needed(root: Path) -> None:
    place(root, "a.jpg", "b.jpg", "p/c.jpg")
    manifest = manifest_of(root, required=False)
    assert rows_of(manifest) == {"a.jpg": (None, None), "b.jpg": (None, None), "p/c.jpg": ("p", None)}


def test_photos_of_nobody_are_split_by_their_own_names(root: Path) -> None:
    place(root, *(f"{number}.jpg" for number in range(60)))
    assert set(manifest_of(root, required=False).photos["split"].to_pylist()) == {"train", "val", "test"}


def test_a_folder_without_photos_says_what_lies_there(root: Path) -> None:
    with pytest.raises(UserError, match=r"photos holds no photos: \.jpg, "):
        manifest_of(root)
    place(root, "a.svg", "b.svg", "notes.txt")
    with pytest.raises(UserError, match=r"photos holds no photos \(2 \.svg, 1 \.txt lie there\)"):
        manifest_of(root)


def test_a_photo_folder_that_is_not_there_says_where_to_put_the_photos(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--photos .*nowhere is not there: put the photos there.*DATA_URL"):
        manifest_of(tmp_path, photos="nowhere")


# The digest


def test_the_digest_follows_names_identities_and_seed(root: Path) -> None:
    place(root, "a.jpg", "b.jpg")
    texts = [
        "a.jpg 1\nb.jpg 2",
        "a.jpg 2\nb.jpg 1",
        "a.jpg 1\nb.jpg 1",
        "a.jpg 1",
        "a.jpg 1\nb.jpg 2\nc.jpg 3",
        "a.jpg None",
    ]
    digests = [manifest_of(root, text).old_digest() for text in texts]
    assert len(set(digests)) == len(texts)
    assert manifest_of(root, texts[0]).old_digest() == digests[0]
    splits = {manifest_of(root, texts[0], seed=seed).old_digest() for seed in range(30)}
    assert len(splits) > 1


def test_the_digest_does_not_follow_how_rows_lie_in_memory(root: Path) -> None:
    place(root, *(f"p{number % 3}/{number}.jpg" for number in range(10)))
    manifest = manifest_of(root)
    pieces = pa.concat_tables([manifest.photos.slice(0, 4), manifest.photos.slice(4)])
    assert Manifest.of(pieces).old_digest() == manifest.old_digest()


# Parquet


def write(path: Path, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


IMAGES = pa.array([b"1", b"2", b"3"], pa.binary())
HUGGING_FACE = pa.array([{"bytes": b"1", "path": "a.jpg"}, {"bytes": None, "path": "b.jpg"}, None])


@pytest.mark.parametrize(
    "images", [IMAGES, IMAGES.cast(pa.large_binary()), HUGGING_FACE], ids=["binary", "large", "HF"]
)
def test_parquet_rows_are_photos(root: Path, images: pa.Array) -> None:
    write(root / "photos" / "train.parquet", image=images, identity=[7, 8, None], photo=["a", "b b", "ç"])
    manifest = manifest_of(root)
    assert rows_of(manifest) == {"a": ("7", None), "b b": ("8", None), "ç": (None, table.NO_IDENTITY)}
    assert manifest.photos["source"].to_pylist() == ["train.parquet"] * 3
    assert manifest.photos["row"].to_pylist() == [0, 1, 2]
    assert manifest.photos["split"][0].as_py() == split_of("7", 0)


def test_parquet_rows_without_names_are_named_by_file_and_row(root: Path) -> None:
    write(root / "photos" / "sub" / "0.parquet", image=IMAGES, identity=["x", "y", "x"])
    write(root / "photos" / "sub" / "1.parquet", image=IMAGES, identity=["x", "y", "z"])
    names = [f"sub/{file}.parquet#{row}" for file in range(2) for row in range(3)]
    assert manifest_of(root).photos["photo"].to_pylist() == names


def test_one_parquet_file_can_be_named(root: Path) -> None:
    write(root / "photos" / "one.parquet", image=IMAGES, identity=["x", "y", "x"])
    manifest = manifest_of(root, photos="photos/one.parquet")
    assert manifest.photos["photo"].to_pylist() == [f"one.parquet#{row}" for row in range(3)]
    assert manifest.photos["source"].to_pylist() == [""] * 3


def test_parquet_columns_are_named_by_flags(root: Path) -> None:
    people = pa.array(["p", "q", "p"]).dictionary_encode()
    write(root / "photos" / "a.parquet", jpg=IMAGES, label=people, key=pa.array([11, 12, 13]))
    manifest = manifest_of(root, image="jpg", identity="label", photo="key")
    assert rows_of(manifest) == {"11": ("p", None), "12": ("q", None), "13": ("p", None)}


def test_a_photo_column_that_holds_the_images_is_no_name(root: Path) -> None:
    write(root / "photos" / "a.parquet", photo=IMAGES, identity=["p", "q", "p"])
    assert manifest_of(root, image="photo").photos["photo"].to_pylist() == [f"a.parquet#{row}" for row in range(3)]


def test_parquet_without_identities_serves_where_none_is_needed(root: Path) -> None:
    write(root / "photos" / "a.parquet", image=IMAGES)
    manifest = manifest_of(root, required=False)
    assert rows_of(manifest) == {f"a.parquet#{row}": (None, None) for row in range(3)}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"picture": IMAGES, "identity": [1, 2, 3]},
            r"has no column 'image': name it by --image-column; there are pic",
        ),
        (
            {"image": IMAGES, "label": [1, 2, 3]},
            r"has no column 'identity': name it by --identity-column; there are im",
        ),
        (
            {"image": ["a.jpg", "b.jpg", "c.jpg"], "identity": [1, 2, 3]},
            r"'image' .* is of type string: .*--image-column",
        ),
        ({"image": [{"path": "a"}] * 3, "identity": [1, 2, 3]}, r"'image' .* is of type struct.*: .*--image-column"),
        ({"image": IMAGES, "identity": [[1], [2], [3]]}, r"'identity' .* holds no names but list.*--identity-column"),
        ({"image": IMAGES, "identity": [b"\xff", b"a", b"b"]}, r"'identity' .* holds no names but binary"),
        (
            {"image": IMAGES, "identity": [1, 2, 3], "photo": ["a", "b", "a"]},
            r"names 3 photos by 2 names: .*--photo-column",
        ),
        ({"image": IMAGES, "identity": [1, 2, 3], "photo": ["a", "b", None]}, r"names 3 photos by 2 names"),
        ({"image": IMAGES[:0], "identity": pa.array([], pa.int64())}, r"photos holds no rows"),
    ],
)
def test_parquet_that_cannot_be_used_says_why(root: Path, columns: dict[str, Any], message: str) -> None:
    write(root / "photos" / "a.parquet", **columns)
    with pytest.raises(UserError, match=message) as refused:
        manifest_of(root)
    assert "\n" not in str(refused.value)


def test_names_must_differ_over_all_files(root: Path) -> None:
    for name in ("0.parquet", "1.parquet"):
        write(root / "photos" / name, image=IMAGES, identity=[1, 2, 3], photo=["a", "b", "c"])
    with pytest.raises(UserError, match="names 6 photos by 3 names"):
        manifest_of(root)


def test_a_damaged_parquet_file_is_named(root: Path) -> None:
    place(root, "broken.parquet")
    with pytest.raises(UserError, match=r"broken\.parquet\W is no whole Parquet file"):
        manifest_of(root)


@pytest.mark.parametrize("nobody", ["", " ", "nan", "None", None])
def test_a_row_without_a_value_is_nobody(root: Path, nobody: str | None) -> None:
    write(root / "photos" / "a.parquet", image=IMAGES, identity=pa.array(["p", nobody, nobody]))
    rows = rows_of(manifest_of(root))
    assert list(rows.values()) == [("p", None), (None, table.NO_IDENTITY), (None, table.NO_IDENTITY)]


def test_a_number_that_is_none_is_nobody(root: Path) -> None:
    write(root / "photos" / "a.parquet", image=IMAGES, identity=pa.array([7.0, float("nan"), None], from_pandas=False))
    assert [identity for identity, _ in rows_of(manifest_of(root)).values()] == ["7", None, None]


def test_a_list_names_the_people_of_parquet_rows(root: Path) -> None:
    write(root / "photos" / "a.parquet", image=IMAGES, photo=["a.jpg", "b.jpg", "c.jpg"])
    rows = rows_of(manifest_of(root, "a.jpg ada\nb.jpg bob\n"))
    assert rows == {"a.jpg": ("ada", None), "b.jpg": ("bob", None), "c.jpg": (None, table.NO_IDENTITY)}


def test_photos_of_a_large_file_keep_their_order(root: Path) -> None:
    names = [f"{number * 7919 % 300_007:06d}" for number in range(300_000)]
    write(root / "photos" / "a.parquet", image=[b""] * len(names), identity=["1"] * len(names), photo=names)
    assert manifest_of(root).photos["photo"].to_pylist() == names
