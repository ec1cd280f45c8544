"""The services of `--track`, MLflow and Weights & Biases: each gets the settings and figures of a run.

To add a service, write a class on `Tracker` and name it in `TRACKERS`.
"""

import importlib.util
import os
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from lib import storage
from lib.config import absolute_url
from lib.errors import UserError

PROJECT = "conv-facenet"

Ending = Literal["finished", "stopped", "failed"]
Figures = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class About:
    """What a service gets at the start of a run."""

    name: str
    run_url: str
    settings: Mapping[str, str]


class Tracker(ABC):
    """One service. Methods may raise anything, and may wait for the network."""

    package: ClassVar[str]
    """Name of the package to import."""
    requirement: ClassVar[str]
    """What pip installs."""

    def __init__(self, place: str) -> None:
        """Use the place that follows the colon in `--track`; it may be empty.

        Raises:
            UserError: this service needs a place.
        """
        self.place = place

    @abstractmethod
    def open(self, run_id: str | None, about: About) -> str:
        """Continue the run with this id, or create one; return its id."""

    @abstractmethod
    def log(self, epoch: int, figures: Figures) -> None:
        """Send the figures of an epoch."""

    @abstractmethod
    def summarize(self, figures: Figures) -> None:
        """Send figures of the whole run."""

    @abstractmethod
    def close(self, ending: Ending) -> None:
        """Send how the run ended."""


class MlflowTracker(Tracker):
    """MLflow: a server, or a folder that `mlflow ui` shows."""

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
        """Find or create the experiment, then the run."""
        # MLflow refuses folders by default, but the user named one. An absent server must not block for minutes.
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
        """Send metrics whose step is the epoch."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, epoch) for name, value in figures.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def summarize(self, figures: Figures) -> None:
        """Send metrics of step 0."""
        self.log(0, figures)

    def close(self, ending: Ending) -> None:
        """Set the status of the run."""
        status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[ending]
        self._client.set_terminated(self._run_id, status=status)


class WandbTracker(Tracker):
    """Weights & Biases; WANDB_MODE=offline writes a folder for `wandb sync`."""

    package = requirement = "wandb"

    def open(self, run_id: str | None, about: About) -> str:
        """Begin or resume the run. Nothing is sent about the machine, the command line, or the output."""
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
        """Send them for the step with this number."""
        self._run.log({"epoch": epoch, **figures}, step=epoch)

    def summarize(self, figures: Figures) -> None:
        """Put them into the summary."""
        self._run.summary.update(dict(figures))

    def close(self, ending: Ending) -> None:
        """Send what is left."""
        self._run.finish(exit_code=int(ending == "failed"))


TRACKERS: Mapping[str, type[Tracker]] = {"mlflow": MlflowTracker, "wandb": WandbTracker}


def _local_folder(run_url: str) -> str:
    """Return the folder for a service's files: WANDB_DIR, else the run's folder if it is on a disk."""
    if folder := os.environ.get("WANDB_DIR"):
        return folder
    return tempfile.gettempdir() if "://" in run_url else run_url


def trackers(words: Sequence[str]) -> dict[str, Tracker]:
    """Return the services of `--track`, by its words.

    Raises:
        UserError: a service is unknown, or its package is not installed.
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
