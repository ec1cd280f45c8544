"""What each worker does: epochs of steps, validation, the feature store's upkeep, checkpoints; worker 0 also writes.

A worker that starts takes the newest checkpoint, so a beginning, a restart after a failure, another number of workers
and a run that was stopped are one and the same path. Every draw follows from seed, epoch, worker and step.
"""

import collections
import contextlib
import ctypes
import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import ray
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lib import device as devices
from lib import storage
from lib.errors import JobError, JobStopped, UserError
from lib.recognition.model import EmbeddingModel, ModelSpec, normalized_images
from lib.training import checkpoints, collective
from lib.training.averaging import AveragedWeights
from lib.training.batches import EpochBatches, EpochPlan, TrainingBatch
from lib.training.checkpoints import Progress
from lib.training.control import connect_control
from lib.training.decoders import Decoders
from lib.training.face_cache import FaceCache, NoFacesError, build_cache, default_folder
from lib.training.feature_store import FeatureStore
from lib.training.freezing import checkpoint_activations, fix_statistics, freeze_stages
from lib.training.objective import SUM_NAMES, EpochSums, objective
from lib.training.passes import EmbeddingPass, StoreUpkeep
from lib.training.record import EpochOutcome, RunRecord
from lib.training.schedule import learning_rate
from lib.training.settings import TrainConfig
from lib.training.suspects import SuspectLog
from lib.training.triplets import PhotoIndex, UsageCounter
from lib.training.validation import Validation

logger = logging.getLogger(__name__)

MAX_LOADER_THREADS, MAX_LOADER_PROCESSES = 8, 16

COMPILING_PAYS = 500_000
"""Images that a run still has to train on from which on the shorter steps give back what compiling takes: on an H100,
convnext_tiny at 240 pixels saves 0.1 ms an image, and compiling takes under a minute."""

BYTES_A_WEIGHT = 16
"""Of the optimiser's two averages, the averaged weights, and what a step of the optimiser needs meanwhile."""

MAX_STEPS_UNCHECKED = 32
"""Steps that a GPU may be behind before the oldest one's gradient is waited for, to see whether it is finite."""

AGREE_EVERY = 4
"""Steps between two questions of several workers whether to write a checkpoint or to leave."""

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of malloc.h."""

GO_ON, SAVE, LEAVE = "go on", "save", "leave"

TELL_EVERY_S = 0.5

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerJob:
    """What the driver tells every worker."""

    config: TrainConfig
    spec: ModelSpec
    num_shards: int
    """Of the feature store; 0 where no policy needs one."""
    use_gpu: bool


def train_worker(settings: dict[str, Any]) -> None:
    """Train until the end of the run, or until asked to leave; Ray Train calls this on every worker."""
    import ray.train.torch

    job: WorkerJob = settings["job"]
    work(job, ray.train.torch.get_device() if job.use_gpu else torch.device("cpu"))


def work(job: WorkerJob, device: torch.device) -> None:
    """Do the part of this process, on its own or beside others in torch's process group."""
    control = connect_control(job.config.run_url)
    if ray.get(control.has_failed.remote()):
        return  # Started again although it cannot go on: the driver is about to say why.
    try:
        with contextlib.closing(Worker(job, control, device)) as worker:
            worker.run()
    except torch.OutOfMemoryError as error:
        ray.get(control.fail.remote("user", _out_of_memory(job.config, error)))
    except (UserError, JobError) as error:
        # Not raised: Ray Train would start all workers again. The driver ends the run as soon as it hears of this.
        ray.get(control.fail.remote("user" if isinstance(error, UserError) else "job", str(error)))
    except JobStopped:
        return  # everything is saved
    except RuntimeError:
        # What a collective raises when another worker has hung up.
        if not ray.get(control.has_failed.remote()):
            raise
    else:
        return
    collective.hang_up()


