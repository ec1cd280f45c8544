"""What a worker tells the driver: lines for the log, a status, and the progress of the training."""

import time
from typing import Any

from lib.device import Fetched
from lib.training.objective import EpochSums

REPORT_EVERY_S = 0.5
"""Time between two reports of progress."""


class Reports:
    """Sends reports to the driver. Only worker 0 sends them; on the others nothing happens."""

    def __init__(self, control: Any, *, is_first: bool) -> None:
        """Send them to `control`, the actor of `lib.training.control`."""
        self._control = control
        self._is_first = is_first
        self._reported_at = 0.0
        self._loss: Fetched | None = None

    def line(self, text: str) -> None:
        """Send a line for the log."""
        if self._is_first:
            self._control.tell.remote(line=text)

    def status(self, text: str) -> None:
        """Send what the run does now, in a few words."""
        if self._is_first:
            self._control.tell.remote(status=text)

    def begin_epoch(self, epoch: int, epochs: int, num_steps: int) -> None:
        """Begin an epoch of so many steps."""
        self._epoch, self._epochs, self._num_steps = epoch, epochs, num_steps
        self._reported_at, self._loss = 0.0, None

    def step(self, num_done: int, num_images: int, sums: EpochSums) -> None:
        """Send how far the epoch is and its mean loss, unless the last report is very recent.

        A step trains on `num_images` of all workers. The loss is that of the last report, so nobody waits for the GPU.
        """
        if time.perf_counter() - self._reported_at <= REPORT_EVERY_S:
            return
        loss, self._loss = self._loss, Fetched(sums.loss)
        self._reported_at = time.perf_counter()
        if not self._is_first:
            return
        note = f"loss {float(loss.numpy()):.4f}" if loss is not None and loss.is_there else ""
        self.status(f"epoch {self._epoch}/{self._epochs}, step {num_done}/{self._num_steps}")
        done, total = (self._epoch - 1) * self._num_steps + num_done, self._epochs * self._num_steps
        self._control.count.remote(done * num_images, total * num_images, note)
