"""Tracking: MLflow and Weights & Biases get the settings of a run and the figures of each epoch.

A thread of the driver sends them what the history contains. If a service fails or cannot be reached, the training
continues with one warning. The service gets what it has missed after a later epoch.
"""

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from lib import storage
from lib.training.history import ORIGINAL_COLUMNS, read_rows
from lib.training.tracking_services import About, Ending, Figures, Tracker, trackers

logger = logging.getLogger(__name__)

NOTES_NAME = "tracking.json"
"""File of a run with its id at each service, and the last epoch that the service has."""

LOOK_EVERY_S = 5.0
LAST_LIMIT_S = 60.0
"""How long a training waits for the services at its end."""
LONGEST_VALUE = 500
"""Characters of a setting: MLflow takes no more in older versions."""


class _Watch:
    """A service, and how much of the run it has."""

    def __init__(self, word: str, tracker: Tracker, notes: Mapping[str, Any]) -> None:
        self.word = storage.redacted(word)
        self.tracker = tracker
        note = notes.get(self.word, {})
        self.run_id: str | None = note.get("id")
        self.epoch = int(note.get("epoch", 0))
        self.num_tried = -1
        """Rows of the history at the last attempt to send them."""
        self.is_open = self.has_warned = False

    def tell(self, rows: Sequence[Mapping[str, Any]], about: About) -> None:
        """Send the epochs that the service does not have."""
        self.num_tried = len(rows)
        if not self.is_open:
            self.run_id = self.tracker.open(self.run_id, about)
            self.is_open = True
        for row in rows:
            if (epoch := int(row["epoch"] or 0)) > self.epoch:
                figures = {name: value for name, value in row.items() if name not in (*ORIGINAL_COLUMNS, "epoch")}
                self.tracker.log(epoch, numbers(figures))
                self.epoch = epoch

    def close(self, ending: Ending, summary: Figures) -> None:
        """Send the end of the run."""
        if self.is_open:
            self.tracker.summarize(summary)
            self.tracker.close(ending)


class Tracking:
    """Sends what happens in a run to the services, until `end`. Without services it does nothing."""

    def __init__(self, words: Sequence[str], about: About) -> None:
        """Check the words.

        Raises:
            UserError: as `trackers`.
        """
        self._about = about
        chosen = trackers(words)
        self._url = storage.join(about.run_url, NOTES_NAME)
        notes = storage.read_json(self._url) if chosen and storage.exists(self._url) else {}
        self._watches = [_Watch(word, tracker, notes) for word, tracker in chosen.items()]
        self._ended = threading.Event()
        self._ending: Ending = "failed"
        self._summary: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)

    def __enter__(self) -> Self:
        """Start the thread."""
        if self._watches:
            self._thread.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send the end, and wait a minute at most."""
        self._ended.set()
        if self._watches:
            self._thread.join(LAST_LIMIT_S)
            if self._thread.is_alive():
                logger.warning("--track: the services have not answered for %d s: not waiting any longer", LAST_LIMIT_S)

    def end(self, ending: Ending, summary: Mapping[str, Any] | None = None) -> None:
        """Set how the run ended, and figures of the whole run."""
        self._ending, self._summary = ending, numbers(summary or {})

    def _run(self) -> None:
        self._tell()
        while not self._ended.wait(LOOK_EVERY_S):
            self._tell()
        self._tell(is_last=True)
        self._each(lambda watch: watch.close(self._ending, self._summary))

    def _tell(self, *, is_last: bool = False) -> None:
        """Send all services what they do not have. One that failed is tried again after the next epoch."""
        try:
            rows = read_rows(self._about.run_url)
        except Exception as error:  # noqa: BLE001 - the storage may be back at the next look
            logger.debug("no history to track: %s", error)
            return
        late = [watch for watch in self._watches if is_last or len(rows) > watch.num_tried]
        if late:
            self._each(lambda watch: watch.tell(rows, self._about), late)
            self._each(lambda _: self._note(), late)

    def _each(self, do: Callable[[_Watch], None], watches: Sequence[_Watch] | None = None) -> None:
        """Do it for each service; warn once of one that fails."""
        for watch in self._watches if watches is None else watches:
            try:
                do(watch)
            except Exception as error:  # noqa: BLE001 - whatever a service does, the training continues
                if not watch.has_warned:
                    said = storage.redacted(" ".join(str(error).split()))[:300]
                    logger.warning("--track %s fails (%s): training continues, and tries again later", watch.word, said)
                watch.has_warned = True

    def _note(self) -> None:
        notes = {watch.word: {"id": watch.run_id, "epoch": watch.epoch} for watch in self._watches if watch.run_id}
        if notes:
            storage.write_json(self._url, notes)


def add_evaluation(words: Sequence[str], about: About, figures: Mapping[str, Any]) -> None:
    """Send the services the figures of an evaluation of the run's model."""
    with Tracking(words, about) as tracking:
        tracking.end("finished", {f"test_{name}": value for name, value in figures.items()})


def numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers among the figures."""
    return {
        name: float(value) for name, value in figures.items() if isinstance(value, int | float) and math.isfinite(value)
    }


def about_run(name: str, run_url: str, settings: Mapping[str, Any]) -> About:
    """Return what services get about a run. The settings must not contain secrets."""
    texts = {key: str(value)[:LONGEST_VALUE] for key, value in settings.items()}
    return About(name=name, run_url=storage.redacted(run_url), settings=texts)
