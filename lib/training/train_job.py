"""The driver of a run: it checks all that can be checked before a GPU is held, and starts the workers."""

import logging
import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lib import cluster, storage
from lib.errors import JobStopped, UserError
from lib.faces.table import crop_size, read_success
from lib.imports import quick_imports
from lib.plans import earlier_plan
from lib.recognition.spec import ModelSpec
from lib.training import checkpoints
from lib.training.checkpoints import CONFIG_NAME, SPEC_NAME, Progress
from lib.training.control import WorkerJob, create_control
from lib.training.face_names import num_left_out, read_identities
from lib.training.feature_store import FeatureStore
from lib.training.history import MODEL_FOLDER, read_rows, run_result
from lib.training.recipe import TableCounts, all_settings, with_recipe
from lib.training.settings import TrainConfig
from lib.training.shard_places import ANYWHERE, StoreSize, place_shards
from lib.training.tracking import Tracking, about_run
from lib.training.triplets import PhotoIndex
from lib.training.validation_sources import ValidationSources, read_sources
from lib.training.watching import watch
from lib.training.worker_resources import with_devices, worker_resources

logger = logging.getLogger(__name__)

Workers = Callable[[WorkerJob, np.ndarray], dict[str, Any] | None]
"""Trains the model of a run on photos with these labels. The job says all but shards and devices.

It returns the result of the run, or None if it was asked to stop early.
"""


def train(config: TrainConfig, workers: Workers | None = None) -> dict[str, Any]:
    """Train a model, by default on the workers of Ray Train, and return the result for the job's last line.

    Raises:
        UserError: the input, the flags or the cluster are wrong.
        JobError: storage or workers failed for good.
        JobStopped: a signal asked the job to stop, and everything is saved.
    """
    started = time.monotonic()
    config = config.with_absolute_paths()
    success = read_success(config.faces_url, run_id=_begun_with(config))
    read = partial(
        read_identities,
        config.faces_url,
        ["train"],
        photos_limit=config.sampling.photos_limit,
        run_id=str(success["run_id"]),
        taken=config.sampling.faces,
    )
    identities = None
    if config.recipe != "none":
        identities = read()
        config = with_recipe(config, TableCounts(photos=len(identities), people=len(identities.unique())))
    plan = config.content(success)
    progress = _settle(config, plan)
    if progress is not None and progress.finished:
        logger.info("%s is finished: nothing to do", config.run_url)
        return _result(config, run_result(read_rows(config.run_url), progress.best_epoch), started)
    identities = read() if identities is None else identities
    spec = _new_spec(config, success, num_faces=len(identities))
    if config.staged is not None:
        logger.info("recipe %s", config.staged.reason)
    people = identities.unique().sort()
    labels_N = pc.index_in(identities, people).to_numpy().astype(np.int32)
    index = PhotoIndex(labels_N, needs_pairs=any(each.needs_pairs for each in all_settings(config)))
    sources = read_sources(config, success, people)
    tracking = Tracking(config.run.track, about_run(config.name, config.run_url, plan))
    if config.dry_run:
        return _dry_run(config, spec, plan, index, sources)
    spec = _begun(config, plan, spec, people) if progress is None else _earlier_spec(config)
    with tracking, cluster.connected():
        job = WorkerJob(config=config, spec=spec, faces_run_id=str(success["run_id"]), sources=sources)
        result = (workers or _run_workers)(job, labels_N)
        tracking.end("stopped" if result is None else "finished", result)
    if result is None:
        raise JobStopped(f"asked by a signal; all is saved in {config.run_url}: run the same command again to resume")
    return _result(config, result, started)


