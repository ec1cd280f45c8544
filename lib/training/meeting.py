"""A meeting of the workers after work that may take some nodes much longer than others, such as copies of crops.

A collective gives up when a worker is half an hour late. This wait has no limit: a worker that dies ends it, because
Ray Train ends all of them.
"""

import time
import uuid
from types import TracebackType
from typing import Any, Self

import ray

from lib.training import collective

LOOK_EVERY_S = 1.0


class Meeting:
    """One wait of all workers, at the end of a `with` block. They enter it at about the same time."""

    def __init__(self, control: Any) -> None:
        """Agree on a name for it. Every worker calls this."""
        self._control = control
        self._name = collective.broadcast(uuid.uuid4().hex if collective.rank() == 0 else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()

    def wait(self) -> None:
        """Return when all workers have come here.

        Raises:
            RuntimeError: another worker cannot go on, as collectives raise it then.
        """
        num_workers = collective.num_workers()
        if num_workers == 1:
            return
        num_arrived = ray.get(self._control.arrive.remote(self._name))
        while num_arrived < num_workers:
            if ray.get(self._control.has_failed.remote()):
                raise RuntimeError("another worker cannot go on")
            time.sleep(LOOK_EVERY_S)
            num_arrived = ray.get(self._control.num_arrived.remote(self._name))
