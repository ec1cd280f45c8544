from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.errors import UserError
from lib.faces import table
from lib.faces.extraction import ExtractionSettings
from lib.faces.manifest import Manifest, read_manifest
from lib.faces.photo_parts import PhotoReader, part_item, plan_parts
from lib.faces.sources import parquet
from lib.faces.sources.opening import open_source


class Echo:
    """Stands in for the extractor of batches: the rows of a photo hold the photo itself."""

    settings = ExtractionSettings()

    def rows(self, photos: list[bytes]) -> list[list[dict[str, Any]]]:
        return [[{"status": table.NO_FACE, "crop": data}] for data in photos]


def write(path: Path, first: int, group_sizes: Sequence[int], *, kind: str = "binary") -> None:
    path.parent.mkdir(exist_ok=True)
    schema = pa.schema([("image", pa.binary()), ("photo", pa.string()), ("identity", pa.string())])
    if kind == "struct":
        schema = schema.set(0, pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
    with pq.ParquetWriter(path, schema) as writer:
        for size in group_sizes:
            names = [f"{number:05d}" for number in range(first, first + size)]
            images: list[Any] = [f"image {name}".encode() for name in names]
            if kind == "struct":
                images = [{"bytes": image, "path": None} for image in images]
            columns = {"image": images, "photo": names, "identity": [f"p{int(name) % 7}" for name in names]}
            writer.write_table(pa.table(columns, schema=schema))
            first += size


def manifest_of(folder: Path) -> Manifest:
    return read_manifest(open_source(str(folder)), None, split_seed=0, identities_required=True)


def images_read(folder: Path, manifest: Manifest) -> list[tuple[str, bytes]]:
    reader = PhotoReader(open_source(str(folder)), Echo())  # type: ignore[arg-type]
    items = [part_item(manifest, part) for part in plan_parts(manifest)]
    made = [rows for item in items for split in reader.rows(item).values() for rows in split.rows]
    return [(row["photo"], row["crop"]) for row in made]


@pytest.mark.parametrize("kind", ["binary", "struct"])
@pytest.mark.parametrize("splits", [table.SPLITS, ("train",), ("val", "test")])
def test_every_photo_of_every_row_group_is_read_once(tmp_path: Path, kind: str, splits: tuple[str, ...]) -> None:
    write(tmp_path / "p" / "a.parquet", 0, [5, 40, 1, 200], kind=kind)
    write(tmp_path / "p" / "b.parquet", 246, [3, 31, 33], kind=kind)
    whole = manifest_of(tmp_path / "p")
    chosen = [split in splits for split in whole.photos["split"].to_pylist()]
    manifest = Manifest(whole.photos.filter(pa.array(chosen)), 0, {})
    read = images_read(tmp_path / "p", manifest)
    assert sorted(read) == [(name, f"image {name}".encode()) for name in sorted(manifest.photos["photo"].to_pylist())]


@pytest.mark.parametrize(
    ("group_sizes", "part_sizes"),
    [
        ([10] * 10, [30, 30, 30, 10]),
        ([5, 40, 1, 20], [5, 20, 21, 20]),
        ([200], [50, 50, 50, 50]),  # not seven of 32: each reads the group from its beginning
        ([9000], [1000] * 9),
        ([1000] * 70, [1000] * 70),
    ],
)
def test_parts_end_where_row_groups_do(tmp_path: Path, group_sizes: list[int], part_sizes: list[int]) -> None:
    write(tmp_path / "p" / "a.parquet", 0, group_sizes)
    parts = plan_parts(manifest_of(tmp_path / "p"))
    assert [part.stop - part.start for part in parts] == part_sizes
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]


def test_other_row_groups_are_another_manifest(tmp_path: Path) -> None:
    write(tmp_path / "p" / "a.parquet", 0, [20, 20])
    write(tmp_path / "q" / "a.parquet", 0, [40])
    assert manifest_of(tmp_path / "p").digest() != manifest_of(tmp_path / "q").digest()


def test_a_large_row_group_is_not_in_memory_as_a_whole(tmp_path: Path) -> None:
    images = pa.array([bytes(2**20)] * 64)
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet")
    del images
    before = pa.total_allocated_bytes()
    most = 0
    for _ in parquet._group_images(str(tmp_path / "a.parquet"), "image", 0, list(range(64))):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 2 * parquet.ROWS_AT_ONCE * 2**20 + 2 * parquet.COLUMN_BUFFER_BYTES


def test_a_damaged_page_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    write(tmp_path / "p" / "a.parquet", 0, [40])
    path = tmp_path / "p" / "a.parquet"
    manifest = manifest_of(tmp_path / "p")
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet"):
        images_read(tmp_path / "p", manifest)