def _new_spec(config: TrainConfig, success: dict[str, Any], *, num_faces: int) -> ModelSpec:
    """Return the spec of a new model of this run.

    Raises:
        UserError: `--min-quality` and `--where` leave no face.
    """
    taken = config.sampling.faces
    training: dict[str, Any] = {}
    if taken:
        left_out = num_left_out(config.faces_url, ["train"], taken, run_id=str(success["run_id"]))
        training = {"faces within": str(taken), "faces left out": left_out}
        if not num_faces:
            raise UserError(f"no face to train on is within {taken}: lower --min-quality, or widen --where")
    return ModelSpec(
        backbone=config.backbone,
        embedding_dim=config.model.embedding_dim,
        head=config.model.head_widths,
        normalize=config.model.normalize,
        flip=config.model.flip,
        image_size=config.model.image_size or crop_size(success),
        fingerprint=success["fingerprint"],
        training=training,
    )


def _dry_run(
    config: TrainConfig, spec: ModelSpec, plan: dict[str, Any], index: PhotoIndex, sources: ValidationSources
) -> dict[str, Any]:
    from lib.recognition.model import EmbeddingModel

    EmbeddingModel(spec)  # raises if there is no such backbone
    photos, people = len(index.labels_N), int(index.labels_N.max()) + 1
    logger.info("%d photos of %d people would train %s", photos, people, config.backbone)
    for note in sources.notes:
        logger.warning("%s", note)
    counts = {"photos": photos, "identities": people, "pairable": len(index.pairable)}
    return {"job": "train", "dry_run": True, "run": config.run_url, **counts, "settings": plan}


def _begun(config: TrainConfig, plan: dict[str, Any], spec: ModelSpec, people: pa.Array) -> ModelSpec:
    """Write the first checkpoint of a run, and return the spec of its model."""
    with quick_imports():
        from lib.training.first_checkpoint import begin

    if any(each.objective.terms.centre is not None for each in all_settings(config)):
        checkpoints.write_identities(config.run_url, people)
    return begin(config, plan, spec)


def _result(config: TrainConfig, result: dict[str, Any], started: float) -> dict[str, Any]:
    model_url = storage.join(config.run_url, MODEL_FOLDER)
    seconds = round(time.monotonic() - started, 1)
    return {"job": "train", "run": config.run_url, "model": model_url, **result, "seconds": seconds}


def _settle(config: TrainConfig, plan: dict[str, Any]) -> Progress | None:
    """Return how far a run with this very configuration is, None if it has not begun.

    Raises:
        UserError: the folder holds a run of other settings, or something else.
    """
    # A run that is older than a setting had its default. A run that does not say what it began from is not read again.
    defaults = {**TrainConfig().flat(), "init": plan["init"]}
    earlier, problem = earlier_plan(config.run_url, CONFIG_NAME, plan, defaults=defaults, begun=checkpoints.FOLDER)
    if problem:
        raise UserError(
            f"{storage.redacted(config.run_url)} {problem}: choose another --name (--init RUN starts from a run's "
            "model), or go back to those settings"
        )
    return None if earlier is None else checkpoints.newest_progress(config.run_url)


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
    """Start the feature store and the workers, and watch them until the end."""
    import ray
    import ray.train

    from lib.training.ray_train import ClusterTrainer, OneMachineTrainer, Torch, train_worker

    config = with_devices(job.config)
    resources = worker_resources(config)
    control = create_control(config.run_url)
    most = resources.num_workers if isinstance(resources.num_workers, int) else resources.num_workers[1]
    store = create_store(config, labels_N, num_workers=most)
    is_local = cluster.is_local()
    # Gradients on GPUs travel by nccl; arrays of the CPU then still travel by gloo.
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


def create_store(config: TrainConfig, labels_N: np.ndarray, *, num_workers: int | None = None) -> FeatureStore | None:
    """Start the feature store of a run if it mines negatives: for so many workers, or for one on this node.

    Raises:
        UserError: the nodes have too little memory for it.
    """
    if config.negatives == "random":
        return None
    dim, precision = config.model.embedding_dim, config.mining.feature_precision
    places = ANYWHERE
    if num_workers is not None:
        num_people = int(labels_N.max(initial=-1)) + 1
        size = StoreSize(num_photos=len(labels_N), num_people=num_people, dim=dim, precision=precision)
        places = tuple(place_shards(size, num_workers))
    return FeatureStore.create(config.run_url, labels_N, dim=dim, precision=precision, places=places)
