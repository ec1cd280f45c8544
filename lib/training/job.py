"""The driver of a run: checks everything that can be checked before a GPU is held, starts the workers, watches them."""

import logging
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from lib import cluster, storage
from lib.errors import JobError, JobStopped, UserError
from lib.faces.table import read_success
from lib.parts import differences
from lib.recognition.model import EmbeddingModel, ModelSpec, initial_model
from lib.training import checkpoints
from lib.training.checkpoints import Progress
from lib.training.control import create_control, failure_error
from lib.training.face_cache import read_identities
from lib.training.feature_store import FeatureStore
from lib.training.history import read_rows
from lib.training.record import MODEL_FOLDER, run_result
from lib.training.schedule import first_phase
from lib.training.settings import TrainConfig
from lib.training.triplets import PhotoIndex

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
SPEC_NAME = "spec.json"
"""In the folder of the checkpoints: what the model is whose weights they hold."""

WATCH_EVERY_S = 0.25
FAILURE_LIMIT_S = 60.0
"""How long the other workers may take to end after one has given the run up."""

LEAVE_LIMIT_S = 600.0
"""How long workers may take to write a checkpoint after they were asked to leave."""


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a model and return what the last line of the job says.

    Raises:
        UserError: something about the input, the flags or the cluster; JobError: storage or workers failed for good;
        JobStopped: asked by a signal, after everything was saved.
    """
    started = time.monotonic()
    success = read_success(config.faces_url)
    spec = ModelSpec(
        backbone=config.backbone,
        embedding_dim=config.embedding_dim,
        head=config.head_widths,
        normalize=config.normalize,
        image_size=config.image_size or int(success["fingerprint"]["image_size"]),
        fingerprint=success["fingerprint"],
    )
    plan = config.content(success)
    progress = _settle(config, plan)
    if progress is not None and progress.finished:
        logger.info("%s is finished: nothing to do", config.run_url)
        return _result(config, run_result(read_rows(config.run_url), progress), started)
    identities = read_identities(config.faces_url, ["train"])
    labels_N = pc.index_in(identities, identities.unique().sort()).to_numpy().astype(np.int32)
    index = PhotoIndex(labels_N)
    if config.dry_run:
        EmbeddingModel(spec)
        counts = {"photos": len(labels_N), "identities": int(labels_N.max()) + 1, "pairable": len(index.pairable)}
        logger.info("%d photos of %d people would train %s", counts["photos"], counts["identities"], config.backbone)
        return {"job": "train", "dry_run": True, "run": config.run_url, **counts, "settings": plan}
    spec = _begin(config, plan, spec) if progress is None else _earlier_spec(config)
    with cluster.connected():
        result = _run_workers(config, spec, labels_N)
    return _result(config, result, started)


def _result(config: TrainConfig, result: dict[str, Any], started: float) -> dict[str, Any]:
    model_url = storage.join(config.run_url, MODEL_FOLDER)
    seconds = round(time.monotonic() - started, 1)
    return {"job": "train", "run": config.run_url, "model": model_url, **result, "seconds": seconds}


def _settle(config: TrainConfig, plan: dict[str, Any]) -> Progress | None:
    """Return how far a run of this very configuration is, None where it has not begun.

    Raises:
        UserError: the folder holds a run of another configuration, or something else.
    """
    url = storage.join(config.run_url, CONFIG_NAME)
    if not storage.exists(url):
        foreign = next(iter(storage.list_files(config.run_url)), None)
        if foreign is not None and not foreign.path.startswith(checkpoints.FOLDER):
            raise UserError(
                f"{config.run_url} holds files but no {CONFIG_NAME}, such as {foreign.path}: choose another --name"
            )
        return None
    earlier = storage.read_json(url)
    if different := differences(plan, earlier):
        raise UserError(
            f"{config.run_url} is a run of another configuration ({'; '.join(different)}): choose another --name, or "
            "go back to those settings"
        )
    return checkpoints.newest_progress(config.run_url)


def _begin(config: TrainConfig, plan: dict[str, Any], spec: ModelSpec) -> ModelSpec:
    """Write the first checkpoint, which holds the initial weights, and the configuration; return the model's spec."""
    torch.manual_seed(config.seed)
    model = initial_model(spec, config.initial_weights())
    storage.check_writable(config.run_url)
    phase = first_phase(config.negatives)
    progress = Progress(epoch=1, negatives=phase.negatives, phase_first_epoch=phase.first_epoch)
    checkpoints.write(config.run_url, progress, checkpoints.prefixed("model", model.state_dict()))
    storage.write_json(storage.join(config.run_url, checkpoints.FOLDER, SPEC_NAME), model.spec.to_json())
    storage.write_json(storage.join(config.run_url, CONFIG_NAME), plan)
    return model.spec


