"""When a worker writes a checkpoint: after each epoch, every `--checkpoint-minutes`, and before it leaves."""

import dataclasses
import time
from typing import Any

import pyarrow as pa

from lib.errors import JobStopped
from lib.training import collective
from lib.training.checkpoints import Progress
from lib.training.control import StopRequests
from lib.training.objective import EpochSums
from lib.training.settings import TrainConfig
from lib.training.state import TrainingState
from lib.training.step import TrainingStep
from lib.training.suspects import SuspectLog

AGREE_EVERY = 4
"""Several workers agree on saving and leaving once in so many steps."""

GO_ON, SAVE, LEAVE = "go on", "save", "leave"


class Saving:
    """Writes the checkpoints of a worker. All workers of a run call each method at the same step."""

    def __init__(self, config: TrainConfig, control: Any) -> None:
        """Ask `control`, the actor of `lib.training.control`, whether the run should stop."""
        self._run_url = config.run_url
        self._checkpoint_s = 60 * config.run.checkpoint_minutes
        self._requests = StopRequests(control)
        self._last_saved = time.monotonic()

    def after_epoch(
        self, state: TrainingState, progress: Progress | None, suspects: SuspectLog, photos: pa.ChunkedArray
    ) -> None:
        """Save, and take worker 0's `progress` on all workers; the others pass None.

        At the end of the run, the use of the photos, by their names, is written before that.

        Raises:
            JobStopped: a signal asked the run to stop, and epochs are left.
        """
        state.progress, is_leaving = collective.broadcast(
            None if progress is None else (progress, self._requests.is_asked())
        )
        if state.progress.finished:
            state.usage.settle()
            state.usage.write(self._run_url, photos)
        self._save(state, state.progress, suspects)
        if is_leaving and not state.progress.finished:
            raise JobStopped

    def within_epoch(self, state: TrainingState, step: TrainingStep, sums: EpochSums, done: int, number: int) -> None:
        """Save after step `number` of an epoch if it is time or if the run should stop; `done` anchors are done.

        Raises:
            JobStopped: a signal asked the run to stop.
        """
        if collective.num_workers() > 1 and number % AGREE_EVERY:
            return
        request = collective.broadcast(self._request() if collective.rank() == 0 else None)
        if request == GO_ON:
            return
        step.settle()
        progress = dataclasses.replace(state.progress, anchors_done=done, sums=sums.over_all_workers())
        self._save(state, progress, all_suspects(state))
        if request == LEAVE:
            raise JobStopped

    def _request(self) -> str:
        if self._requests.was_asked():
            return LEAVE
        return SAVE if time.monotonic() - self._last_saved > self._checkpoint_s else GO_ON

    def _save(self, state: TrainingState, progress: Progress, suspects: SuspectLog) -> None:
        state.save(self._run_url, progress, suspects)
        self._last_saved = time.monotonic()


def all_suspects(state: TrainingState) -> SuspectLog:
    """Return the suspects that all workers have found, on worker 0."""
    return SuspectLog.merged(collective.gathered(state.suspects.copied()))
