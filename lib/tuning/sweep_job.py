"""The sweep job: trains every combination of settings as a run of its own, side by side under Ray Tune.

A sweep is a folder with its trials in runs/, as below `--data`. The runs are the only state: a resumed sweep trains the
trials that have not ended, and Tune gets the epochs of the others from their histories.
"""

import logging
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.compute as pc

from lib import cluster, storage
from lib.errors import JobError, JobStopped, UserError
from lib.evaluation.pairs import made_pairs
from lib.faces.table import crop_size, read_success
from lib.plans import earlier_plan
from lib.recognition.model import EmbeddingModel, ModelSpec
from lib.recognition.spec import INIT_NAMES
from lib.training.control import create_control
from lib.training.face_names import read_identities
from lib.training.settings import TrainConfig
from lib.training.triplets import PhotoIndex
from lib.training.watching import watch
from lib.training.worker_resources import cpus_each, with_devices
from lib.tuning.compare_job import read_run, write_comparison
from lib.tuning.compared_runs import ComparedRun
from lib.tuning.settings import SWEPT, SweepConfig, Trial, plan_trials
from lib.tuning.trial import Halving, SweepProgress, TrialQueue, run_trial
from lib.tuning.winner import RESULTS_NAME, SWEEP_NAME

logger = logging.getLogger(__name__)

CPUS_EACH = 4
"""CPUs of a trial, by default."""

TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
"""Tune's own loggers are off: runs write their own histories, and the job shows its own progress."""


def sweep(config: SweepConfig) -> dict[str, Any]:
    """Train the trials that have not ended, compare all, and return the winner.

    Raises:
        UserError: wrong flags, faces or folder; JobError: no trial has a result; JobStopped: by a signal.
    """
    started = time.monotonic()
    config = replace(config, train=config.train.with_absolute_paths())
    success = read_success(config.train.faces_url)
    trials = plan_trials(config)
    plan = _plan(config, success)
    _, problem = earlier_plan(config.url, SWEEP_NAME, plan, defaults={**plan, **TrainConfig().flat()})
    if problem:
        raise UserError(f"{config.url} {problem}: choose another --name, or go back to those settings")
    _check_models(trials, crop_size(success))
    counts = _check_faces(config.train)
    names = [trial.name for trial in trials]
    if config.train.dry_run:
        logger.info("%d trials of %d epochs on %d photos", len(trials), config.train.epochs, counts["photos"])
        return {"job": "sweep", "dry_run": True, "sweep": config.url, "trials": names, **counts}
    storage.check_writable(config.url)
    storage.write_json(storage.join(config.url, SWEEP_NAME), {**plan, "runs": names})
    runs = {trial.name: read_run(trial.config.run_url) for trial in trials}
    todo = _todo(trials, runs)
    if len(todo) < len(trials):
        logger.info("%d of %d trials are done", len(trials) - len(todo), len(trials))
    if todo:
        with cluster.connected():
            _run(config, trials, todo, runs)
    result = write_comparison(config.url, config.train.name, [read_run(trial.config.run_url) for trial in trials])
    seconds = time.monotonic() - started
    result = {
        "job": "sweep",
        "sweep": config.url,
        "trials": len(trials),
        **{name: value for name, value in result.items() if name != "runs"},
        "trials_run": len(todo),
        "seconds": round(seconds, 1),
    }
    if result["winner"] is None:
        raise JobError(f"no trial has a result: {result['report']} says why for each")
    storage.write_json(storage.join(config.url, RESULTS_NAME), {**result, "init": config.train.init})
    return result


def _plan(config: SweepConfig, success: dict[str, Any]) -> dict[str, Any]:
    """Return every setting that decides the result; swept ones under the names of their flags."""
    single = {name: value for name, value in config.train.content(success).items() if name not in SWEPT}
    return {
        "job": "sweep",
        **single,
        **{SWEPT[name][0]: values for name, values in config.swept().items()},
        "max_trials": config.max_trials,
        "min_epochs": config.first_stage,
        "keep_one_in": config.keep_one_in,
        "init": config.train.init,
    }


def _check_models(trials: Sequence[Trial], crop_size: int) -> None:
    """Build every backbone once.

    Raises:
        UserError: backbones that cannot be built, all of them named; weights that do not exist.
    """
    config = trials[0].config
    if config.init not in INIT_NAMES and not storage.exists(config.init):
        raise UserError(f"--init {config.init} does not exist: correct the path, or use one of {', '.join(INIT_NAMES)}")
    problems = []
    for backbone in dict.fromkeys(trial.config.backbone for trial in trials):
        try:
            EmbeddingModel(ModelSpec(backbone=backbone, image_size=config.model.image_size or crop_size))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join(problems))


