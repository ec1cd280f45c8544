"""The driver of a run: checks everything that can be checked before a GPU is held, starts the workers, watches them."""

import logging
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc

from lib import cluster, storage
from lib.config import EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR, STOP_SIGNALS, note_signal
from lib.errors import JobError, JobStopped, UserError
from lib.faces.table import crop_size, read_success
from lib.imports import quick_imports
from lib.parts import earlier_plan
from lib.progress import ProgressLine
from lib.recognition.spec import ModelSpec
from lib.terminal import terminal
from lib.training import checkpoints
from lib.training.checkpoints import CONFIG_NAME, SPEC_NAME, Progress
from lib.training.control import News, WorkerJob, create_control, failure_error
from lib.training.face_names import num_left_out, read_identities
from lib.training.feature_store import FeatureStore
from lib.training.history import MODEL_FOLDER, read_rows, run_result
from lib.training.recipe import TableCounts, all_settings, with_recipe
from lib.training.settings import TrainConfig
from lib.training.tracking import Tracking, about_run
from lib.training.triplets import PhotoIndex
from lib.training.validation_sources import read_sources

logger = logging.getLogger(__name__)

WATCH_EVERY_S = 0.25
FAILURE_LIMIT_S = 60.0
"""How long the other workers may take to end after one has given the run up."""

LEAVE_LIMIT_S = 600.0
"""How long workers may take to write a checkpoint after they were asked to leave."""

TOO_FEW_LIMIT_S = 10.0
"""How long too few nodes for the workers are borne where lost ones do not come back."""


Workers = Callable[[WorkerJob, np.ndarray], dict[str, Any] | None]
"""Trains the model of a run on photos with these labels. The job says all but shards and devices.

It returns what it made, or None if it was asked to leave.
"""


def train(config: TrainConfig, workers: Workers | None = None) -> dict[str, Any]:
    """Train a model, by default on the workers of Ray Train, and return the result for the job's last line.

    Raises:
        UserError: something about the input, the flags or the cluster; JobError: storage or workers failed for good;
        JobStopped: asked by a signal, after everything was saved.
    """
    started = time.monotonic()
    config = config.with_absolute_paths()
    success = read_success(config.faces_url, run_id=_begun_with(config))
    spec = ModelSpec(
        backbone=config.backbone,
        embedding_dim=config.model.embedding_dim,
        head=config.model.head_widths,
        normalize=config.model.normalize,
        image_size=config.model.image_size or crop_size(success),
        fingerprint=success["fingerprint"],
    )
    faces_run_id = str(success["run_id"])
    limit, taken = config.sampling.photos_limit, config.sampling.faces
    identities = None
    if config.recipe != "none":
        identities = read_identities(config.faces_url, ["train"], photos_limit=limit, run_id=faces_run_id, taken=taken)
        config = with_recipe(config, TableCounts(photos=len(identities), people=len(identities.unique())))
    plan = config.content(success)
    progress = _settle(config, plan)
    if progress is not None and progress.finished:
        logger.info("%s is finished: nothing to do", config.run_url)
        return _result(config, run_result(read_rows(config.run_url), progress.best_epoch), started)
    if identities is None:
        identities = read_identities(config.faces_url, ["train"], photos_limit=limit, run_id=faces_run_id, taken=taken)
    if taken:
        left_out = num_left_out(config.faces_url, ["train"], taken, run_id=faces_run_id)
        spec = replace(spec, training={"faces within": str(taken), "faces left out": left_out})
        if not len(identities):
            raise UserError(f"no face to train on is within {taken}: lower --min-quality, or widen --where")
    if config.staged is not None:
        logger.info("recipe %s", config.staged.reason)
    people = identities.unique().sort()
    labels_N = pc.index_in(identities, people).to_numpy().astype(np.int32)
    index = PhotoIndex(labels_N, needs_pairs=any(each.needs_pairs for each in all_settings(config)))
    sources = read_sources(config, success, people)
    tracking = Tracking(config.run.track, about_run(config.name, config.run_url, plan))
    if config.dry_run:
        from lib.recognition.model import EmbeddingModel

        EmbeddingModel(spec)
        counts = {"photos": len(labels_N), "identities": int(labels_N.max()) + 1, "pairable": len(index.pairable)}
        logger.info("%d photos of %d people would train %s", counts["photos"], counts["identities"], config.backbone)
        for note in sources.notes:
            logger.warning("%s", note)
        return {"job": "train", "dry_run": True, "run": config.run_url, **counts, "settings": plan}
    if progress is None:
        with quick_imports():
            from lib.training.first_checkpoint import begin

        if any(each.objective.terms.centre is not None for each in all_settings(config)):
            checkpoints.write_identities(config.run_url, people)
        spec = begin(config, plan, spec)
    else:
        spec = _earlier_spec(config)
    with tracking, cluster.connected():
        job = WorkerJob(config=config, spec=spec, faces_run_id=faces_run_id, sources=sources)
        result = (workers or _run_workers)(job, labels_N)
        tracking.end("stopped" if result is None else "finished", result)
    if result is None:
        raise JobStopped(
            f"asked by a signal; all is saved in {config.run_url}, and the same command goes on from there"
        )
    return _result(config, result, started)


