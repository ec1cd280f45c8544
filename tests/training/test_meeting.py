"""Workers meet after copies of any length, and none waits for one that cannot come."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from lib.training import collective, control, meeting
from lib.training.control import Control
from lib.training.meeting import Meeting


def actor_of(plain: Control) -> Any:
    """Return what calls a control as Ray would; `ray.get` returns what it is given."""
    return SimpleNamespace(
        **{
            name: SimpleNamespace(remote=getattr(plain, name))
            for name in ("arrive", "num_arrived", "has_failed", "fail")
        }
    )


@pytest.fixture
def three_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(collective, "num_workers", lambda: 3)
    monkeypatch.setattr(collective, "broadcast", lambda _: "a meeting")
    monkeypatch.setattr(meeting, "LOOK_EVERY_S", 0.001)


@pytest.mark.usefixtures("three_workers")
def test_all_go_on_when_the_last_has_come() -> None:
    actor = actor_of(Control())
    done: list[int] = []

    def come(number: int) -> None:
        Meeting(actor).wait()
        done.append(number)

    early = [threading.Thread(target=come, args=(number,)) for number in range(2)]
    for each in early:
        each.start()
    early[0].join(timeout=0.1)
    assert not done
    come(2)
    for each in early:
        each.join(timeout=30)
    assert sorted(done) == [0, 1, 2]


@pytest.mark.usefixtures("three_workers")
def test_nobody_waits_for_a_worker_that_has_failed() -> None:
    plain = Control()
    plain.fail("user", "its disk cannot be written to")
    with pytest.raises(RuntimeError, match="another worker cannot go on"):
        Meeting(actor_of(plain)).wait()


def test_a_meeting_is_remembered_beside_the_next_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "KEPT_MEETINGS", 2)
    plain = Control()
    assert [plain.arrive(name) for name in ("a", "a", "b", "a")] == [1, 2, 1, 3]
    plain.arrive("c")
    assert [plain.num_arrived(name) for name in ("a", "b", "c")] == [0, 1, 1]


def test_a_worker_alone_asks_nobody() -> None:
    Meeting(None).wait()
