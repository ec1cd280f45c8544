"""What is in an output folder decides: go on, nothing to do, or refuse; and only what is ours is ever removed."""

import os
from pathlib import Path
from typing import Any

import pytest

from lib import parts, storage
from lib.errors import JobError, UserError
from lib.parts import (
    PLAN_NAME,
    SUCCESS_NAME,
    differences,
    earlier_plan,
    present_files,
    read_success,
    run_parts,
    settle,
    summary,
    write_plan,
)

PLAN = {"job": "embed", "model": "abc", "manifest": "1", "fingerprint": {"id": "x", "image_size": 240}}
OTHER = {**PLAN, "fingerprint": {"id": "y", "image_size": 112}}


def settled(folder: Path, plan: dict = PLAN, *, overwrite: bool = False) -> dict | None:
    return settle(str(folder), plan, flag="--output", overwrite=overwrite, file_names=[], other_names=["card.json"])


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """Return a folder with one part of a plan."""
    write_plan(str(tmp_path), PLAN)
    for name in ("split=test/part-000000.parquet", "card.json", "mine.txt"):
        storage.write_bytes(str(tmp_path / name), b"?")
    return tmp_path


def test_an_empty_folder_is_begun_and_the_same_plan_goes_on(tmp_path: Path) -> None:
    assert settled(tmp_path / "é new") is None
    run_id = write_plan(str(tmp_path), PLAN)
    assert settled(tmp_path) is None
    assert write_plan(str(tmp_path), PLAN) == run_id
    success = {"run_id": run_id, "fingerprint": {}, "counts": {"rows": 3}}
    storage.write_json(str(tmp_path / SUCCESS_NAME), success)
    assert settled(tmp_path) == success


def test_another_plan_is_refused_with_what_differs(begun: Path) -> None:
    with pytest.raises(UserError, match=r"image_size: 240 there, 112 now.*by --output.*--overwrite"):
        settled(begun, OTHER)
    with pytest.raises(UserError, match="other photos or identities, as many as before"):
        settled(begun, {**PLAN, "manifest": "2"})


def test_overwrite_removes_the_parts_and_the_plan_and_nothing_else(begun: Path) -> None:
    assert settled(begun, OTHER, overwrite=True) is None
    assert {path.name for path in begun.rglob("*") if path.is_file()} == {"mine.txt"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_another_job_or_somebody_else_made_is_never_removed(
    begun: Path, tmp_path_factory: pytest.TempPathFactory, overwrite: bool
) -> None:
    with pytest.raises(UserError, match="holds what another job made, which is never overwritten"):
        settled(begun, {**PLAN, "job": "preprocess"}, overwrite=overwrite)
    assert (begun / PLAN_NAME).exists()
    foreign = tmp_path_factory.mktemp("foreign")
    (foreign / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match=r"mine\.txt"):
        settled(foreign, overwrite=overwrite)
    assert (foreign / "mine.txt").exists()


def test_a_folder_without_a_plan_may_hold_what_is_written_before_it(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "checkpoints" / "1"), b"?")
    assert earlier_plan(str(tmp_path), "config.json", PLAN, begun="checkpoints") == (None, "")
    assert (
        earlier_plan(str(tmp_path), "config.json", PLAN)[1] == "holds files but no config.json, such as checkpoints/1"
    )


def test_half_written_files_are_no_parts(begun: Path) -> None:
    (begun / "split=test" / ".abc.tmp").write_bytes(b"half")
    assert present_files(str(begun)) == {"split=test/part-000000.parquet": 1}


class NeverStarts:
    def __init__(self) -> None:
        raise UserError("the weights are of another model: choose others")


class AlwaysDies:
    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["part"] == 1:
            os._exit(3)
        return summary(lambda _: 1, item)


@pytest.mark.parametrize(
    ("worker", "line"),
    [
        (NeverStarts, "the weights are of another model: choose others"),
        (AlwaysDies, "workers died 2 times over one part"),
    ],
)
@pytest.mark.usefixtures("connected_head")
def test_what_ends_the_workers_is_one_line(worker: type, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "TRIES_OF_A_PART", 2)
    with pytest.raises(JobError, match=line):
        run_parts([{"part": 0}, {"part": 1}], worker, (), unit="photo", num_done=0, num_all=2)


NAMES = ["split=test/part-000000.parquet", "split=train/part-000001.parquet", "split=val/part-000002.parquet"]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """Return a finished output of three parts."""
    run_id = write_plan(str(tmp_path), PLAN)
    for name in NAMES:
        storage.write_bytes(str(tmp_path / name), b"rows of " + name.encode())
    success = {"run_id": run_id, "fingerprint": {}, "counts": {}, "parts": present_files(str(tmp_path))}
    storage.write_json(str(tmp_path / SUCCESS_NAME), success)
    return tmp_path


def finished(folder: Path) -> dict | None:
    return settle(str(folder), PLAN, flag="--output", overwrite=False, file_names=NAMES)


def test_a_whole_output_is_read_and_left_alone(whole: Path) -> None:
    assert read_success(str(whole), what="faces", job="jobs/preprocess.py")["parts"].keys() == set(NAMES)
    assert finished(whole) is not None


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_an_output_that_lost_a_part_is_refused_by_readers_and_made_again_by_its_job(whole: Path, damage: str) -> None:
    part = whole / NAMES[1]
    if damage == "gone":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=r"1 of the 3 parts of .* such as split=train/part-000001\.parquet: run jobs/pre"
    ):
        read_success(str(whole), what="faces", job="jobs/preprocess.py")
    assert finished(whole) is None
    assert present_files(str(whole)).keys() == set(NAMES) - {NAMES[1]}


def test_an_older_output_says_nothing_of_its_parts_and_its_plan_tells_what_is_gone(whole: Path) -> None:
    success = storage.read_json(str(whole / SUCCESS_NAME))
    del success["parts"]
    storage.write_json(str(whole / SUCCESS_NAME), success)
    assert read_success(str(whole), what="faces", job="jobs/preprocess.py") == success
    assert finished(whole) == success
    (whole / NAMES[0]).unlink()
    assert finished(whole) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{", b"{}", b'{"run_id": 5, "fingerprint": {}, "counts": {}}', b"\xff\xfe", b"[" * 100_000],
)
def test_a_success_file_of_another_shape_is_one_line(whole: Path, content: bytes) -> None:
    (whole / SUCCESS_NAME).write_bytes(content)
    with pytest.raises(UserError, match=r"_SUCCESS'.*: remove it and run the job that made it again") as refused:
        read_success(str(whole), what="faces", job="jobs/preprocess.py")
    assert "\n" not in str(refused.value)


def test_nothing_is_removed_before_the_new_output_can_be_made(begun: Path) -> None:
    def cannot() -> None:
        raise UserError("no cluster")

    before = present_files(str(begun))
    with pytest.raises(UserError, match="no cluster"):
        settle(str(begun), OTHER, flag="--output", overwrite=True, file_names=[], before_removal=cannot)
    assert present_files(str(begun)) == before
    assert (begun / PLAN_NAME).exists()


def test_a_setting_that_is_newer_than_a_plan_had_its_default() -> None:
    newer = {**PLAN, "colour": "red"}
    assert differences(newer, PLAN) == []
    assert differences(newer, PLAN, {"colour": "red"}) == []
    assert differences(newer, PLAN, {"colour": "grey"}) == ["colour: grey there, red now"]
