"""One trial of a sweep: a run like those of jobs/train.py, with one worker, in a process of Ray Tune.

The run's folder holds all that is needed to continue: checkpoints, history, and the outcome of a trial that was stopped
or failed. Tune's state lives only as long as the job.
"""

import gc
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
import torch
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from lib import storage
from lib.device import free_memory, worker_device
from lib.errors import JobError, JobStopped, UserError
from lib.terminal import send_log_to_driver
from lib.training.control import WorkerJob, connect_control, create_control, failure_error
from lib.training.early_end import OUTCOME_NAME, write_outcome
from lib.training.history import read_rows
from lib.training.record import figure_of
from lib.training.settings import TrainConfig
from lib.training.train_job import create_store, train
from lib.training.watching import LEAVE_LIMIT_S, WATCH_EVERY_S
from lib.training.worker_process import work
from lib.tuning.settings import Trial

logger = logging.getLogger(__name__)

TAKE_OVER_LIMIT_S = 60.0
"""Seconds until the actors of a dead process must be gone, so that the next process can use their names."""


def run_trial(trial: Trial, sweep_url: str, num_cpus: int, *, use_gpu: bool) -> None:
    """Train until the end, or until Tune or the user stops it. A failure is recorded and ends only this trial.

    Only when the process dies does Tune start another one.
    """
    send_log_to_driver(logging.WARNING)
    sweep = connect_control(sweep_url)
    if ray.get(sweep.stop_requested.remote()):
        return
    # Tune waits for this function, then gives the process, with all its modules loaded, to the next trial.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(int(LEAVE_LIMIT_S))
    os.environ["OMP_NUM_THREADS"] = str(num_cpus)
    torch.set_num_threads(num_cpus)
    run_url = trial.config.run_url
    storage.remove(storage.join(run_url, OUTCOME_NAME))
    reason = ""
    try:
        train(trial.config, lambda *run: _run_here(trial, sweep, *run, use_gpu=use_gpu))
    except JobStopped:
        return  # everything is saved
    except (UserError, JobError) as error:
        reason = str(error)
    except Exception as error:
        logger.warning("trial %s failed", trial.name, exc_info=True)
        reason = f"{type(error).__name__}: {error}"
    finally:
        gc.collect()
        free_memory()
    if reason:
        write_outcome(run_url, "failed", reason)
        ray.get(sweep.tell.remote(line=f"{trial.name} failed: {reason}"))


def _run_here(
    trial: Trial,
    sweep: Any,
    job: WorkerJob,
    labels_N: np.ndarray,
    *,
    use_gpu: bool,
) -> dict[str, Any] | None:
    """Run the worker on a thread of this process, and report each epoch to Tune."""
    config = job.config
    control = _own_control(config.run_url)
    store = create_store(config, labels_N)  # one worker, so one shard is enough
    job = replace(job, num_shards=store.num_shards if store else 0, use_gpu=use_gpu)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work(job, worker_device(use_gpu=use_gpu))
        except BaseException as error:  # noqa: BLE001 - raised again below, on the thread that Tune watches
            errors.append(error)

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    try:
        num_given = _give_tune(config, 0)  # epochs of an earlier start
        while True:
            worker.join(WATCH_EVERY_S)
            is_alive = worker.is_alive()
            lines = ray.get(control.news.remote()).lines
            for line in lines:
                sweep.tell.remote(line=f"{trial.name}: {line}")
            if lines:  # one line per epoch
                num_given = _give_tune(config, num_given)
            if not is_alive:
                break
            if ray.get(sweep.stop_requested.remote()):
                control.request_stop.remote()
    finally:
        if worker.is_alive():
            ray.get(control.request_stop.remote())
            worker.join(LEAVE_LIMIT_S)
    if errors:
        raise errors[0]
    if failure := ray.get(control.news.remote()).failure:
        raise failure_error(failure)
    return ray.get(control.result.remote())


def _own_control(run_url: str) -> Any:
    deadline = time.monotonic() + TAKE_OVER_LIMIT_S
    while True:
        try:
            return create_control(run_url)
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(WATCH_EVERY_S)


def _give_tune(config: TrainConfig, num_given: int) -> int:
    """Report the new epochs of the history to Tune; return how many it knows now.

    If ASHA stops the trial, this ends the thread (SystemExit).
    """
    rows = read_rows(config.run_url)
    for row in rows[num_given:]:
        value = figure_of(row, config.validation.best_by)
        tune.report({"epoch": row["epoch"], **({} if value is None else {"value": value})})
    return max(num_given, len(rows))


