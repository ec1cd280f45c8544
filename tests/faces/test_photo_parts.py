import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import storage
from lib.errors import UserError
from lib.faces import table
from lib.faces.extraction import ExtractionSettings, FaceExtractor
from lib.faces.manifest import Manifest, read_manifest
from lib.faces.part_plan import PartPlan, earlier_files, part_size, plan_parts
from lib.faces.photo_parts import PhotoReader, part_item
from lib.faces.sources import parquet
from lib.faces.sources.opening import open_source
from lib.parts import split_in


class Echo:
    """Stands in for the extractor of batches: the rows of a photo hold the photo itself."""

    settings = ExtractionSettings()
    made_on = "echo"

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def rows(self, photos: list[bytes]) -> list[list[dict[str, Any]]]:
        self.seen += photos
        return [[{"status": table.CORRUPT if b"bad" in data else table.ALIGNED, "crop": data}] for data in photos]


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
    plan = plan_parts(manifest, "settings")
    items = [part_item(plan, part) for part in plan.parts]
    made = [rows for item in items for split in reader.rows(item).values() for rows in split.rows]
    return [(row["photo"], row["crop"]) for row in made]


@pytest.mark.parametrize("kind", ["binary", "struct"])
@pytest.mark.parametrize("splits", [table.SPLITS, ("train",), ("val", "test")])
def test_every_photo_of_every_row_group_is_read_once(tmp_path: Path, kind: str, splits: tuple[str, ...]) -> None:
    write(tmp_path / "p" / "a.parquet", 0, [5, 40, 1, 200], kind=kind)
    write(tmp_path / "p" / "b.parquet", 246, [3, 31, 33], kind=kind)
    whole = manifest_of(tmp_path / "p")
    chosen = [split in splits for split in whole.photos["split"].to_pylist()]
    manifest = Manifest.of(whole.photos.filter(pa.array(chosen)))
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
    parts = plan_parts(manifest_of(tmp_path / "p"), "settings").parts
    assert [part.stop - part.start for part in parts] == part_sizes
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]


def make(
    folder: Path, faces: Path, success: dict[str, Any] | None, *, retry: Sequence[str] = ()
) -> tuple[dict[str, Any], list[str], PartPlan]:
    """Write the parts that `success` does not have; return what it says of all of them, and the images looked at."""
    echo = Echo()
    reader = PhotoReader(open_source(str(folder)), echo)  # type: ignore[arg-type]
    plan = plan_parts(manifest_of(folder), "settings", success)
    todo = [part for part in plan.parts if not set((success or {}).get("parts", ())) >= set(part.file_names())]
    for part, files in zip(todo, earlier_files(todo, plan.layout, success), strict=True):
        for split, made in reader.rows(part_item(plan, part, files), str(faces), retry).items():
            storage.write_parquet(str(faces / part.names[split]), table.faces_table(made.rows, "{}"))
    return {"parts": plan.file_names(), **plan.layout}, sorted(data.decode() for data in echo.seen), plan


def rows_of(faces: Path, success: dict[str, Any]) -> dict[str, tuple[str | None, str, str]]:
    rows = [(name, row) for name in success["parts"] for row in storage.read_parquet(str(faces / name)).to_pylist()]
    found = {row["photo"]: (row["identity"], split_in(name), row["crop"].decode()) for name, row in rows}
    assert len(found) == len(rows)
    return found


def photo(folder: Path, name: str, content: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content)