def _check_faces(config: TrainConfig) -> dict[str, int]:
    """Return the numbers of photos and people to train on.

    Raises:
        UserError: too little training data, or too few validation people.
    """
    limit, taken = config.sampling.photos_limit, config.sampling.faces
    identities = read_identities(config.faces_url, ["train"], photos_limit=limit, taken=taken)
    people = identities.unique().sort()
    index = PhotoIndex(pc.index_in(identities, people).to_numpy().astype(np.int32))
    if config.validation.best_by != "loss" and not config.validation.pair_files and not config.validation.val_faces:
        judges = read_identities(config.faces_url, ["val"]).to_pylist()
        try:
            made_pairs(
                [str(n) for n in range(len(judges))],
                judges,
                num_pairs=config.validation.num_pairs,
                seed=config.run.seed,
            )
        except UserError as error:
            raise UserError(
                f"too few validation people in {config.faces_url} to choose the best trial: {error}"
            ) from None
    return {"photos": len(identities), "identities": len(people), "pairable": len(index.pairable)}


def _todo(trials: Sequence[Trial], runs: dict[str, ComparedRun]) -> list[Trial]:
    """Return the trials that have not ended: those that have begun first, those that failed before last."""

    def urgency(trial: Trial) -> tuple[bool, bool]:
        run = runs[trial.name]
        return run.state == "failed", not run.rows

    return sorted((trial for trial in trials if runs[trial.name].state in ("unfinished", "failed")), key=urgency)


def _run(config: SweepConfig, trials: Sequence[Trial], todo: Sequence[Trial], runs: dict[str, ComparedRun]) -> None:
    """Train the trials under Ray Tune.

    Raises:
        UserError: the cluster is too small; JobError: Tune failed for good; JobStopped: by a signal.
    """
    os.environ.update(TUNE_SETTINGS)
    from ray import tune

    config = replace(config, train=with_devices(config.train, min(config.at_once or 1, len(todo))))
    at_once, resources, fits_more = trial_resources(config, len(todo))
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(at_once)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    epochs, by_name = config.train.epochs, {trial.name: trial for trial in trials}
    control = create_control(config.url)
    halving = Halving(
        by_name, control, num_epochs=epochs, min_epochs=config.first_stage, keep_one_in=config.keep_one_in
    )
    progress = SweepProgress(by_name, control, epochs)
    for trial in trials:
        if trial not in todo:
            halving.learn(trial.name, runs[trial.name].rows, config.train.validation.best_by)
            progress.end(trial.name, len(runs[trial.name].rows))

    def one_trial(settings: dict[str, str]) -> None:
        run_trial(by_name[settings["trial"]], config.url, int(resources["CPU"]), use_gpu="GPU" in resources)

    logger.info("%d trials, %d at once with %s each", len(todo), at_once, resources)
    tune_config = tune.TuneConfig(
        search_alg=TrialQueue([trial.name for trial in todo], control),
        scheduler=halving,
        num_samples=len(todo),
        # When resources are the only limit, waiting trials take over the processes of those that end.
        max_concurrent_trials=at_once if fits_more else None,
        reuse_actors=True,
        trial_dirname_creator=lambda trial: trial.trial_id,
    )
    with tempfile.TemporaryDirectory(prefix="ray-tune-") as folder:
        # Runs keep their own checkpoints. Tune stores only its own state, on this node.
        run_config = tune.RunConfig(
            name="sweep",
            storage_path=folder,
            verbose=0,
            callbacks=[progress],
            failure_config=tune.FailureConfig(max_failures=config.train.run.max_failures),
        )
        tuner = tune.Tuner(tune.with_resources(one_trial, resources), tune_config=tune_config, run_config=run_config)
        was_stopped = watch(tuner.fit, control, unit="epoch")
    if was_stopped and any(read_run(trial.config.run_url).state == "unfinished" for trial in todo):
        raise JobStopped(f"by a signal; everything is saved in {config.url}, and the same command continues")


def trial_resources(config: SweepConfig, num_trials: int) -> tuple[int, dict[str, float], bool]:
    """Return how many trials run side by side on the cluster, the resources of each, and whether more would fit.

    Raises:
        UserError: the cluster has no GPU, or fewer CPUs than trials.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    gpus: dict[str, float] = {}
    if config.train.gpus:
        nodes = [node for node in nodes if node.get("GPU", 0) >= 1]
        num_gpus = sum(int(node["GPU"]) for node in nodes)
        if config.train.gpus != "auto":
            num_gpus = min(num_gpus, config.train.gpus)
        if not num_gpus:
            raise UserError("no node of this cluster has a GPU: --gpus 0 trains on the CPUs")
        at_once = min(config.at_once or num_gpus, num_trials)
        gpus = {"GPU": 1 / math.ceil(at_once / num_gpus)}
    cpus = [int(node["CPU"]) for node in nodes]
    if not config.train.gpus:
        at_once = min(config.at_once or max(1, sum(count // CPUS_EACH for count in cpus)), num_trials)
    if at_once > sum(cpus):
        raise UserError(
            f"--at-once {at_once} needs {at_once} CPUs, and this cluster has {sum(cpus)}: ask for fewer, or add nodes"
        )
    each = cpus_each(cpus, at_once)
    room = sum(count // each for count in cpus)
    if gpus:
        room = min(room, num_gpus * round(1 / gpus["GPU"]))
    return at_once, {"CPU": each, **gpus}, room > at_once