def _result(config: TrainConfig, result: dict[str, Any], started: float) -> dict[str, Any]:
    model_url = storage.join(config.run_url, MODEL_FOLDER)
    seconds = round(time.monotonic() - started, 1)
    return {"job": "train", "run": config.run_url, "model": model_url, **result, "seconds": seconds}


def _settle(config: TrainConfig, plan: dict[str, Any]) -> Progress | None:
    """Return how far a run of this very configuration is, None where it has not begun.

    Raises:
        UserError: the folder holds a run of other settings, or something else.
    """
    # Runs that are older than a setting had its default; what they began from, if they do not say, is not read again.
    defaults = {**TrainConfig().flat(), "init": plan["init"]}
    earlier, problem = earlier_plan(config.run_url, CONFIG_NAME, plan, defaults=defaults, begun=checkpoints.FOLDER)
    if problem:
        raise UserError(
            f"{storage.redacted(config.run_url)} {problem}: choose another --name (--init RUN goes on from a run's "
            "model), or go back to those settings"
        )
    if earlier is None:
        return None
    return checkpoints.newest_progress(config.run_url)


def _begun_with(config: TrainConfig) -> str | None:
    """Return the version of the faces table that the run began with, None if it has not begun."""
    config_url = storage.join(config.run_url, CONFIG_NAME)
    if not storage.exists(config_url):
        return None
    run_id = storage.read_json(config_url, {"fingerprint": dict}).get("faces_run_id")
    return None if run_id is None else str(run_id)


def _earlier_spec(config: TrainConfig) -> ModelSpec:
    url = storage.join(config.run_url, checkpoints.FOLDER, SPEC_NAME)
    return ModelSpec.from_json(storage.read_json(url), url)


def _run_workers(job: WorkerJob, labels_N: np.ndarray) -> dict[str, Any] | None:
    """Start store and workers, and watch them until the end."""
    import ray
    import ray.train

    from lib.training.ray_train import ClusterTrainer, OneMachineTrainer, Torch, train_worker

    config = with_devices(job.config)
    resources = worker_resources(config)
    control = create_control(config.run_url)
    store = create_store(config, labels_N)
    is_local = cluster.is_local()
    # Arrays of the CPU travel by gloo also where gradients travel by nccl.
    backend = "cpu:gloo,cuda:nccl" if config.gpus else "gloo"
    job = replace(job, config=config, num_shards=store.num_shards if store else 0, use_gpu=bool(config.gpus))
    with tempfile.TemporaryDirectory(prefix="ray-train-") as folder:
        trainer = (OneMachineTrainer if is_local else ClusterTrainer)(
            train_worker,
            train_loop_config={"job": pickle.dumps(job)},
            backend_config=Torch(backend, folder if is_local else ""),
            scaling_config=ray.train.ScalingConfig(
                num_workers=resources.num_workers,
                use_gpu=bool(config.gpus),
                resources_per_worker=resources.each,
                placement_strategy="SPREAD",
            ),
            run_config=ray.train.RunConfig(
                # Checkpoints are ours: Ray keeps only its own notes, on this node.
                name="run",
                storage_path=folder,
                failure_config=ray.train.FailureConfig(max_failures=config.run.max_failures),
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            ),
        )
        logger.info("training %s on %s", config.backbone, resources.text)
        watch(trainer.fit, control, unit="image", resources=resources)
    return ray.get(control.result.remote())


