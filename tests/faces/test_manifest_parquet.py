"""The manifest of photos in Parquet files."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lib.errors import UserError
from lib.faces import table
from lib.faces.splits import split_of
from tests.faces.photo_folders import IMAGES, manifest_of, place, rows_of, write

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