class TrialQueue(Searcher):
    """Hands the trials to Tune one after the other, until none is left or the user wants an end."""

    def __init__(self, names: Sequence[str], sweep: Any) -> None:
        super().__init__()
        self._names = list(names)
        self._sweep = sweep

    def suggest(self, _: str) -> dict[str, str] | str:
        """Return the next trial."""
        if not self._names or ray.get(self._sweep.stop_requested.remote()):
            return str(Searcher.FINISHED)
        return {"trial": self._names.pop(0)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Ignore the result: all trials were chosen before."""

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the run folders are the state."""
        with open(checkpoint_path, "wb"):  # noqa: PTH123 - Tune wants a file
            pass

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""


class Halving(ASHAScheduler):
    """Asynchronous successive halving (Li et al. 2020, A System for Massively Parallel Hyperparameter Tuning).

    It also knows the results of earlier starts of the sweep, and records why it stops a trial.
    """

    def __init__(
        self, trials: Mapping[str, Trial], sweep: Any, *, num_epochs: int, min_epochs: int, keep_one_in: int
    ) -> None:
        super().__init__(
            time_attr="epoch",
            metric="value",
            mode="max",
            max_t=num_epochs,
            grace_period=min_epochs,
            reduction_factor=keep_one_in,
            stop_last_trials=False,
        )
        self._trials = trials
        self._sweep = sweep
        self._num_epochs = num_epochs
        self._keep_one_in = keep_one_in

    def learn(self, name: str, rows: Sequence[Mapping[str, Any]], best_by: str) -> None:
        """Add the epochs of a trial that does not run again to those that others are compared with."""
        earlier = SimpleNamespace(trial_id=name)
        self.on_trial_add(None, earlier)
        for row in rows:
            if (value := figure_of(row, best_by)) is not None:
                super().on_trial_result(None, earlier, {"epoch": row["epoch"], "value": value})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return whether the trial continues."""
        if result.get("epoch", self._num_epochs) >= self._num_epochs:
            return str(self.CONTINUE)
        decision: str = super().on_trial_result(tune_controller, trial, result)
        if decision == self.STOP:
            name = trial.config["trial"]
            config = self._trials[name].config
            figure = f"{config.validation.best_by} {abs(result['value']):.4f} after epoch {result['epoch']}"
            reason = f"{figure} was not in the best 1/{self._keep_one_in} of what trials had there so far"
            write_outcome(config.run_url, "stopped", reason)
            self._sweep.tell.remote(line=f"{name} stopped early: {reason}")
            with suppress(ValueError):  # the worker may have just ended
                connect_control(config.run_url).request_stop.remote()
        return decision


class SweepProgress(TrialProgressCallback):
    """Counts the epochs of all trials, and records trials that Tune gave up; Tune's own reporter would print."""

    def __init__(self, trials: Mapping[str, Trial], sweep: Any, num_epochs: int) -> None:
        super().__init__()
        self._trials = trials
        self._sweep = sweep
        self._done = dict.fromkeys(trials, 0)
        self._to_do = dict.fromkeys(trials, num_epochs)

    def end(self, name: str, num_epochs: int) -> None:
        """Count a trial that ended after this many epochs."""
        self._done[name] = self._to_do[name] = num_epochs
        self._sweep.count.remote(sum(self._done.values()), sum(self._to_do.values()))

    def on_trial_result(self, *, trial: Any, result: dict[str, Any], **_: Any) -> None:
        """Count an epoch."""
        name = trial.config["trial"]
        self._done[name] = max(self._done[name], int(result.get("epoch", 0)))
        self._sweep.count.remote(sum(self._done.values()), sum(self._to_do.values()))

    def on_trial_recover(self, *, trial: Any, **_: Any) -> None:
        """Log the death of a process."""
        self._sweep.tell.remote(line=f"{trial.config['trial']}: its process died; another one goes on")

    def on_trial_complete(self, *, trial: Any, **_: Any) -> None:
        """Skip the epochs that a trial did not get."""
        self.end(trial.config["trial"], self._done[trial.config["trial"]])

    def on_trial_error(self, *, trial: Any, **_: Any) -> None:
        """Record that a trial's process died too often."""
        name = trial.config["trial"]
        reason = f"its process died {trial.num_failures} times, perhaps for want of memory"
        write_outcome(self._trials[name].config.run_url, "failed", reason)
        self._sweep.tell.remote(line=f"{name} failed: {reason}")
        self.end(name, self._done[name])