def with_devices(config: TrainConfig, least: int = 0) -> TrainConfig:
    """Return the settings with the number of GPUs of the connected cluster in the place of `auto`.

    It waits for `least` CPUs or GPUs, or those that the fewest workers need, as long as `--wait-minutes` says.
    """
    gpus = 0 if config.run.deterministic else config.gpus
    if gpus == "auto":
        gpus = cluster.chosen_gpus("auto")
    least = least or (config.workers[0] if config.workers else gpus or 1)
    cluster.wait_for("GPU" if gpus else "CPU", least, limit_s=60 * config.run.wait_minutes)
    return replace(config, gpus=gpus)


def create_store(config: TrainConfig, labels_N: np.ndarray, *, num_shards: int | None = None) -> FeatureStore | None:
    """Start the feature store of a run, by default a shard a node, where its policy of negatives asks one."""
    if config.negatives == "random":
        return None
    return FeatureStore.create(config.run_url, labels_N, dim=config.model.embedding_dim, num_shards=num_shards)


@dataclass(frozen=True, kw_only=True)
class WorkerResources:
    """How many workers there are, and what each holds."""

    num_workers: int | tuple[int, int]
    each: dict[str, float]
    text: str

    def fit(self, nodes: list[dict[str, float]]) -> bool:
        """Return whether nodes with these resources hold the fewest workers that the run goes on with."""
        least = self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]
        return least <= sum(min(int(node.get(kind, 0) // n) for kind, n in self.each.items()) for node in nodes)


def worker_resources(config: TrainConfig) -> WorkerResources:
    """Return the workers that the settings of `with_devices` ask for and the connected cluster has.

    Raises:
        UserError: the cluster has fewer CPUs or GPUs than workers.
    """

    nodes = [node for node in cluster.node_resources() if node.get("CPU", 0) >= 1]
    kind = "GPU" if config.gpus else "CPU"
    places = [int(node.get(kind, 0)) for node in nodes]
    total = sum(places)
    assert config.gpus != "auto"
    least = config.workers[0] if config.workers else max(1, config.gpus or len(nodes))
    if total < least:
        advice = "--gpus 0 trains on the CPUs" if config.gpus else "ask for fewer by --workers"
        raise UserError(
            f"{least} workers need {least} {kind}s, and this cluster of {len(nodes)} nodes has {total}: {advice}, "
            "add nodes, or give those of a cluster that grows --wait-minutes"
        )
    if config.gpus:
        num_cpus = min(int(node["CPU"]) // int(node["GPU"]) for node in nodes if node.get("GPU", 0) >= 1)
    else:
        num_cpus = cpus_each(places, least)
    num_cpus = max(1, num_cpus)
    most = config.workers[-1] if config.workers else least
    return WorkerResources(
        num_workers=least if most == least else (least, most),
        each={"CPU": num_cpus, **({"GPU": 1} if config.gpus else {})},
        text=f"{least if most == least else f'{least} to {most}'} workers of {num_cpus} CPUs"
        + (" and a GPU" if config.gpus else ""),
    )


def cpus_each(cpus_of_nodes: list[int], num_workers: int) -> int:
    """Return the most CPUs that each of so many workers can have on these nodes."""
    return next(
        each for each in range(max(cpus_of_nodes), 0, -1) if sum(cpus // each for cpus in cpus_of_nodes) >= num_workers
    )


def watch(work: Callable[[], Any], control: Any, *, unit: str, resources: WorkerResources | None = None) -> bool:
    """Do the work on a thread, and show how far it is until it ends; return whether it was asked to leave early.

    With `resources` the process ends, to be queued again, where lost nodes leave too few for them.

    Raises:
        UserError, JobError: what a worker gave up with, or Ray after the last restart.
    """
    import ray

    ended: list[BaseException | None] = []
    leave_until: float | None = None

    def run() -> None:
        try:
            work()
            ended.append(None)
        except BaseException as error:  # noqa: BLE001 - raised again below, on the main thread
            ended.append(error)

    with _stop_signals() as asked:
        working = threading.Thread(target=run, daemon=True)
        working.start()
        with ProgressLine("starting the workers", unit=unit) as progress:
            fitted_at = time.monotonic()
            while not ended:
                ended_in = asked.wait(WATCH_EVERY_S)
                news = ray.get(control.news.remote())
                _show(news, progress)
                if news.failure:
                    working.join(FAILURE_LIMIT_S)
                    if working.is_alive():
                        kind, message = news.failure
                        if kind == "user":
                            terminal().abandon(f"error: {message}", EXIT_USER_ERROR)
                        terminal().abandon(f"failed: {message}", EXIT_FAILURE)
                    raise failure_error(news.failure)
                if ended_in and leave_until is None:
                    logger.info("asked to stop: saving everything")
                    control.request_stop.remote()
                    leave_until = time.monotonic() + LEAVE_LIMIT_S
                if leave_until is not None:
                    time.sleep(WATCH_EVERY_S)
                fitted_at = _check_limits(leave_until, fitted_at, resources)
            _show(ray.get(control.news.remote()), progress)
    news = ray.get(control.news.remote())
    if news.failure:
        raise failure_error(news.failure)
    if ended[0] is not None:
        raise JobError(f"the workers failed too often: {_reason(ended[0])}") from ended[0]
    return leave_until is not None


def _check_limits(leave_until: float | None, fitted_at: float, resources: WorkerResources | None) -> float:
    """Return when the cluster last had the nodes that the run needs; end this process where waiting is of no use.

    Ray's trainer waits in its thread then, and leaving Ray in an orderly way would crash. Ray ends what a driver leaves
    that is gone.
    """
    now = time.monotonic()
    if leave_until is not None and now > leave_until:
        terminal().abandon(
            "failed: the workers did not leave in time: the same command goes on from the last epoch", EXIT_FAILURE
        )
    if resources is None or not cluster.nodes_are_fixed() or resources.fit(cluster.node_resources()):
        return now
    if now - fitted_at > TOO_FEW_LIMIT_S:
        terminal().abandon(
            f"stopped: nodes are lost, too few are left for {resources.text}; on new ones the same command goes on "
            "from the last checkpoint",
            EXIT_STOPPED,
        )
    return fitted_at


def _show(news: News, progress: ProgressLine) -> None:
    for line in news.lines:
        logger.info(line)
    progress.update(news.num_images, total=news.total_images, label=news.status, note=news.note)


def _reason(error: BaseException) -> str:
    """Return the last line of an error whose text contains another error."""
    return str(error).strip().splitlines()[-1]


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Set the event at SIGTERM and SIGUSR1, which Slurm and Kubernetes send before they end a job."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def on_signal(number: int, _: object) -> None:
        note_signal(number)  # a signal to the whole process group also kills Ray
        asked.set()

    before = [signal.signal(kind, on_signal) for kind in STOP_SIGNALS]
    try:
        yield asked
    finally:
        for kind, handler in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(kind, handler)
