"""What watches a training from outside: MLflow and Weights & Biases get the settings and the figures of each epoch.

The driver's process tells them, on a thread of its own, what the history holds. A service that fails or cannot be
reached costs the training nothing but one line. What it has missed it gets after a later epoch.

To add a service, write a class on `Tracker` and name it in `TRACKERS`.
"""

import importlib.util
import logging
import math
import os
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

from lib import storage
from lib.config import absolute_url
from lib.errors import UserError
from lib.training.history import ORIGINAL_COLUMNS, read_rows

logger = logging.getLogger(__name__)

NOTES_NAME = "tracking.json"
"""File of a run that says under which id each service knows it, and which epochs that has."""

PROJECT = "conv-facenet"
LOOK_EVERY_S = 5.0
LAST_LIMIT_S = 60.0
"""How long the end of a training waits for the services."""
LONGEST_VALUE = 500
"""Characters of a setting: MLflow takes no more in older versions."""

Ending = Literal["finished", "stopped", "failed"]
Figures = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class About:
    """What a service is told of a run when it first hears of it."""

    name: str
    run_url: str
    settings: Mapping[str, str]


class Tracker(ABC):
    """One service. Methods may raise anything, and may wait for the network."""

    package: ClassVar[str]
    """What is imported, and what pip installs."""
    requirement: ClassVar[str]

    def __init__(self, place: str) -> None:
        """Take what follows the colon in `--track`; it may be empty.

        Raises:
            UserError: it says too little.
        """
        self.place = place

    @abstractmethod
    def open(self, run_id: str | None, about: About) -> str:
        """Go on with the run of this id, or begin one; return its id."""

    @abstractmethod
    def log(self, epoch: int, figures: Figures) -> None:
        """Tell the figures of an epoch."""

    @abstractmethod
    def summarize(self, figures: Figures) -> None:
        """Tell figures of the whole run."""

    @abstractmethod
    def close(self, ending: Ending) -> None:
        """Tell how the run ended."""


class MlflowTracker(Tracker):
    """MLflow: a server, or a folder with what `mlflow ui` shows."""

    package, requirement = "mlflow", "mlflow-skinny"

    def __init__(self, place: str) -> None:
        super().__init__(place)
        place = place or os.environ.get("MLFLOW_TRACKING_URI", "")
        if not place:
            raise UserError(
                "--track mlflow: name the server or a folder, as in mlflow:http://host:5000, mlflow:/folder"
            )
        path = place.removeprefix("file://").removeprefix("file:")
        self._uri = place
        if path != place or ("://" not in place and not place.startswith("databricks")):
            self._uri = Path(absolute_url(path, "--track")).as_uri()

    def open(self, run_id: str | None, about: About) -> str:
        """Find or make the experiment, then the run."""
        # A folder is what the user asked for; a server that is away must not hold the thread for minutes.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(tracking_uri=self._uri)
        if run_id is not None:
            self._client.update_run(run_id, status="RUNNING")
            self._run_id = run_id
            return run_id
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        run = self._client.create_run(experiment, run_name=about.name, tags={"run": about.run_url})
        self._run_id = run.info.run_id
        self._client.log_batch(self._run_id, params=[Param(key, value) for key, value in about.settings.items()])
        return self._run_id

    def log(self, epoch: int, figures: Figures) -> None:
        """Tell them as metrics whose step is the epoch."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, epoch) for name, value in figures.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def summarize(self, figures: Figures) -> None:
        """Tell them as metrics of step 0."""
        self.log(0, figures)

    def close(self, ending: Ending) -> None:
        """Set the status of the run."""
        status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[ending]
        self._client.set_terminated(self._run_id, status=status)


class WandbTracker(Tracker):
    """Weights & Biases; WANDB_MODE=offline writes a folder for `wandb sync`."""

    package = requirement = "wandb"

    def open(self, run_id: str | None, about: About) -> str:
        """Begin or resume; nothing is told of the machine, of the command line, or of what is printed."""
        import wandb

        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            init_timeout=30,
            finish_timeout=30,
            finish_timeout_raises=False,
            x_graphql_retry_max=3,
            x_file_stream_retry_max=3,
            x_file_transfer_retry_max=3,
        )
        self._run = wandb.init(
            project=self.place or os.environ.get("WANDB_PROJECT", PROJECT),
            name=about.name,
            id=run_id,
            resume="allow",
            config={**about.settings, "run": about.run_url},
            dir=_local_folder(about.run_url),
            settings=settings,
            reinit="create_new",
        )
        return str(self._run.id)

    def log(self, epoch: int, figures: Figures) -> None:
        """Tell them at the step of this number."""
        self._run.log({"epoch": epoch, **figures}, step=epoch)

    def summarize(self, figures: Figures) -> None:
        """Put them into the summary."""
        self._run.summary.update(dict(figures))

    def close(self, ending: Ending) -> None:
        """Send what is left."""
        self._run.finish(exit_code=int(ending == "failed"))


TRACKERS: Mapping[str, type[Tracker]] = {"mlflow": MlflowTracker, "wandb": WandbTracker}


def _local_folder(run_url: str) -> str:
    """Return where a service may keep files: WANDB_DIR, else the run's folder if that is on a disk."""
    if folder := os.environ.get("WANDB_DIR"):
        return folder
    return tempfile.gettempdir() if "://" in run_url else run_url


