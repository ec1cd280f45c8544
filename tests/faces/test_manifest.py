import os
from pathlib import Path

import pyarrow as pa
import pytest

from lib.errors import UserError
from lib.faces import table
from lib.faces.manifest import Manifest
from lib.faces.splits import split_of
from tests.faces.photo_folders import IMAGES, PHOTO, STRANGE_NAMES, manifest_of, place, rows_of, write


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