def _earlier_spec(config: TrainConfig) -> ModelSpec:
    url = storage.join(config.run_url, checkpoints.FOLDER, SPEC_NAME)
    return ModelSpec.from_json(storage.read_json(url), url)


def _run_workers(config: TrainConfig, spec: ModelSpec, labels_N: np.ndarray) -> dict[str, Any]:
    """Start store and workers, and watch them until the end."""
    import ray.train
    from ray.train import LoggingConfig
    from ray.train.torch import TorchConfig

    from lib.training.loop import WorkerJob, train_worker

    kind = "GPU" if config.use_gpu else "CPU"
    cluster.wait_for(kind, config.workers[0] if config.workers else 1, limit_s=60 * config.wait_minutes)
    resources = worker_resources(config)
    control = create_control(config.run_url)
    num_shards = 0
    if config.negatives != "random":
        store = FeatureStore.create(config.run_url, labels_N, dim=config.embedding_dim)
        num_shards = store.num_shards
    with tempfile.TemporaryDirectory(prefix="ray-train-") as folder:
        trainer = _trainer_class()(
            train_worker,
            train_loop_config={"job": WorkerJob(config=config, spec=spec, num_shards=num_shards)},
            # Arrays of the CPU travel by gloo also where gradients travel by nccl.
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if config.use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=resources.num_workers,
                use_gpu=config.use_gpu,
                resources_per_worker=resources.each,
                placement_strategy="SPREAD",
            ),
            run_config=ray.train.RunConfig(
                # Checkpoints are ours: Ray keeps only its own notes, on this node.
                name="run",
                storage_path=folder,
                failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        logger.info("training %s on %s", config.backbone, resources.text)
        result = _watch(trainer, control)
    if result is None:
        raise JobStopped(
            f"asked by a signal; all is saved in {config.run_url}, and the same command goes on from there"
        )
    return result


def _trainer_class() -> Any:
    """Return Ray Train's trainer without its placement group cleaner.

    The cleaner asks the dashboard each second, and where there is none it complains each second. What it would free
    after a driver was killed, Ray frees by itself, for it belongs to the job.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class QuietTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback)]

    return QuietTrainer


@dataclass(frozen=True, kw_only=True)
class WorkerResources:
    """How many workers there are, and what each holds."""

    num_workers: int | tuple[int, int]
    each: dict[str, float]
    text: str


def worker_resources(config: TrainConfig) -> WorkerResources:
    """Return the workers that the flags ask for and the connected cluster has.

    Raises:
        UserError: the cluster has fewer CPUs or GPUs than workers.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    kind = "GPU" if config.use_gpu else "CPU"
    places = [int(node.get(kind, 0)) for node in nodes]
    total = sum(places)
    least = config.workers[0] if config.workers else max(1, total if config.use_gpu else len(nodes))
    if total < least:
        advice = "leave out --use-gpu" if config.use_gpu else "ask for fewer by --workers"
        raise UserError(
            f"{least} workers need {least} {kind}s, and this cluster of {len(nodes)} nodes has {total}: {advice}, "
            "add nodes, or give those of a cluster that grows --wait-minutes"
        )
    if config.use_gpu:
        num_cpus = min(int(node["CPU"]) // int(node["GPU"]) for node in nodes if node.get("GPU", 0) >= 1)
    else:
        if int(sum(ray.cluster_resources().get(name, 0) for name in ("GPU",))):
            logger.warning("this cluster has GPUs: --use-gpu trains on them")
        num_cpus = _cpus_each(places, least)
    num_cpus = max(1, num_cpus)
    most = config.workers[-1] if config.workers else least
    return WorkerResources(
        num_workers=least if most == least else (least, most),
        each={"CPU": num_cpus, **({"GPU": 1} if config.use_gpu else {})},
        text=f"{least if most == least else f'{least} to {most}'} workers of {num_cpus} CPUs"
        + (" and a GPU" if config.use_gpu else ""),
    )


def _cpus_each(cpus_of_nodes: list[int], num_workers: int) -> int:
    """Return the most CPUs that each of so many workers can have on these nodes."""
    return next(
        each for each in range(max(cpus_of_nodes), 0, -1) if sum(cpus // each for cpus in cpus_of_nodes) >= num_workers
    )


def _watch(trainer: Any, control: Any) -> dict[str, Any] | None:
    """Show how far the workers are until they end; return the result, None where they were asked to leave.

    Raises:
        UserError, JobError: what a worker gave up with, or Ray Train after the last restart.
    """
    import ray
    from tqdm import tqdm

    ended: list[BaseException | None] = []

    def fit() -> None:
        try:
            trainer.fit()
            ended.append(None)
        except BaseException as error:  # noqa: BLE001 - raised again below, on the main thread
            ended.append(error)

    with _stop_signals() as asked:
        fitting = threading.Thread(target=fit, daemon=True)
        fitting.start()
        is_terminal = sys.stderr.isatty()
        with tqdm(unit="image", disable=not is_terminal, dynamic_ncols=True) as bar:
            leave_until = None
            while not ended:
                ended_in = asked.wait(WATCH_EVERY_S)
                news = ray.get(control.news.remote())
                _show(news, bar, is_terminal)
                if news.failure:
                    # The worker has returned. Leaving Ray while that thread still asks it would crash this process.
                    fitting.join(FAILURE_LIMIT_S)
                    raise failure_error(news.failure)
                if ended_in and leave_until is None:
                    logger.info("asked to stop: writing a checkpoint")
                    control.request_stop.remote()
                    leave_until = time.monotonic() + LEAVE_LIMIT_S
                if leave_until is not None:
                    time.sleep(WATCH_EVERY_S)
                    if time.monotonic() > leave_until:
                        raise JobError(
                            "the workers did not leave in time: the same command goes on from the last epoch"
                        )
            _show(ray.get(control.news.remote()), bar, is_terminal)
    news = ray.get(control.news.remote())
    if news.failure:
        raise failure_error(news.failure)
    if ended[0] is not None:
        raise JobError(f"the workers failed too often: {_reason(ended[0])}") from ended[0]
    return ray.get(control.result.remote())


def _show(news: Any, bar: Any, is_terminal: bool) -> None:
    for line in news.lines:
        if is_terminal:
            bar.write(line, file=sys.stderr)
        else:
            logger.info(line)
    if news.total_images:
        bar.total = news.total_images
        bar.update(news.num_images - bar.n)
    if news.status:
        bar.set_description(news.status)


def _reason(error: BaseException) -> str:
    """Return the last line of an error that has the story of another one inside."""
    return str(error).strip().splitlines()[-1]


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Set the event at SIGTERM and SIGUSR1, as Slurm and Kubernetes send before they end a job."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    kinds = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(kind, lambda *_: asked.set()) for kind in kinds]
    try:
        yield asked
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
