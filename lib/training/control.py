"""Messages between a run's driver and its workers, through one small Ray actor on the driver's node."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lib.errors import JobError, UserError
from lib.recognition.spec import ModelSpec
from lib.training.settings import TrainConfig
from lib.training.shard_places import NAMESPACE
from lib.training.validation_sources import ValidationSources

KEPT_MEETINGS = 8
"""A worker may ask about one after others have come to the next."""


@dataclass(kw_only=True)
class News:
    """The events since the driver last asked."""

    lines: list[str] = field(default_factory=list)
    """Lines for the log: one per epoch, and one for each thing the user must know."""
    num_images: int = 0
    """Images trained on so far, of `total_images`."""
    total_images: int = 0
    status: str = ""
    """What the run is doing now, in a few words."""
    note: str = ""
    """A figure of the training, such as the loss."""
    failure: tuple[str, str] | None = None
    """Kind of error (`user` or `job`) and its message."""


@dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """What every worker gets from the driver."""

    config: TrainConfig
    spec: ModelSpec
    num_shards: int = 0
    """Shards of the feature store; 0 if no policy needs one."""
    use_gpu: bool = False
    faces_run_id: str | None = None
    """Version of the faces table; None for the present one."""
    sources: ValidationSources | None = None
    """Validation data; None for the people of the table's split val."""


class Control:
    """A plain object, which Ray wraps as an actor."""

    def __init__(self) -> None:
        self._news = News()
        self._stop = False
        self._result: dict[str, Any] | None = None
        self._arrived: dict[str, int] = {}

    def arrive(self, meeting: str) -> int:
        """Count a worker that has come to a meeting; return how many there are."""
        self._arrived[meeting] = self._arrived.get(meeting, 0) + 1
        for past in list(self._arrived)[:-KEPT_MEETINGS]:
            del self._arrived[past]
        return self._arrived[meeting]

    def num_arrived(self, meeting: str) -> int:
        """Return how many workers have come to a meeting."""
        return self._arrived.get(meeting, 0)

    def tell(self, *, line: str = "", status: str = "") -> None:
        """Set a line for the log, or the present status."""
        if line:
            self._news.lines.append(line)
        self._news.status = status or self._news.status

    def count(self, num_images: int, total_images: int, note: str = "") -> None:
        """Set the progress of the training, and its present figure."""
        self._news.num_images, self._news.total_images, self._news.note = num_images, total_images, note

    def fail(self, kind: Literal["user", "job"], message: str) -> None:
        """Set the reason why the run cannot continue; the first one is kept."""
        self._news.failure = self._news.failure or (kind, message)

    def has_failed(self) -> bool:
        """Return whether a worker has failed for good; a restarted worker must not try again."""
        return self._news.failure is not None

    def news(self) -> News:
        """Return the news since the last call."""
        news = self._news
        self._news = replace(news, lines=[])
        return news

    def request_stop(self) -> None:
        """Ask the workers to save everything and stop."""
        self._stop = True

    def stop_requested(self) -> bool:
        """Return whether the workers are asked to stop."""
        return self._stop

    def finish(self, result: dict[str, Any]) -> None:
        """Set the result of the run."""
        self._result = result

    def result(self) -> dict[str, Any] | None:
        """Return the result of the run; None if it has not ended."""
        return self._result


def create_control(run: str) -> Any:
    """Start the control of a run on this node; it ends with this process.

    Raises:
        UserError: a run of this name is training on this cluster already.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, scheduling_strategy=here)(Control)
    try:
        return actor.options(name=_name(run), namespace=NAMESPACE).remote()
    except ray.exceptions.ActorAlreadyExistsError:
        raise UserError(
            f"the run {run} is training on this cluster already: wait for it, or choose another --name"
        ) from None


def connect_control(run: str) -> Any:
    """Return the control of a run."""
    return ray.get_actor(_name(run), namespace=NAMESPACE)


class StopRequests:
    """Tells a worker whether it is asked to stop."""

    def __init__(self, control: Any) -> None:
        self._control = control
        self._answer: Any = None

    def is_asked(self) -> bool:
        """Ask the control, and wait for its answer."""
        return bool(ray.get(self._control.stop_requested.remote()))

    def was_asked(self) -> bool:
        """Return the control's last answer and ask again, without waiting."""
        if self._answer is None:
            self._answer = self._control.stop_requested.remote()
        ready, _ = ray.wait([self._answer], timeout=0)
        if not ready:
            return False
        self._answer = None
        return bool(ray.get(ready[0]))


def failure_error(failure: tuple[str, str]) -> UserError | JobError:
    """Return the failure of a worker as an error."""
    kind, message = failure
    return UserError(message) if kind == "user" else JobError(message)


def _name(run: str) -> str:
    return f"control of {run}"
