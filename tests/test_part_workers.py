"""What ends workers ends the job in one line."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lib import part_workers
from lib.errors import JobError, UserError
from lib.part_workers import Share, end_worker, run_parts, summary


class NeverStarts:
    def __init__(self) -> None:
        raise UserError("the weights are of another model: choose others")


class NeverLoads:
    def __init__(self) -> None:
        raise RuntimeError("a library's error")


class AlwaysDies:
    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["part"] == 1:
            os._exit(3)
        return summary(lambda _: (1, 0), item)


class InHandTogether:
    """Finishes a part only beside another one, whichever that is: their order is Ray's."""

    def __init__(self) -> None:
        self._two = threading.Barrier(2)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        try:
            self._two.wait(120)
        except threading.BrokenBarrierError:
            return summary(lambda _: (0, 0), item)
        return summary(lambda _: (1, 0), item)


class LosesItsGpuOnce:
    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["part"] == 2 and not (self._folder / "failed").exists():
            (self._folder / "failed").touch()
            end_worker("its GPU failed")
        (self._folder / f"part {item['part']}").touch()
        return summary(lambda _: (1, 0), item)


class WaitsForAnotherWorker:
    """Finishes a part only when two workers are at work."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        (self._folder / str(os.getpid())).touch()
        deadline = time.monotonic() + 30
        while len(list(self._folder.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        return summary(lambda _: (int(len(list(self._folder.iterdir())) > 1), 0), item)


@pytest.mark.parametrize(
    ("worker", "line"),
    [
        (NeverStarts, "the weights are of another model: choose others"),
        pytest.param(AlwaysDies, "workers died 2 times over one part", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("connected_head")
def test_what_ends_the_workers_is_one_line(worker: type, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_workers, "TRIES_OF_A_PART", 2)
    with pytest.raises(JobError, match=line):
        run_parts([{"part": 0}, {"part": 1}], worker, (), unit="photo", num_done=0, num_all=2)


def test_a_look_that_finds_another_job_at_work_ends_this_one_early(monkeypatch: pytest.MonkeyPatch) -> None:
    done = summary(lambda _: (1, 0), {})
    monkeypatch.setattr(part_workers, "_summaries", lambda *_: [done] * 5)
    monkeypatch.setattr(part_workers, "_rows", iter)
    looks: list[int] = []

    def look() -> None:
        looks.append(len(looks))
        if len(looks) == 3:
            raise JobError("another job began version 2 of this table")

    def run() -> int:
        items = [{"part": part} for part in range(5)]
        share = Share(num_workers=1)
        return run_parts(items, AlwaysDies, (), unit="photo", num_done=0, num_all=5, share=share, look=look).num

    assert (run(), looks) == (5, [])
    monkeypatch.setattr(part_workers, "LOOK_EVERY_S", 0.0)
    with pytest.raises(JobError, match="another job began version 2"):
        run()
    assert looks == [0, 1, 2]


@pytest.mark.usefixtures("connected_head")
def test_an_error_of_a_workers_start_keeps_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_workers, "TRIES_OF_A_PART", 2)
    with pytest.raises(Exception, match="a library's error"):
        run_parts([{"part": 0}], NeverLoads, (), unit="photo", num_done=0, num_all=1)


@pytest.mark.usefixtures("connected_head")
def test_a_worker_has_parts_in_hand_at_once() -> None:
    items = [{"part": part} for part in range(4)]
    share = Share(num_workers=1, num_cpus=2, num_parts=2)  # no room for a second worker, which would take some of them
    done = run_parts(items, InHandTogether, (), unit="photo", num_done=0, num_all=4, share=share)
    assert done.num == 4


@pytest.mark.parametrize("num_parts", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.usefixtures("connected_head")
def test_workers_are_added_where_there_is_room(tmp_path: Path, num_parts: int) -> None:
    items = [{"part": part} for part in range(12)]
    share = Share(num_workers=1, num_parts=num_parts)
    arguments = (str(tmp_path),)
    done = run_parts(items, WaitsForAnotherWorker, arguments, unit="photo", num_done=0, num_all=12, share=share)
    assert done.num == 12


@pytest.mark.usefixtures("connected_head")
def test_a_gpu_that_fails_costs_the_parts_in_hand_and_not_the_job(tmp_path: Path) -> None:
    items = [{"part": part} for part in range(6)]
    share = Share(num_workers=1, num_parts=3)
    done = run_parts(items, LosesItsGpuOnce, (str(tmp_path),), unit="photo", num_done=0, num_all=6, share=share)
    assert done.num == 6
    assert {path.name for path in tmp_path.iterdir()} == {"failed", *(f"part {part}" for part in range(6))}
