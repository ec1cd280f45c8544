"""What ends workers ends the job in one line."""

import os
from typing import Any

import pytest

from lib import part_workers
from lib.errors import JobError, UserError
from lib.part_workers import run_parts, summary


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


@pytest.mark.parametrize(
    ("worker", "line"),
    [
        (NeverStarts, "the weights are of another model: choose others"),
        (AlwaysDies, "workers died 2 times over one part"),
    ],
)
@pytest.mark.usefixtures("connected_head")
def test_what_ends_the_workers_is_one_line(worker: type, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_workers, "TRIES_OF_A_PART", 2)
    with pytest.raises(JobError, match=line):
        run_parts([{"part": 0}, {"part": 1}], worker, (), unit="photo", num_done=0, num_all=2)


@pytest.mark.usefixtures("connected_head")
def test_an_error_of_a_workers_start_keeps_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_workers, "TRIES_OF_A_PART", 2)
    with pytest.raises(Exception, match="a library's error"):
        run_parts([{"part": 0}], NeverLoads, (), unit="photo", num_done=0, num_all=1)
