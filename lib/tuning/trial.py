"""One trial of a sweep: a run as jobs/train.py makes it, by one worker, in a process of Ray Tune.

The run's folder says all that is needed to go on: checkpoints, history, and here its outcome where it came to no end of
its own. What Tune knows lasts as long as the job.
"""

import gc
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
from lib.recognition.model import ModelSpec
from lib.terminal import send_log_to_driver
from lib.training.control import connect_control, create_control, failure_error
from lib.training.history import read_rows
from lib.training.job import LEAVE_LIMIT_S, WATCH_EVERY_S, create_store, train
from lib.training.loop import WorkerJob, work
from lib.training.record import OUTCOME_NAME, figure_of, write_outcome
from lib.training.settings import TrainConfig
from lib.tuning.settings import Trial

logger = logging.getLogger(__name__)

TAKE_OVER_LIMIT_S = 60.0
"""How long the actors of a trial's dead process may take to end before the next process takes their names."""


def run_trial(trial: Trial, sweep_url: str, num_cpus: int, *, use_gpu: bool) -> None:
    """Train until the end, or until Tune or the user stops it; a failure is written down and ends this trial alone.

    Only the death of the process is left to Tune, which then starts another one.
    """
    send_log_to_driver(logging.WARNING)
    sweep = connect_control(sweep_url)
    if ray.get(sweep.stop_requested.remote()):
        return
    # Tune waits so long for this function before it gives the process, which has all modules loaded, to the next trial.
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(int(LEAVE_LIMIT_S))
    os.environ["OMP_NUM_THREADS"] = str(num_cpus)
    torch.set_num_threads(num_cpus)
    run_url = trial.config.run_url
    storage.remove(storage.join(run_url, OUTCOME_NAME))
    reason = ""
    try:
        train(trial.config, lambda config, spec, labels_N: _run_here(trial, sweep, config, spec, labels_N, use_gpu))
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
    trial: Trial, sweep: Any, config: TrainConfig, spec: ModelSpec, labels_N: np.ndarray, use_gpu: bool
) -> dict[str, Any] | None:
    """Do the worker's part on a thread of this process; this one hands on what happens, and gives Tune each epoch."""
    control = _own_control(config.run_url)
    store = create_store(config, labels_N, num_shards=1)  # where the search lies with the trials, one node is enough
    job = WorkerJob(config=config, spec=spec, num_shards=store.num_shards if store else 0, use_gpu=use_gpu)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work(job, worker_device(use_gpu=use_gpu))
        except BaseException as error:  # noqa: BLE001 - raised again below, on the thread that Tune watches
            errors.append(error)

    worker = threading.Thread(target=run, daemon=True)
    worker.start()
    try:
        num_given = _give_tune(config, 0)  # of an earlier start
        while True:
            worker.join(WATCH_EVERY_S)
            is_alive = worker.is_alive()
            lines = ray.get(control.news.remote()).lines
            for line in lines:
                sweep.tell.remote(line=f"{trial.name}: {line}")
            if lines:  # there is one for each epoch
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
    """Give Tune the epochs of the history that it does not know; return how many it knows then.

    Where ASHA stops the trial, this ends the thread (SystemExit).
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
        """Learn nothing from it: all trials were chosen before."""

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: the runs' folders say what is done."""
        with open(checkpoint_path, "wb"):  # noqa: PTH123 - Tune wants a file
            pass

    def restore(self, checkpoint_path: str) -> None:
        """Take nothing back."""


class Halving(ASHAScheduler):
    """Asynchronous successive halving (Li et al. 2020, A System for Massively Parallel Hyperparameter Tuning) that
    knows what earlier starts of the sweep have found, and writes down why it stops a trial.
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
        """Take the epochs of a trial that is not run again as those that others are compared with."""
        earlier = SimpleNamespace(trial_id=name)
        self.on_trial_add(None, earlier)
        for row in rows:
            if (value := figure_of(row, best_by)) is not None:
                super().on_trial_result(None, earlier, {"epoch": row["epoch"], "value": value})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return whether the trial goes on."""
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
            with suppress(ValueError):  # the worker may just have left
                connect_control(config.run_url).request_stop.remote()
        return decision


class SweepProgress(TrialProgressCallback):
    """Counts the epochs of all trials, and writes down which of them Tune has given up; Tune's own would print."""

    def __init__(self, trials: Mapping[str, Trial], sweep: Any, num_epochs: int) -> None:
        super().__init__()
        self._trials = trials
        self._sweep = sweep
        self._done = dict.fromkeys(trials, 0)
        self._to_do = dict.fromkeys(trials, num_epochs)

    def end(self, name: str, num_epochs: int) -> None:
        """Count a trial that has come to its end after so many epochs."""
        self._done[name] = self._to_do[name] = num_epochs
        self._sweep.count.remote(sum(self._done.values()), sum(self._to_do.values()))

    def on_trial_result(self, *, trial: Any, result: dict[str, Any], **_: Any) -> None:
        """Count an epoch."""
        name = trial.config["trial"]
        self._done[name] = max(self._done[name], int(result.get("epoch", 0)))
        self._sweep.count.remote(sum(self._done.values()), sum(self._to_do.values()))

    def on_trial_recover(self, *, trial: Any, **_: Any) -> None:
        """Tell of a process that died."""
        self._sweep.tell.remote(line=f"{trial.config['trial']}: its process died; another one goes on")

    def on_trial_complete(self, *, trial: Any, **_: Any) -> None:
        """Leave out the epochs that a trial does not have."""
        self.end(trial.config["trial"], self._done[trial.config["trial"]])

    def on_trial_error(self, *, trial: Any, **_: Any) -> None:
        """Write down that a trial's process has died too often."""
        name = trial.config["trial"]
        reason = f"its process died {trial.num_failures} times, perhaps for want of memory"
        write_outcome(self._trials[name].config.run_url, "failed", reason)
        self._sweep.tell.remote(line=f"{name} failed: {reason}")
        self.end(name, self._done[name])