def test_a_folder_that_grew_shrank_and_changed_looks_at_the_changed_photos_alone(tmp_path: Path) -> None:
    folder, faces = tmp_path / "p", tmp_path / "faces é"
    for number in range(300):
        photo(folder, f"{number % 20}/{number}.jpg", f"image {number}")
    first, seen, _ = make(folder, faces, None)
    assert len(seen) == 300
    photo(folder, "3/new.jpg", "a new one")
    photo(folder, "4/4.jpg", "another")
    (folder / "5" / "5.jpg").unlink()
    second, seen, plan = make(folder, faces, first)
    assert seen == ["a new one", "another"]
    assert 0 < len(set(second["parts"]) - set(first["parts"])) <= 3
    fresh, _, _ = make(folder, tmp_path / "fresh", None)
    assert rows_of(faces, second) == rows_of(tmp_path / "fresh", fresh)
    assert second == fresh  # what grew is what would be made from nothing, files and all
    for name in second["parts"]:
        assert (faces / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    assert plan.num_photos == 300


def test_people_who_move_to_another_split_take_their_crops_along(tmp_path: Path) -> None:
    folder, faces = tmp_path / "p", tmp_path / "faces"
    for number in range(400):
        photo(folder, f"{number}.jpg", f"image {number}")
    lines = [f"{number}.jpg {number % 40}" for number in range(400)]
    (tmp_path / "identities.txt").write_text("\n".join(lines))
    listed = str(tmp_path / "identities.txt")

    def planned(success: dict[str, Any] | None) -> PartPlan:
        manifest = read_manifest(open_source(str(folder)), listed, split_seed=0, identities_required=True)
        return plan_parts(manifest, "settings", success)

    reader = PhotoReader(open_source(str(folder)), Echo())  # type: ignore[arg-type]
    plan = planned(None)
    for part in plan.parts:
        for split, made in reader.rows(part_item(plan, part)).items():
            storage.write_parquet(str(faces / part.names[split]), table.faces_table(made.rows, "{}"))
    success = {"parts": plan.file_names(), **plan.layout}
    lines = [f"{number}.jpg {'other' if number % 40 < 20 else ''}{number % 40}" for number in range(400)]
    (tmp_path / "identities.txt").write_text("\n".join(lines))
    plan = planned(success)
    echo = Echo()
    reader = PhotoReader(open_source(str(folder)), echo)  # type: ignore[arg-type]
    moved = 0
    for part, files in zip(plan.parts, earlier_files(plan.parts, plan.layout, success), strict=True):
        for made in reader.rows(part_item(plan, part, files), str(faces)).values():
            assert all(
                row["identity"].startswith("other") == (int(row["identity"].removeprefix("other")) < 20)
                for row in made.rows
            )
            moved += made.num_copied
    assert (moved, echo.seen) == (400, [])


def test_parts_that_grow_double_and_no_photo_is_looked_at_again(tmp_path: Path) -> None:
    folder, faces = tmp_path / "p", tmp_path / "faces"
    for number in range(100):
        photo(folder, f"a/{number}.jpg", f"image {number}")
    first, _, _ = make(folder, faces, None)
    for number in range(100, 700):
        photo(folder, f"a/{number}.jpg", f"image {number}")
    second, seen, plan = make(folder, faces, first)
    assert len(seen) == 600
    assert len(rows_of(faces, second)) == 700
    assert max(part.stop - part.start for part in plan.parts) <= 3 * 32
    assert sum(second["part_buckets"].values()) > 2 * sum(first["part_buckets"].values())


@pytest.mark.parametrize("changed", ["a file more", "identities", "content"])
def test_files_of_photos_that_grew_or_changed_look_at_the_changed_ones_alone(tmp_path: Path, changed: str) -> None:
    folder, faces = tmp_path / "p", tmp_path / "faces"
    write(folder / "b.parquet", 0, [50, 50])
    write(folder / "c.parquet", 100, [50])
    first, seen, _ = make(folder, faces, None)
    assert len(seen) == 150
    if changed == "a file more":
        write(folder / "a.parquet", 150, [40])
    elif changed == "content":
        write(folder / "c.parquet", 150, [50])
    else:
        lines = "".join(f"{number:05d} somebody\n" for number in range(150))
        (tmp_path / "identities.txt").write_text(lines)
    echo = Echo()
    reader = PhotoReader(open_source(str(folder)), echo)  # type: ignore[arg-type]
    listed = str(tmp_path / "identities.txt")
    manifest = read_manifest(open_source(str(folder)), listed, split_seed=0, identities_required=True)
    plan = plan_parts(manifest, "settings", first)
    rows = [
        row
        for part, files in zip(plan.parts, earlier_files(plan.parts, plan.layout, first), strict=True)
        for made in reader.rows(part_item(plan, part, files), str(faces)).values()
        for row in made.rows
    ]
    assert len(echo.seen) == {"a file more": 40, "identities": 0, "content": 50}[changed]
    assert len(rows) == len(manifest)
    if changed == "identities":
        assert {row["identity"] for row in rows} == {"somebody"}


def test_a_retry_looks_at_photos_of_those_statuses_again(tmp_path: Path) -> None:
    folder, faces = tmp_path / "p", tmp_path / "faces"
    for number in range(90):
        photo(folder, f"a/{number}.jpg", f"{'bad' if number % 9 == 0 else 'good'} {number}")
    first, _, plan = make(folder, faces, None)
    echo = Echo()
    reader = PhotoReader(open_source(str(folder)), echo)  # type: ignore[arg-type]
    for part, files in zip(plan.parts, earlier_files(plan.parts, plan.layout, first), strict=True):
        reader.rows(part_item(plan, part, files), str(faces), [table.CORRUPT])
    assert sorted(echo.seen) == sorted(f"bad {number}".encode() for number in range(0, 90, 9))


def test_older_rows_that_are_gone_or_damaged_are_made_again(tmp_path: Path) -> None:
    folder, faces = tmp_path / "p", tmp_path / "faces"
    for number in range(60):
        photo(folder, f"a/{number}.jpg", f"image {number}")
    first, _, plan = make(folder, faces, None)
    gone, damaged = sorted(first["parts"])[:2] if len(first["parts"]) > 1 else (first["parts"][0], None)
    (faces / gone).unlink()
    if damaged:
        (faces / damaged).write_bytes(b"PAR1 no more")
    echo = Echo()
    reader = PhotoReader(open_source(str(folder)), echo)  # type: ignore[arg-type]
    made = [
        row["photo"]
        for part, files in zip(plan.parts, earlier_files(plan.parts, plan.layout, first), strict=True)
        for split in reader.rows(part_item(plan, part, files), str(faces)).values()
        for row in split.rows
    ]
    assert len(made) == len(set(made)) == 60
    assert echo.seen


def test_other_row_groups_are_other_parts(tmp_path: Path) -> None:
    write(tmp_path / "p" / "a.parquet", 0, [20, 20])
    write(tmp_path / "q" / "a.parquet", 0, [40])
    one, other = (set(plan_parts(manifest_of(tmp_path / name), "settings").file_names()) for name in "pq")
    assert not one & other


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


class OneByOne(FaceExtractor):
    """Stands in for the extractor of single photos; with `fails` it makes no rows of the fifth photo."""

    def __init__(self, *, fails: bool) -> None:
        self.settings = ExtractionSettings()
        self._left = 4 if fails else 10**6

    @property
    def made_on(self) -> str:
        return "echo"

    def rows(self, photo: bytes) -> list[dict[str, Any]]:
        self._left -= 1
        if self._left < 0:
            raise ValueError("no rows")
        return [{"status": table.ALIGNED, "crop": photo}]


@pytest.mark.parametrize("fails", [False, True])
def test_no_thread_that_reads_outlives_its_part(tmp_path: Path, fails: bool) -> None:
    """What ends it later may be the garbage collector, while another thread starts: then the process stands still."""
    people = tmp_path / "photos" / "p"
    people.mkdir(parents=True)
    for number in range(40):
        (people / f"{number}.jpg").write_bytes(b"image")
    source = open_source(str(tmp_path / "photos"))
    plan = plan_parts(read_manifest(source, None, identities_required=True), "settings")
    before = set(threading.enumerate())
    kept: list[object] = []  # a traceback holds the frames, and they hold what reads
    for part in plan.parts:
        try:
            kept.append(PhotoReader(source, OneByOne(fails=fails)).rows(part_item(plan, part)))
        except ValueError as error:
            kept.append(error)
        assert set(threading.enumerate()) == before
    assert {type(each) for each in kept} == {ValueError if fails else dict}


@pytest.mark.parametrize(
    ("num_photos", "size"), [(50, 32), (6_400, 100), (64_000, 1000), (30_000_000, 1000), (100_000_000, 3051)]
)
def test_parts_grow_so_that_a_driver_can_hold_their_list(num_photos: int, size: int) -> None:
    assert part_size(num_photos) == size