class Worker:
    """One process of a run."""

    def __init__(self, job: WorkerJob, control: Any, device: torch.device) -> None:
        """Map the crops, and take model, optimiser and counts from the newest checkpoint."""
        self.job = job
        self.config = job.config
        self.control = control
        self.device = device
        self.rank, self.num_workers = collective.rank(), collective.num_workers()
        devices.prepare(device, deterministic=job.config.deterministic)
        if device.type == "cpu":
            _keep_freed_memory()
        checkpoint = checkpoints.load_newest(job.config.run_url)
        if checkpoint is None:
            raise UserError(
                f"this node does not see the checkpoints in {storage.redacted(job.config.run_url)}: a local --data has "
                "to be a disk that all nodes share, or an object store such as s3://bucket/folder"
            )
        self.progress = checkpoint.progress
        if self.rank == 0:
            storage.remove_unfinished(job.config.run_url)

        self._tell(status="reading the faces")
        cache_dir = job.config.cache_dir or default_folder()
        limit = job.config.photos_limit
        self.cache = FaceCache(build_cache(job.config.faces_url, ["train"], cache_dir, photos_limit=limit))
        try:
            val_cache = FaceCache(build_cache(job.config.faces_url, ["val"], cache_dir))
        except NoFacesError:  # and nothing else: training on would hide a damaged part, which others may not see
            val_cache = None
        self.val_cache = val_cache
        self.index = PhotoIndex(self.cache.labels_N)

        num_cpus = int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))
        self.decoders: Decoders | None = None
        if device.type == "cuda":
            self.decoders = Decoders(job.config.loader_threads or min(MAX_LOADER_PROCESSES, num_cpus))
        self.upload = devices.Upload(device)
        self.how = EmbeddingPass(
            device=device,
            precision=devices.chosen_precision(job.config.precision, device),
            num_threads=job.config.loader_threads or min(MAX_LOADER_THREADS, num_cpus),
            decoders=self.decoders,
        )

        self.model = model = self._model_of(checkpoint)
        self.averaged: AveragedWeights | None = None
        if job.config.ema:
            self.averaged = AveragedWeights(model, job.config.ema)
            if averaged := checkpoints.without_prefix("averaged", checkpoint.tensors):
                self.averaged.load_state_dict(averaged)
        if job.config.batch_size == "auto":
            self.config = job.config.with_batch_of(self.progress.batch_size or self._images_that_fit())
            self.progress = dataclasses.replace(self.progress, batch_size=int(self.config.batch_size))
            self._tell(line=f"--batch-size auto: {self.config.batch_size} images")
        self.validation = Validation(val_cache, self.config)
        self.optimizer = devices.adamw(_parameter_groups(model, job.config.weight_decay), device, lr=job.config.lr)
        if optimizer := checkpoints.without_prefix("optimizer", checkpoint.tensors):
            checkpoints.restore_optimizer(self.optimizer, optimizer)
        self._parameters = list(model.parameters())
        self.trained = model if self.num_workers == 1 else _distributed(model, device)
        self.usage = UsageCounter(len(self.cache))
        if self.rank == 0 and "usage" in checkpoint.tensors:
            self.usage.counts_3N = checkpoint.tensors["usage"].numpy().copy()
        self._random_state = checkpoint.tensors.get("random_state")

        self.upkeep: StoreUpkeep | None = None
        if job.num_shards:
            store = FeatureStore.connect(
                job.config.run_url, self.cache.labels_N, dim=job.spec.embedding_dim, num_shards=job.num_shards
            )
            self.upkeep = StoreUpkeep(store=store, cache=self.cache, how=self.how)
        before = checkpoints.without_prefix("suspects", checkpoint.tensors) if self.rank == 0 else {}
        self.suspects = SuspectLog.from_tensors(before)
        self.anchors_per_step = self.config.anchors_per_step(len(self.index.pairable))
        self.images_per_batch = self.anchors_per_step * (3 if job.config.batch == "triplets" else 1)
        self.anchors_per_epoch = job.config.triplets_per_epoch or len(self.cache)
        self.last_saved = time.monotonic()
        self._stop_answer: Any = None
        self._unchecked: collections.deque[tuple[str, devices.Fetched]] = collections.deque()
        self._unwritten: collections.deque[tuple[TrainingBatch, devices.Fetched, int]] = collections.deque()

    def _model_of(self, checkpoint: checkpoints.Checkpoint) -> EmbeddingModel:
        model = EmbeddingModel(self.job.spec).to(self.device).to(memory_format=torch.channels_last)
        model.load_state_dict(checkpoints.without_prefix("model", checkpoint.tensors))
        freeze_stages(model, self.config.frozen_stages)
        if self.config.checkpoint_activations:
            checkpoint_activations(model)
        return model

    def close(self) -> None:
        """End the processes that decode."""
        if self.decoders is not None:
            self.decoders.close()

    @property
    def evaluated(self) -> EmbeddingModel:
        """The model that is validated, stored features come from, and users get: the averaged one where there is."""
        return self.model if self.averaged is None else cast(EmbeddingModel, self.averaged.module)

    def _compile(self) -> None:
        """Compile the model where that pays, and run it forward and backward once."""
        config = self.config
        epochs_left = config.epochs - self.progress.epoch + 1
        images_left = epochs_left * self.anchors_per_epoch // self.num_workers
        with self._state_kept():
            is_compiled = devices.compile_module(
                self.model,
                config.compile,
                self.device,
                lambda: self._try(self.images_per_batch),
                pays=images_left >= COMPILING_PAYS,
                parts=repeated_blocks(self.model.backbone),
            )
        if is_compiled:
            self._tell(line=f"the model is compiled for this {devices.told(self.device)}")

    def _try(self, num_images: int) -> None:
        """Run the model forward and backward on black images."""
        size = self.model.spec.image_size
        crops_NHWC = torch.zeros((num_images, size, size, 3), dtype=torch.uint8, device=self.device)
        self._embeddings(crops_NHWC, self.model).sum().backward()

    def _images_that_fit(self) -> int | None:
        """Return the largest batch that fits into the memory of every worker's GPU, None for CPUs."""
        num_weights = sum(parameter.numel() for parameter in self.model.parameters())
        with self._state_kept():
            largest = devices.largest_batch(self._try, self.device, reserved=BYTES_A_WEIGHT * num_weights)
        devices.free_memory()
        return None if largest is None else min(collective.broadcast(collective.gathered(largest)))

    @contextlib.contextmanager
    def _state_kept(self) -> Iterator[None]:
        """Have the model in training mode for trial runs, which leave nothing behind."""
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        random_state = torch.get_rng_state()
        self.model.train()
        if self.progress.fixed_statistics:
            fix_statistics(self.model)
        yield
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        self.model.zero_grad(set_to_none=True)
        torch.set_rng_state(random_state)

    def _embeddings(self, crops_NHWC: torch.Tensor, model: nn.Module) -> torch.Tensor:
        with devices.autocast(self.device, self.how.precision):
            embeddings_ND: torch.Tensor = model(normalized_images(crops_NHWC, self.model.spec))
        return embeddings_ND

    def run(self) -> None:
        """Train the epochs that are left."""
        record = RunRecord(self.config, self.progress, self.cache, self.control) if self.rank == 0 else None
        if record and self.validation.problem:
            record.note(self.validation.problem)
        if self.progress.step:
            place = f"epoch {self.progress.epoch}, step {self.progress.step}"
            self._tell(line=f"going on from the checkpoint of {place}, with {self.num_workers} worker(s)")
        if not self.progress.finished:
            self._compile()
        while not self.progress.finished:
            began = time.perf_counter()
            num_filled = self._fill_store()
            sums, data_wait_s, store_wait_s, train_s = self._train_epoch()
            refresh_s = self._refresh_store()
            outcome = EpochOutcome(
                sums=sums,
                figures=self.validation.figures(self._validation_embeddings(), self.progress.negatives),
                usage_3N=collective.summed(self.usage.counts_3N),
                suspects=self._all_suspects(),
                staleness=self._staleness(),
                num_corrupt=len(self.cache.failed_rows),
                num_filled=num_filled,
                seconds={
                    "train": train_s,
                    "data_wait": data_wait_s,
                    "store_wait": store_wait_s,
                    "refresh": refresh_s,
                    "epoch": time.perf_counter() - began,
                },
            )
            progress = None
            if record:
                progress = record.end_epoch(self.progress, outcome, self.evaluated)
                self._save(progress, outcome.usage_3N, outcome.suspects)
            self.progress, is_leaving = collective.broadcast(
                None if progress is None else (progress, self._must_leave())
            )
            if is_leaving and not self.progress.finished:
                raise JobStopped  # all is in the checkpoint just written
        if record:
            record.finish(self.progress)
        # Nobody leaves before the record stands: Ray Train ends all workers with the first that fails.
        collective.broadcast(True)

    def _train_epoch(self) -> tuple[dict[str, float], float, float, float]:
        """Do the steps of the epoch that are left.

        Returns its sums over all workers, and this worker's seconds: waiting for crops, for the store, and in all.
        """
        config, progress = self.config, self.progress
        anchors_a_step = self.anchors_per_step * self.num_workers
        num_steps = max(1, self.anchors_per_epoch // anchors_a_step)
        accumulate = min(config.accumulate, num_steps)
        num_steps -= num_steps % accumulate
        first_step = min(num_steps, -(-progress.anchors_done // anchors_a_step))
        self._seed_torch(first_step)
        plan = EpochPlan(
            config=config,
            epoch=progress.epoch,
            rank=self.rank,
            first_step=first_step,
            num_steps=num_steps,
            negatives=progress.negatives,
        )
        if self.cache.failed_rows:
            self.index = PhotoIndex(self.cache.labels_N, excluded_rows=sorted(self.cache.failed_rows))
        self._epoch_usage = np.zeros(len(self.cache), bool)
        sums = EpochSums(self.device, progress.sums if self.rank == 0 else {})
        batches = EpochBatches(
            plan,
            self.cache,
            self.index,
            image_size=self.model.spec.image_size,
            num_threads=self.how.num_threads,
            store=self.upkeep.store if self.upkeep else None,
            suspects=self.suspects,
            decoders=self.decoders,
            upload=self.upload,
        )
        began = time.perf_counter()
        told = 0.0
        self.trained.train()
        if progress.fixed_statistics:
            fix_statistics(self.model)
        with batches:
            for step, batch in enumerate(batches, start=first_step):
                share_done = (progress.epoch - 1 + step / num_steps) / config.epochs
                is_last = (step + 1) % accumulate == 0
                lr = learning_rate(config.lr, share_done, config.warmup_share)
                self._step(batch, sums, lr, share=1 / accumulate, is_last=is_last)
                if self.rank == 0 and time.perf_counter() - told > TELL_EVERY_S:
                    told = time.perf_counter()
                    self._tell(status=f"epoch {progress.epoch}/{config.epochs}")
                    self.control.count.remote(
                        ((progress.epoch - 1) * num_steps + step + 1) * self.num_workers * len(batch.loaded.images),
                        config.epochs * num_steps * self.num_workers * len(batch.loaded.images),
                    )
                if is_last and step + 1 < num_steps:
                    self._heed_requests(sums, (step + 1) * anchors_a_step, step)
            self._settle()
        all_sums = dict(zip(SUM_NAMES, collective.summed(sums.values()).tolist(), strict=True))
        return all_sums, batches.data_wait_s, batches.store_wait_s, time.perf_counter() - began

    def _step(
        self, batch: TrainingBatch, sums: EpochSums, lr: float, *, share: float = 1.0, is_last: bool = True
    ) -> None:
        """Train on a batch, whose gradient has this share in the step that the last batch of a step makes.

        Nothing here waits for a GPU, which works some steps behind.
        """
        config = self.config
        assert batch.loaded.uploaded is not None
        with contextlib.ExitStack() as stack:
            if isinstance(self.trained, DistributedDataParallel) and not is_last:
                stack.enter_context(self.trained.no_sync())
            embeddings_ND = self._embeddings(batch.loaded.uploaded.tensor(), self.trained)
            with devices.exact_products():
                figures = objective(embeddings_ND, batch, self.cache.labels_N, config)
            (figures.loss if share == 1 else figures.loss * share).backward()
        if is_last:
            self._update(lr)
        sums.add(figures, len(embeddings_ND))
        rows = batch.loaded.rows
        self.usage.add(*(rows if config.batch == "triplets" else (rows, rows, rows)))
        self._epoch_usage[rows] = True
        if self.upkeep is not None and config.augment == "none":
            self._unwritten.append((batch, devices.Fetched(embeddings_ND), self.progress.step))
            self._write_features(wait=config.deterministic)

    def _update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.progress.clip_norm)
        place = f"step {self.progress.step + 1} (epoch {self.progress.epoch}, learning rate {lr:.3g})"
        self._unchecked.append((place, devices.Fetched(norm)))
        self._check_norms(max_left=MAX_STEPS_UNCHECKED)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.averaged is not None:
            self.averaged.update()
        self.progress = dataclasses.replace(self.progress, step=self.progress.step + 1)

    def _check_norms(self, *, max_left: int) -> None:
        """Look at the norms of gradients that have come from the device, and wait for all but so many.

        The gradients are the workers' mean, so that all of them see one that is not finite, and see it before a
        checkpoint or the model is written.

        Raises:
            JobError: one is not finite.
        """
        while self._unchecked and (len(self._unchecked) > max_left or self._unchecked[0][1].is_there):
            place, norm = self._unchecked.popleft()
            if not np.isfinite(norm.numpy()):
                raise JobError(
                    f"the loss is not finite at {place}: the last checkpoint and the best model are intact; train with "
                    "a lower --lr, or with --precision fp32, under another --name"
                )

    def _write_features(self, *, wait: bool) -> None:
        """Give the store what has come from the device."""
        assert self.upkeep is not None
        while self._unwritten and (wait or self._unwritten[0][1].is_there):
            batch, features, step = self._unwritten.popleft()
            whole_N = ~batch.loaded.failed
            self.upkeep.store.write(batch.loaded.rows.ravel()[whole_N], features.numpy()[whole_N], step=step)
            if self.config.deterministic:
                self.upkeep.store.flush()

    def _settle(self) -> None:
        """Wait for all that the steps have left to the device."""
        self._check_norms(max_left=0)
        if self.upkeep is not None:
            self._write_features(wait=True)

    @property
    def _is_mining(self) -> bool:
        return self.upkeep is not None and self.progress.negatives != "random"

    def _fill_store(self) -> int:
        if not self._is_mining or self.upkeep is None:
            return 0
        self._tell(status="filling the feature store")
        return self.upkeep.fill(self.evaluated, self.progress.step)

    def _staleness(self) -> dict[str, float]:
        if not self._is_mining or self.upkeep is None or self.rank:
            return {}
        return self.upkeep.store.staleness(self.progress.step)

    def _refresh_store(self) -> float:
        if not self._is_mining or self.upkeep is None or not self.config.refresh_fraction:
            return 0.0
        self._tell(status="refreshing the feature store")
        began = time.perf_counter()
        used = np.flatnonzero(collective.summed(self._epoch_usage.astype(np.uint8)))
        self.upkeep.refresh(self.evaluated, self.progress.step, used, self.config.refresh_fraction)
        return time.perf_counter() - began

    def _validation_embeddings(self) -> Floats:
        if self.val_cache is None or not len(self.validation.rows_V):
            return np.empty((0, self.model.spec.embedding_dim), np.float32)
        self._tell(status="validating")
        return self.how.shared(self.validation.rows_V, self.val_cache, self.evaluated)

    def _heed_requests(self, sums: EpochSums, anchors_done: int, step: int) -> None:
        """Write a checkpoint when it is time, and leave when asked; the workers decide together."""
        if self.num_workers > 1 and step % AGREE_EVERY:
            return
        request = None
        if self.rank == 0:
            due = time.monotonic() - self.last_saved > 60 * self.config.checkpoint_minutes
            request = LEAVE if self._stop_requested() else SAVE if due else GO_ON
        request = collective.broadcast(request)
        if request == GO_ON:
            return
        self._settle()
        all_sums = dict(zip(SUM_NAMES, collective.summed(sums.values()).tolist(), strict=True))
        self._save(
            dataclasses.replace(self.progress, anchors_done=anchors_done, sums=all_sums),
            collective.summed(self.usage.counts_3N),
            self._all_suspects(),
        )
        if request == LEAVE:
            raise JobStopped

    def _must_leave(self) -> bool:
        return bool(ray.get(self.control.stop_requested.remote()))

    def _stop_requested(self) -> bool:
        """Return what the control said when it was last asked, and ask again; the step does not wait for it."""
        if self._stop_answer is None:
            self._stop_answer = self.control.stop_requested.remote()
        ready, _ = ray.wait([self._stop_answer], timeout=0)
        if not ready:
            return False
        self._stop_answer = None
        return bool(ray.get(ready[0]))

    def _all_suspects(self) -> SuspectLog:
        """Return what all workers have found, on worker 0."""
        return SuspectLog.merged(collective.gathered(self.suspects.copied()))

    def _save(self, progress: Progress, usage_3N: Counts, suspects: SuspectLog) -> None:
        """Write a checkpoint on worker 0."""
        self.last_saved = time.monotonic()
        if self.rank:
            return
        averaged = self.averaged.state_dict() if self.averaged is not None else {}
        checkpoints.write(
            self.config.run_url,
            progress,
            {
                **checkpoints.prefixed("model", self.model.state_dict()),
                **checkpoints.prefixed("averaged", averaged),
                **checkpoints.prefixed("optimizer", checkpoints.flat_optimizer(self.optimizer)),
                **checkpoints.prefixed("suspects", suspects.to_tensors()),
                "usage": torch.from_numpy(usage_3N),
                "random_state": torch.get_rng_state(),
            },
        )

    def _seed_torch(self, first_step: int) -> None:
        """Make what torch draws, such as dropout, follow from seed, epoch and worker, or from a checkpoint."""
        if self._random_state is not None and first_step and self.rank == 0:
            torch.set_rng_state(self._random_state)
        else:
            sequence = np.random.SeedSequence((self.config.seed, self.progress.epoch, self.rank, first_step))
            torch.manual_seed(int(sequence.generate_state(1)[0]))
        self._random_state = None

    def _tell(self, *, line: str = "", status: str = "") -> None:
        if self.rank == 0:
            self.control.tell.remote(line=line, status=status)


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed: the activations of every step are as large as those of the step before.

    Otherwise it gives each large block back, and the next step pays 2,000 page faults an image for it.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc alone has it
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def repeated_blocks(backbone: nn.Module) -> list[nn.Module]:
    """Return the blocks of a backbone, such as those of a ConvNeXt or a transformer; none where others hold much.

    A block is a member of a sequence of modules of one class that is not torch's own, and has none of these inside.
    """
    blocks: list[nn.Module] = []

    def collect(module: nn.Module) -> bool:
        found = False
        for child in module.children():
            found = collect(child) or found
        members = list(module.children())
        is_sequence = isinstance(module, nn.Sequential | nn.ModuleList) and len({type(each) for each in members}) == 1
        if not found and is_sequence and not type(members[0]).__module__.startswith("torch."):
            blocks.extend(members)
            return True
        return found

    collect(backbone)
    in_blocks = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    return blocks if 2 * in_blocks > sum(parameter.numel() for parameter in backbone.parameters()) else []


def _out_of_memory(config: TrainConfig, error: Exception) -> str:
    return (
        f"the GPU's memory is too small for --batch-size {config.batch_size}: take a smaller one with --accumulate, or "
        f"--checkpoint-activations ({str(error).splitlines()[0]})"
    )


def _distributed(model: EmbeddingModel, device: torch.device) -> DistributedDataParallel:
    return DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def _parameter_groups(model: EmbeddingModel, weight_decay: float) -> list[dict[str, Any]]:
    """Leave norms and biases, the parameters of one dimension, without weight decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