def trackers(words: Sequence[str]) -> dict[str, Tracker]:
    """Return the services that `--track` names, by its words.

    Raises:
        UserError: a service that is not known, or whose package is not installed.
    """
    found = {}
    for word in words:
        kind, _, place = word.partition(":")
        if kind not in TRACKERS:
            raise UserError(f"--track is {storage.redacted(word)!r}: mlflow:URI, wandb, or wandb:PROJECT")
        if sys.modules.get(TRACKERS[kind].package, True) is None:
            del sys.modules[TRACKERS[kind].package]  # see lib/__init__.py
        if importlib.util.find_spec(TRACKERS[kind].package) is None:
            requirement = TRACKERS[kind].requirement
            raise UserError(
                f"--track {kind} needs the package {requirement}: pip install -c constraints.txt {requirement}"
            )
        found[word] = TRACKERS[kind](place)
    return found


class _Watch:
    """A service, and how much it knows of the run."""

    def __init__(self, word: str, tracker: Tracker, notes: Mapping[str, Any]) -> None:
        self.word = storage.redacted(word)
        self.tracker = tracker
        note = notes.get(self.word, {})
        self.run_id: str | None = note.get("id")
        self.epoch = int(note.get("epoch", 0))
        self.num_tried = -1
        """Rows of the history when it was last tried to tell them."""
        self.is_open = self.has_warned = False

    def tell(self, rows: Sequence[Mapping[str, Any]], about: About) -> None:
        """Tell the epochs that the service does not know."""
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
        """Tell the end of the run."""
        if self.is_open:
            self.tracker.summarize(summary)
            self.tracker.close(ending)


class Tracking:
    """Tells the services what happens in a run, until `end`; with no services it does nothing."""

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
        """Tell the end, and wait a minute at most."""
        self._ended.set()
        if self._watches:
            self._thread.join(LAST_LIMIT_S)
            if self._thread.is_alive():
                logger.warning("--track: the services have not answered for %d s, and are left alone", LAST_LIMIT_S)

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
        """Tell all services what they do not know; one that failed is tried again after the next epoch."""
        try:
            rows = read_rows(self._about.run_url)
        except Exception as error:  # noqa: BLE001 - a storage that is away: the next look may do
            logger.debug("no history to track: %s", error)
            return
        late = [watch for watch in self._watches if is_last or len(rows) > watch.num_tried]
        if late:
            self._each(lambda watch: watch.tell(rows, self._about), late)
            self._each(lambda _: self._note(), late)

    def _each(self, do: Callable[[_Watch], None], watches: Sequence[_Watch] | None = None) -> None:
        """Do it for each service; one that fails is told of once."""
        for watch in self._watches if watches is None else watches:
            try:
                do(watch)
            except Exception as error:  # noqa: BLE001 - whatever a service does, the training goes on
                if not watch.has_warned:
                    said = storage.redacted(" ".join(str(error).split()))[:300]
                    logger.warning("--track %s fails (%s): training goes on, and tries again", watch.word, said)
                watch.has_warned = True

    def _note(self) -> None:
        notes = {watch.word: {"id": watch.run_id, "epoch": watch.epoch} for watch in self._watches if watch.run_id}
        if notes:
            storage.write_json(self._url, notes)


def add_evaluation(words: Sequence[str], about: About, figures: Mapping[str, Any]) -> None:
    """Tell the services the figures of an evaluation of the run's model."""
    with Tracking(words, about) as tracking:
        tracking.end("finished", {f"test_{name}": value for name, value in figures.items()})


def numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers among the figures."""
    return {
        name: float(value) for name, value in figures.items() if isinstance(value, int | float) and math.isfinite(value)
    }


def about_run(name: str, run_url: str, settings: Mapping[str, Any]) -> About:
    """Return what services are told of a run; settings hold no secrets."""
    texts = {key: str(value)[:LONGEST_VALUE] for key, value in settings.items()}
    return About(name=name, run_url=storage.redacted(run_url), settings=texts)
