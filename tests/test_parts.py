"""What is in an output folder decides: go on, nothing to do, or refuse; old rows are readable until new ones stand."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from lib import parts, storage
from lib.errors import JobError, UserError
from lib.parts import (
    PLAN_NAME,
    SUCCESS_NAME,
    Found,
    begin,
    finish_version,
    is_same_old_table,
    made_again,
    part_key,
    part_name,
    present_files,
    read_success,
    remove_unused,
    settle,
    split_in,
)
from lib.plans import differences, earlier_plan

PLAN = {"job": "embed", "model": "abc", "fingerprint": {"id": "x", "image_size": 240}}
OTHER = {**PLAN, "fingerprint": {"id": "y", "image_size": 112}}
A, B, C, D = (part_name("train", key, digest * 12) for key, digest in (("0", "a"), ("1", "b"), ("1", "c"), ("2", "d")))


def settled(folder: Path, plan: dict = PLAN, *, overwrite: bool = False) -> Found:
    return settle(str(folder), plan, flag="--output", overwrite=overwrite)


def make(
    folder: Path,
    names: Sequence[str],
    plan: dict = PLAN,
    *,
    keep: int = 2,
    overwrite: bool = False,
    killed_after: int | None = None,
) -> dict:
    """Do what a job does, up to a number of steps; return the plan of the version."""
    found = settled(folder, plan, overwrite=overwrite)
    begun = begin(found, plan, names)
    for number, name in enumerate(sorted(found.missing(names))):
        if number == killed_after:
            return begun
        storage.write_bytes(str(folder / name), f"rows of {name}".encode())
    if killed_after is None:
        about = {"fingerprint": plan["fingerprint"], "counts": {"rows": len(names)}}
        finish_version(str(folder), begun, names, about, keep_versions=keep)
    return begun


def read(folder: Path, run_id: str | None = None) -> dict:
    return read_success(str(folder), what="faces", job="jobs/preprocess.py", run_id=run_id)


def there(folder: Path) -> set[str]:
    return set(present_files(str(folder)))


def test_names_say_split_part_and_content() -> None:
    assert part_name("val", "000003", "0123456789abcdef") == "split=val/part-000003-0123456789ab.parquet"
    again = made_again(part_name("val", "c12.000003", "f" * 64), 7)
    assert (split_in(again), part_key(again)) == ("val", "c12.000003")
    assert made_again(again, 8) == part_name("val", "c12.000003", "f" * 64).replace(".parquet", ".v8.parquet")
    assert part_key("split=val/part-000003.parquet") is None


def test_an_empty_folder_is_begun_and_the_same_plan_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "é new"
    assert settled(folder) == Found(str(folder))
    begun = make(folder, [A, B], killed_after=1)
    assert settled(folder).missing([A, B]) == {B}
    assert make(folder, [A, B])["run_id"] == begun["run_id"]
    found = settled(folder)
    assert found.is_finished([B, A])
    assert not found.is_finished([A])
    success = read(folder)
    assert (success["run_id"], success["version"], success["counts"]) == (begun["run_id"], 1, {"rows": 2})
    assert success["parts"].keys() == {A, B}


def test_growth_makes_what_changed_and_readers_see_one_version_throughout(tmp_path: Path) -> None:
    first = make(tmp_path, [A, B])
    assert settled(tmp_path).missing([A, C, D]) == {C, D}
    second = make(tmp_path, [A, C, D], killed_after=1)
    assert (read(tmp_path)["run_id"], set(read(tmp_path)["parts"])) == (first["run_id"], {A, B})
    assert make(tmp_path, [A, C, D])["run_id"] == second["run_id"] != first["run_id"]
    assert set(read(tmp_path)["parts"]) == {A, C, D}
    assert read(tmp_path)["version"] == 2
    # Who began with the version before can go on with it.
    assert set(read(tmp_path, first["run_id"])["parts"]) == {A, B}
    assert there(tmp_path) == {A, B, C, D}
    make(tmp_path, [A, D])
    assert there(tmp_path) == {A, C, D}
    assert set(read(tmp_path, first["run_id"])["parts"]) == {A, D}
    assert settled(tmp_path).is_finished([A, D])


@pytest.mark.parametrize(("keep", "left"), [(1, {D}), (2, {C, D}), (3, {A, C, D})])
def test_as_many_versions_stay_as_are_asked_for(tmp_path: Path, keep: int, left: set[str]) -> None:
    for name in (B, A, C, D):
        make(tmp_path, [name], keep=keep)
    assert there(tmp_path) == left
    assert len(list((tmp_path / "_versions").glob("*.json"))) == keep - 1


def test_going_back_to_an_older_version_makes_nothing_that_is_kept(tmp_path: Path) -> None:
    first = make(tmp_path, [A, B])
    make(tmp_path, [A, C])
    assert settled(tmp_path).missing([A, B]) == set()
    again = make(tmp_path, [A, B])
    assert (read(tmp_path)["version"], set(read(tmp_path)["parts"])) == (3, {A, B})
    assert again["run_id"] != first["run_id"]


def test_other_settings_are_refused_with_what_differs(tmp_path: Path) -> None:
    make(tmp_path, [A], killed_after=0)
    with pytest.raises(UserError, match=r"image_size: 240 there, 112 now.*by --output.*--overwrite"):
        settled(tmp_path, OTHER)


def test_overwrite_replaces_the_table_only_when_the_new_one_stands(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    (tmp_path / "mine.txt").rename(tmp_path.with_suffix(".txt"))
    make(tmp_path, [A, B])
    for killed_after in (0, 1, 2):
        make(tmp_path, [C, D], OTHER, overwrite=True, killed_after=killed_after)
        assert set(read(tmp_path)["parts"]) == {A, B}
        assert read(tmp_path)["fingerprint"] == PLAN["fingerprint"]
    make(tmp_path, [C, D], OTHER, keep=1)  # it goes on without the flag
    assert there(tmp_path) == {C, D}
    assert read(tmp_path)["fingerprint"] == OTHER["fingerprint"]


def test_an_overwrite_that_was_given_up_leaves_the_table_as_it_was(tmp_path: Path) -> None:
    first = make(tmp_path, [A, B])
    make(tmp_path, [C, D], OTHER, overwrite=True, killed_after=1)
    found = settled(tmp_path, overwrite=True)
    assert found.is_finished([A, B])
    assert begin(found, PLAN, [A, B])["run_id"] == first["run_id"]
    assert found.success is not None
    remove_unused(str(tmp_path), found.success, found.present, keep_versions=2)
    assert there(tmp_path) == {A, B}
    assert settled(tmp_path).is_finished([A, B])


def test_a_kill_at_any_step_of_the_swap_loses_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(tmp_path, [A, B], keep=1)
    real = {"write_json": storage.write_json, "remove": storage.remove}
    for steps in range(5):
        left = steps

        def step(name: str, *arguments: object) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            real[name](*arguments)

        for name in real:
            monkeypatch.setattr(storage, name, lambda *arguments, name=name: step(name, *arguments))
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, [A, C], keep=1)
        monkeypatch.undo()
        success = read(tmp_path)
        assert set(success["parts"]) in ({A, B}, {A, C})
        assert (success["run_id"] == first["run_id"]) == (set(success["parts"]) == {A, B})
        if set(success["parts"]) == {A, C}:
            break
    else:
        pytest.fail("the swap never came")
    found = settled(tmp_path)
    assert found.is_finished([A, C])
    remove_unused(str(tmp_path), success, found.present, keep_versions=1)
    assert there(tmp_path) == {A, C}


def test_of_two_jobs_at_once_the_one_that_began_first_is_refused(tmp_path: Path) -> None:
    make(tmp_path, [A])
    slow = begin(settled(tmp_path), PLAN, [A, B])
    storage.write_bytes(str(tmp_path / B), b"rows")
    fast = make(tmp_path, [A, C])
    with pytest.raises(JobError, match="another job began version 2 of this table"):
        finish_version(str(tmp_path), slow, [A, B], {"fingerprint": {}, "counts": {}})
    assert read(tmp_path)["run_id"] == fast["run_id"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_another_job_or_somebody_else_made_is_never_removed(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, overwrite: bool
) -> None:
    make(tmp_path, [A])
    with pytest.raises(UserError, match="holds what another job made, which is never overwritten"):
        settled(tmp_path, {**PLAN, "job": "preprocess"}, overwrite=overwrite)
    foreign = tmp_path_factory.mktemp("foreign")
    (foreign / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"mine\.txt"):
        settled(foreign, overwrite=overwrite)
    assert (foreign / "mine.txt").exists()


def test_only_parts_are_ever_removed(tmp_path: Path) -> None:
    make(tmp_path, [A])
    for name in ("card.json", "mine.txt", "mine.parquet", "split=train/mine.txt"):
        (tmp_path / name).write_text("keep me")
    make(tmp_path, [B], keep=1)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        *("card.json", "mine.txt", "mine.parquet", PLAN_NAME, SUCCESS_NAME, Path(B).name)
    }


def test_a_folder_without_a_plan_may_hold_what_is_written_before_it(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "checkpoints" / "1"), b"?")
    assert earlier_plan(str(tmp_path), "config.json", PLAN, begun="checkpoints") == (None, "")
    assert (
        earlier_plan(str(tmp_path), "config.json", PLAN)[1] == "holds files but no config.json, such as checkpoints/1"
    )


def test_half_written_files_are_no_parts(tmp_path: Path) -> None:
    make(tmp_path, [A], killed_after=1)
    (tmp_path / "split=train" / ".abc.tmp").write_bytes(b"half")
    assert there(tmp_path) == {A}


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_table_that_lost_a_part_is_refused_by_readers_and_made_again_by_its_job(tmp_path: Path, damage: str) -> None:
    before = make(tmp_path, [A, B])
    part = tmp_path / B
    if damage == "gone":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"1 of the 2 parts of .* such as split=train/part-1-bbbbbbbbbbbb.parquet: run"):
        read(tmp_path)
    found = settled(tmp_path)
    assert not found.is_finished([A, B])
    assert found.missing([A, B]) == {B}
    assert make(tmp_path, [A, B]) == before
    assert read(tmp_path)["version"] == 1


OLD = ["split=test/part-000000.parquet", "split=train/part-000001.parquet"]


@pytest.fixture(params=["with sizes", "without"])
def old(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Return a finished table as it was made before there were versions."""
    storage.write_json(str(tmp_path / PLAN_NAME), {"run_id": "old", **PLAN, "manifest": "1"})
    for name in OLD:
        storage.write_bytes(str(tmp_path / name), b"rows of " + name.encode())
    success = {"run_id": "old", "fingerprint": {}, "counts": {}}
    sizes = {"parts": present_files(str(tmp_path))} if request.param == "with sizes" else {}
    storage.write_json(str(tmp_path / SUCCESS_NAME), {**success, **sizes})
    return tmp_path


