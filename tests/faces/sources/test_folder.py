"""Photos that are files: what becomes of one that is gone, and of all."""

import shutil
from pathlib import Path

import pytest

from lib.errors import JobError
from lib.faces import table
from lib.faces.sources.opening import open_source


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
