"""Shows progress: one line that is updated in place on a terminal, a line a minute in the log elsewhere."""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from lib.terminal import terminal

logger = logging.getLogger(__name__)

SHOW_EVERY_S = 0.2
LOG_EVERY_S = 60.0
RATE_OVER_S = 20.0
"""The rate is that of this last period."""
BEAT_EVERY_S = 5.0
"""The line goes on telling the time while nothing is finished."""
STALLED_S = 120.0
"""After so long without a finished unit, a line says so, and what Ray and other libraries said last."""


class ProgressLine:
    """Counts finished units, and shows them with the rate and the time left."""

    def __init__(self, label: str, *, unit: str, total: int = 0, done: int = 0) -> None:
        """Begin with `done` units of a `total`, which may become known later."""
        self._terminal = terminal()
        self._label, self._unit, self._total, self._note = label, unit, total, ""
        self._first: tuple[float, int] | None = None
        self._past: deque[tuple[float, int]] = deque()
        self._done = done
        self._began = self._logged = self._changed = time.monotonic()
        self._shown = 0.0
        self._warn_after = STALLED_S
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        """Show the line."""
        self._tell()
        threading.Thread(target=self._beat, daemon=True, name="progress").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the line."""
        self._ended.set()
        self._terminal.show("")

    def add(self, count: int) -> None:
        """Count `count` more units."""
        self.update(self._done + count)

    def update(self, done: int, *, total: int = 0, label: str = "", note: str = "") -> None:
        """Set the number of finished units, and what else the line shows."""
        now = time.monotonic()
        if done != self._done or label not in ("", self._label) or note not in ("", self._note):
            self._changed, self._warn_after = now, STALLED_S
        self._total, self._label = total or self._total, label or self._label
        self._note = note or self._note
        if self._total and done and (done != self._done or not self._past):
            self._past.append((now, done))
            self._first = self._first or (now, done)  # earlier work is not part of this job's rate
        while len(self._past) > 2 and now - self._past[0][0] > RATE_OVER_S:
            self._past.popleft()
        self._done = done
        if now - self._shown >= SHOW_EVERY_S:
            self._tell()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_EVERY_S):
            idle_s = time.monotonic() - self._changed
            if idle_s >= self._warn_after:
                self._warn_after *= 2
                logger.warning("no %s was finished for %s", self._unit, _short_time(idle_s))
                self._terminal.tell_others()
            self._tell()

    def _tell(self) -> None:
        now = self._shown = time.monotonic()
        if self._terminal.is_a_tty:
            self._terminal.show(str(self))
        elif now - self._logged >= LOG_EVERY_S:
            self._logged = now
            logger.info("%s", self)

    def __str__(self) -> str:
        """Return the line."""
        parts = [self._label]
        if self._total:
            parts[0] += f": {self._done}/{self._total} {self._unit}s ({100 * self._done / self._total:.0f} %)"
        elif self._shown:
            parts.append(_short_time(self._shown - self._began))
        rate = _rate(self._past[0], self._past[-1]) if self._past else 0.0
        if rate:
            parts.append(f"{rate:.0f} {self._unit}s/s" if rate >= 1 else f"{1 / rate:.1f} s a {self._unit}")
        if self._note:
            parts.append(self._note)
        mean = _rate(self._first, self._past[-1]) if self._first else 0.0
        if mean and self._total:
            parts.append(f"{_short_time((self._total - self._done) / mean)} left")
        return ", ".join(parts)


def progress_over(steps: range, label: str, *, unit: str) -> Iterator[int]:
    """Yield the steps and show the progress towards `steps.stop`."""
    with ProgressLine(label, unit=unit, total=steps.stop) as progress:
        for step in steps:
            progress.update(step)
            yield step


def _rate(first: tuple[float, int], last: tuple[float, int]) -> float:
    seconds = last[0] - first[0]
    return (last[1] - first[1]) / seconds if seconds else 0.0


def _short_time(seconds: float) -> str:
    """Return a duration for people: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