def test_an_old_table_is_read_as_before(old: Path) -> None:
    assert set(read(old)["parts"]) == set(OLD)
    found = settled(old)
    assert is_same_old_table(found, lambda: {"manifest": "1"})
    assert not is_same_old_table(found, lambda: {"manifest": "2"})


def test_an_old_table_is_converted_when_it_grows(old: Path) -> None:
    begun = make(old, [A], killed_after=1)
    assert set(read(old)["parts"]) == set(OLD)
    assert make(old, [A, B])["run_id"] != begun["run_id"]
    assert set(read(old)["parts"]) == {A, B}
    assert set(read(old, "old")["parts"]) == set(OLD)
    make(old, [A, C])
    assert there(old) == {A, B, C}


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"null", b"{", b"{}", b"\xff\xfe", b"[" * 100_000),
        b'{"run_id": 5, "fingerprint": {}, "counts": {}}',
        b'{"run_id": "1", "fingerprint": {}, "counts": {}, "parts": [1]}',
    ],
)
def test_a_success_file_of_another_shape_is_one_line(tmp_path: Path, content: bytes) -> None:
    make(tmp_path, [A])
    (tmp_path / SUCCESS_NAME).write_bytes(content)
    with pytest.raises(UserError, match=r"_SUCCESS.*: remove it and run the job that made it again") as refused:
        read(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_setting_that_is_newer_than_a_plan_had_its_default() -> None:
    newer = {**PLAN, "colour": "red"}
    assert differences(newer, PLAN) == []
    assert differences(newer, PLAN, {"colour": "red"}) == []
    assert differences(newer, PLAN, {"colour": "grey"}) == ["colour: grey there, red now"]


def test_files_that_are_there_are_not_asked_for_by_their_versions_alone(tmp_path: Path) -> None:
    assert parts.KEEP_VERSIONS == 2
    make(tmp_path, [A])
    (tmp_path / A).unlink()
    assert settled(tmp_path).missing([A, B]) == {A, B}


@pytest.mark.parametrize("name", [SUCCESS_NAME, PLAN_NAME])
def test_a_table_of_another_format_is_refused_in_a_line_and_left_alone(tmp_path: Path, name: str) -> None:
    make(tmp_path, [A])
    content = json.loads((tmp_path / name).read_text())
    assert content["format"] == 1
    (tmp_path / name).write_text(json.dumps({**content, "format": 2}))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    uses = [lambda: make(tmp_path, [A, B]), lambda: make(tmp_path, [B], overwrite=True)]
    # Readers take the version that stands, whatever is being made.
    for use in [*uses, *([lambda: read(tmp_path)] if name == SUCCESS_NAME else [])]:
        with pytest.raises(UserError, match="format 2, made by another version of these jobs; this one reads format 1"):
            use()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
