"""The list of photos on disk: a worker reads the rows of its part, and a job that starts again reads the whole plan."""

from pathlib import Path

import pyarrow as pa
import pytest

from lib.errors import UserError
from lib.faces import plan_files
from lib.faces.manifest import read_manifest
from lib.faces.part_plan import plan_parts
from lib.faces.plan_files import PartPlan, stored_plan
from lib.faces.sources.opening import open_source


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many photos é")
    for number in range(700):
        path = folder / f"p{number % 30}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * number)
    return folder


def planned(folder: Path) -> PartPlan:
    return plan_parts(read_manifest(open_source(str(folder)), None, identities_required=True), "settings")


def test_each_photo_is_in_one_part_however_the_shards_are_cut(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = planned(photos)
    monkeypatch.setattr(plan_files, "ROWS_A_GROUP", 20)
    monkeypatch.setattr(plan_files, "ROWS_A_SHARD", 90)
    pieces = planned(photos)
    assert len({part.shard for part in pieces.parts}) > 3
    assert pieces.file_names() == whole.file_names()
    for small, large in zip(pieces.parts, whole.parts, strict=True):
        assert pieces.rows(small).equals(whole.rows(large))
    names = pa.concat_tables(pieces.rows(part) for part in pieces.parts)["photo"].to_pylist()
    assert sorted(names) == sorted(str(path.relative_to(photos)) for path in photos.rglob("*.jpg"))


def test_a_stored_plan_is_read_back_and_one_of_another_list_is_not(photos: Path, tmp_path: Path) -> None:
    plan, url = planned(photos), str(tmp_path / "my faces" / "_manifest")
    assert stored_plan(url, "these") is None
    stored = plan.stored(url, "these")
    found = stored_plan(url, "these")
    assert found == stored
    assert found is not None
    assert found.rows(found.parts[3]).equals(plan.rows(plan.parts[3]))
    assert (found.num_photos, found.num_bytes, found.layout) == (700, sum(range(700)), plan.layout)
    assert stored_plan(url, "others") is None
    Path(found.url, "photos-00000.parquet").unlink()
    with pytest.raises(UserError, match="photos-00000"):
        found.rows(found.parts[0])


def test_two_jobs_that_plan_at_once_read_their_own_photos(photos: Path, tmp_path: Path) -> None:
    first, url = planned(photos), str(tmp_path / "_manifest")
    of_first = first.stored(url, "these")
    for path in sorted(photos.rglob("*.jpg"))[::7]:
        path.unlink()
    second = planned(photos)
    of_second = second.stored(url, "these")
    for made, stored in ((first, of_first), (second, of_second)):
        assert all(stored.rows(part).equals(made.rows(part)) for part in made.parts)
    assert stored_plan(url, "these") == of_second
