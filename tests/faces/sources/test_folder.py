"""Photos that are files: what becomes of one that is gone, and of all."""

import shutil
from pathlib import Path

import pytest

from lib.errors import JobError
from lib.faces import table
from lib.faces.sources.opening import open_source


def test_a_photo_of_another_length_than_listed_is_changed_until_it_is_listed_again(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"half a phot")
    source = open_source(str(tmp_path))

    def listed() -> list[dict]:
        return [row for shard in source.shards() for batch in source.scan(shard) for row in batch.to_pylist()]

    rows = sorted(listed(), key=lambda row: row["photo"])
    (tmp_path / "b.jpg").write_bytes(b"a whole photo")
    assert [data for _, data in source.read(rows, num_ahead=2)] == [b"half a phot", table.CHANGED]
    assert {data for _, data in source.read(listed(), num_ahead=2)} == {b"half a phot", b"a whole photo"}
    unknown = [{**row, "num_bytes": 0} for row in rows]  # a list of names tells no lengths
    assert [data for _, data in source.read(unknown, num_ahead=2)] == [b"half a phot", b"a whole photo"]


@pytest.mark.parametrize("is_left", [False, True])
def test_a_photo_that_is_gone_is_missing_and_a_folder_that_is_gone_ends_the_job(tmp_path: Path, is_left: bool) -> None:
    photos = tmp_path / "my photos"
    photos.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (photos / name).write_bytes(name.encode())
    source = open_source(str(photos))
    rows = [{"photo": name, "source": None, "group": None, "row": None} for name in ("a.jpg", "b.jpg")]
    (photos / "b.jpg").unlink()
    assert [data for _, data in source.read(rows, num_ahead=2)] == [b"a.jpg", table.MISSING]
    shutil.rmtree(photos)
    if is_left:  # the empty folder that a share was mounted on
        photos.mkdir()
    with pytest.raises(JobError, match=r"my photos is gone: mount or restore it"):
        list(source.read(rows, num_ahead=2))
