"""What is in an output folder decides: go on, nothing to do, or refuse; and only what is ours is ever removed."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lib import cluster, parts, storage
from lib.errors import JobError, UserError
from lib.parts import PLAN_NAME, SUCCESS_NAME, present_files, run_parts, settle, summary, sweep, write_plan

PLAN = {"job": "embed", "model": "abc", "manifest": "1", "fingerprint": {"id": "x", "image_size": 240}}
OTHER = {**PLAN, "fingerprint": {"id": "y", "image_size": 112}}


def settled(folder: Path, plan: dict = PLAN, *, overwrite: bool = False) -> dict | None:
    return settle(str(folder), plan, flag="--output", overwrite=overwrite, other_names=["card.json"])


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
    storage.write_json(str(tmp_path / SUCCESS_NAME), {"counts": {"rows": 3}})
    assert settled(tmp_path) == {"counts": {"rows": 3}}


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


def test_half_written_files_are_swept_and_not_counted(begun: Path) -> None:
    (begun / "split=test" / ".abc.tmp").write_bytes(b"half")
    assert present_files(str(begun)) == {"split=test/part-000000.parquet"}
    sweep(str(begun))
    assert not (begun / "split=test" / ".abc.tmp").exists()


class NeverStarts:
    def __init__(self) -> None:
        raise UserError("the weights are of another model: choose others")


class AlwaysDies:
    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["part"] == 1:
            os._exit(3)
        return summary(lambda _: 1, item)


@pytest.fixture(scope="module")
def ray_of_its_own() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with cluster.connected():
            yield


@pytest.mark.parametrize(
    ("worker", "line"),
    [
        (NeverStarts, "the weights are of another model: choose others"),
        (AlwaysDies, "workers died 2 times over one part"),
    ],
)
@pytest.mark.usefixtures("ray_of_its_own")
def test_what_ends_the_workers_is_one_line(worker: type, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "TRIES_OF_A_PART", 2)
    with pytest.raises(JobError, match=line):
        run_parts([{"part": 0}, {"part": 1}], worker, (), unit="photo", num_done=0, num_all=2)
