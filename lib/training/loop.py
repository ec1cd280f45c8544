"""What each worker does: epochs of steps, validation, the feature store's upkeep, checkpoints; worker 0 also writes.

A worker that starts takes the newest checkpoint, so a beginning, a restart after a failure, another number of workers
and a run that was stopped are one and the same path. Every draw follows from seed, epoch, worker and step.
"""

import contextlib
import ctypes
import dataclasses
import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch

from lib import device as devices
from lib import storage
from lib.errors import JobError, JobStopped, UserError
from lib.terminal import send_log_to_driver
from lib.training import checkpoints, collective
from lib.training.batches import EpochBatches, EpochPlan
from lib.training.centre_start import start_centres
from lib.training.centre_store import CentreStore
from lib.training.control import StopRequests, WorkerJob, connect_control
from lib.training.embedding_passes import StoreUpkeep
from lib.training.feature_store import FeatureStore
from lib.training.objective import SUM_NAMES, EpochSums
from lib.training.recipe import of_stage, stage_of
from lib.training.record import EpochOutcome, RunRecord
from lib.training.schedule import learning_rate
from lib.training.settings import TrainConfig
from lib.training.state import TrainingState
from lib.training.step import TrainingStep
from lib.training.suspects import SuspectLog
from lib.training.trial_runs import compile_model, images_that_fit
from lib.training.triplets import PhotoIndex
from lib.training.validation import Figures, Validation
from lib.training.watched_pairs import WatchedPairs
from lib.training.worker_data import open_data

logger = logging.getLogger(__name__)

AGREE_EVERY = 4
"""Steps between two questions of several workers whether to write a checkpoint or to leave."""

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of malloc.h."""

GO_ON, SAVE, LEAVE = "go on", "save", "leave"

TELL_EVERY_S = 0.5

Floats = npt.NDArray[np.float32]


def work(job: WorkerJob, device: torch.device) -> None:
    """Do the part of this process, on its own or beside others in torch's process group."""
    send_log_to_driver()
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


@dataclass(frozen=True, kw_only=True)
class EpochSteps:
    """What the steps of an epoch add up to."""

    sums: dict[str, float]
    """Over all workers, by `lib.training.objective.SUM_NAMES`."""
    seconds: dict[str, float]
    """Of this worker: train, and of these data_wait (for crops) and store_wait."""
    was_used_N: npt.NDArray[np.bool_]
    """Which photos this worker trained on."""


class Worker:
    """One process of a run: a state, the data, and the loop over both."""

    def __init__(self, job: WorkerJob, control: Any, device: torch.device) -> None:
        """Open the crops, and take model, optimiser and counts from the newest checkpoint."""
        config = job.config
        self._job = job
        self.control = control
        self.device = device
        self.rank, self.num_workers = collective.rank(), collective.num_workers()
        devices.prepare(device, deterministic=config.run.deterministic)
        if device.type == "cpu":
            _keep_freed_memory()
        checkpoint = checkpoints.load_newest(config.run_url)
        if checkpoint is None:
            raise UserError(
                f"this node does not see the checkpoints in {storage.redacted(config.run_url)}: a local --data has "
                "to be a disk that all nodes share, or an object store such as s3://bucket/folder"
            )
        if self.rank == 0:
            storage.remove_unfinished(config.run_url)
        self._tell(status="reading the faces")
        self.data = open_data(config, device, job.faces_run_id, job.sources)
        self._notes = job.sources.notes if job.sources else ()
        self._requests = StopRequests(control)
        self._last_saved = time.monotonic()
        self._begin_stage(checkpoint)

    def _begin_stage(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Take up a checkpoint with the settings of the stage that its epoch belongs to."""
        job, device = self._job, self.device
        self.config = config = of_stage(job.config, checkpoint.progress)
        self.index = PhotoIndex(self.data.train.labels_N, needs_pairs=config.needs_pairs)
        self.state = TrainingState(
            config,
            job.spec,
            checkpoint,
            device=device,
            num_photos=len(self.data.train),
            is_first=self.rank == 0,
            num_identities=len(self.data.train.identities),
            stage=stage_of(job.config, checkpoint.progress.epoch),
        )
        if self.state.centres is not None and not checkpoint.progress.num_centres:
            self._start_centres(self.state.centres)
        if config.batch_size == "auto":
            self._choose_batch_size()
        self.validation = Validation(self.data.val, self.config)
        self.watched = WatchedPairs(self.data.watched, self.config, decide=not self.validation.has_pairs)
        self.upkeep = self._upkeep(job)
        self.step = TrainingStep(
            self.state,
            self.config,
            self.data.train.labels_N,
            device=device,
            store=self.upkeep.store if self.upkeep else None,
            identities=self.data.train.identities,
        )
        self.anchors_per_step = self.config.anchors_per_step(self.index)
        self.anchors_per_epoch = config.sampling.triplets_per_epoch or len(self.data.train)

    def _start_centres(self, centres: CentreStore) -> None:
        self._tell(status="starting the centres")
        spec, data, model = self.state.model.spec, self.data, self.state.evaluated
        note = start_centres(centres, self.config.init, spec, data.train, data.embedding, model)
        self._tell(line=note)

    def _choose_batch_size(self) -> None:
        """Put a number in the place of `--batch-size auto`: what an earlier start has found, or what fits."""
        progress = self.state.progress
        found = progress.batch_size or images_that_fit(self.state, self.config, self.device)
        self.config = self.config.with_batch_of(found)
        self.state.progress = dataclasses.replace(progress, batch_size=int(self.config.batch_size))
        self._tell(line=f"--batch-size auto: {self.config.batch_size} images")

    def _upkeep(self, job: WorkerJob) -> StoreUpkeep | None:
        if not job.num_shards:
            return None
        store = FeatureStore.connect(
            job.config.run_url, self.data.train.labels_N, dim=job.spec.embedding_dim, num_shards=job.num_shards
        )
        return StoreUpkeep(store=store, cache=self.data.train, embedding=self.data.embedding)

    def close(self) -> None:
        """End the processes that decode."""
        self.data.close()

    def run(self) -> None:
        """Train the epochs that are left."""
        state = self.state
        record = self._record() if self.rank == 0 else None
        if state.progress.step:
            place = f"epoch {state.progress.epoch}, step {state.progress.step}"
            self._tell(line=f"going on from the checkpoint of {place}, with {self.num_workers} worker(s)")
        if not state.progress.finished:
            self.compile()
        while not state.progress.finished:
            outcome = self._epoch()
            progress = None
            if record:
                progress = record.end_epoch(state.progress, outcome, state.evaluated)
                state.best_scores_P = record.best_scores_P
            state.progress, is_leaving = collective.broadcast(
                None if progress is None else (progress, self._requests.is_asked())
            )
            self._save(state.progress, outcome.usage_3N, outcome.suspects)
            if is_leaving and not state.progress.finished:
                raise JobStopped  # all is in the checkpoint just written
            if not state.progress.finished and stage_of(self._job.config, state.progress.epoch) != state.progress.stage:
                state, record = self._next_stage()
        if record:
            record.finish(state.progress)
        # Nobody leaves before the record stands: Ray Train ends all workers with the first that fails.
        collective.broadcast(True)

    def _next_stage(self) -> tuple[TrainingState, RunRecord | None]:
        """Go on from the checkpoint just written, as a new start of the run does."""
        collective.broadcast(True)  # worker 0 has written it
        checkpoint = checkpoints.load_newest(self.config.run_url)
        assert checkpoint is not None
        self._begin_stage(checkpoint)
        self.compile()
        self._tell(line=f"stage {self.state.progress.stage + 1} of the recipe: --loss {self.config.objective.loss}")
        return self.state, self._record() if self.rank == 0 else None

    def _record(self) -> RunRecord:
        state, validation = self.state, self.validation
        record = RunRecord(
            self.config,
            state.progress,
            self.data.train,
            self.control,
            ahead=self.watched.ahead if self.watched.decider else validation.ahead,
            best_scores_P=state.best_scores_P,
        )
        for note in () if state.progress.step else self._notes:
            record.note(note)
        if validation.problem:
            decider = self.watched.decider
            record.note(validation.problem + (f": the pairs of {decider} say which epoch is kept" if decider else ""))
        elif validation.notice and not state.progress.step:
            record.note(validation.notice)
        return record

    def compile(self) -> None:
        """Compile the model where that pays."""
        config = self.config
        epochs_left = config.epochs - self.state.progress.epoch + 1
        is_compiled = compile_model(
            self.state,
            config,
            self.device,
            num_images=self.anchors_per_step * (3 if config.sampling.batch == "triplets" else 1),
            left=epochs_left * self.anchors_per_epoch // self.num_workers,
        )
        if is_compiled:
            self._tell(line=f"the model is compiled for this {devices.device_name(self.device)}")

    def _epoch(self) -> EpochOutcome:
        """Train the steps of an epoch that are left, and measure the model."""
        began = time.perf_counter()
        num_filled = self._fill_store()
        steps = self.train_epoch()
        refresh_s = self.refresh_store(steps.was_used_N)
        return EpochOutcome(
            sums=steps.sums,
            figures=self._figures(),
            usage_3N=collective.summed(self.state.usage.counts_3N),
            suspects=self._all_suspects(),
            staleness=self._staleness(),
            num_corrupt=len(self.data.train.failed_rows),
            num_filled=num_filled,
            seconds={**steps.seconds, "refresh": refresh_s, "epoch": time.perf_counter() - began},
        )

    def train_epoch(self) -> EpochSteps:
        """Do the steps of the epoch that are left."""
        config, state = self.config, self.state
        progress = state.progress
        num_steps, accumulate = self._steps_of_an_epoch()
        anchors_a_step = self.anchors_per_step * self.num_workers
        first_step = min(num_steps, -(-progress.anchors_done // anchors_a_step))
        state.seed_torch(config.run.seed, self.rank, first_step)
        sums = EpochSums(self.device, progress.sums if self.rank == 0 else {})
        batches = self._batches(first_step, num_steps)
        began = time.perf_counter()
        told, loss = 0.0, devices.Fetched(torch.zeros(()))
        self.step.begin_epoch()
        with batches:
            for number, batch in enumerate(batches, start=first_step):
                share_done = (progress.epoch - 1 + number / num_steps) / config.epochs
                is_last = (number + 1) % accumulate == 0
                lr = learning_rate(progress.lr, share_done, config.optimizer.warmup_share)
                self.step(batch, sums, lr, share=1 / accumulate, is_last=is_last)
                if time.perf_counter() - told > TELL_EVERY_S:
                    # A GPU is not waited for: what is told is the loss of the last time.
                    note = f"loss {float(loss.numpy()):.4f}" if told and loss.is_there else ""
                    told, loss = time.perf_counter(), devices.Fetched(sums.loss)
                    self._tell_progress(number + 1, num_steps, len(batch.loaded.images), note)
                if is_last and number + 1 < num_steps:
                    self._save_or_leave_when_asked(sums, (number + 1) * anchors_a_step, number)
            self.step.settle()
        return EpochSteps(
            sums=_over_all_workers(sums),
            seconds={
                "train": time.perf_counter() - began,
                "data_wait": batches.data_wait_s,
                "store_wait": batches.store_wait_s,
            },
            was_used_N=self.step.was_used_N,
        )

    def _steps_of_an_epoch(self) -> tuple[int, int]:
        """Return the batches of an epoch for each worker, and how many of them make one update."""
        num_steps = max(1, self.anchors_per_epoch // (self.anchors_per_step * self.num_workers))
        accumulate = min(self.config.sampling.accumulate, num_steps)
        return num_steps - num_steps % accumulate, accumulate

    def _batches(self, first_step: int, num_steps: int) -> EpochBatches:
        data = self.data
        if data.train.failed_rows:
            failed = sorted(data.train.failed_rows)
            self.index = PhotoIndex(data.train.labels_N, excluded_rows=failed, needs_pairs=self.config.needs_pairs)
        plan = EpochPlan(
            config=self.config,
            epoch=self.state.progress.epoch,
            rank=self.rank,
            first_step=first_step,
            num_steps=num_steps,
            negatives=self.state.progress.negatives,
            num_workers=self.num_workers,
        )
        return EpochBatches(
            plan,
            data.train,
            self.index,
            image_size=self.state.model.spec.image_size,
            num_threads=data.num_threads,
            store=self.upkeep.store if self.upkeep else None,
            suspects=self.state.suspects,
            decoders=data.decoders,
            upload=data.upload,
        )

    @property
    def _is_mining(self) -> bool:
        return self.upkeep is not None and self.state.progress.negatives != "random"

    def _fill_store(self) -> int:
        """Embed the photos without a stored feature where the epoch mines; return how many there were."""
        if not self._is_mining or self.upkeep is None:
            return 0
        self._tell(status="filling the feature store")
        return self.upkeep.fill(self.state.evaluated, self.state.progress.step)

    def refresh_store(self, was_used_N: npt.NDArray[np.bool_]) -> float:
        """Embed again a share of the photos, those that the epoch used before others; return the seconds it took."""
        if not self._is_mining or self.upkeep is None or not self.config.mining.refresh_fraction:
            return 0.0
        self._tell(status="refreshing the feature store")
        began = time.perf_counter()
        used = np.flatnonzero(collective.summed(was_used_N.astype(np.uint8)))
        state = self.state
        self.upkeep.refresh(state.evaluated, state.progress.step, used, self.config.mining.refresh_fraction)
        return time.perf_counter() - began

    def _staleness(self) -> dict[str, float]:
        if not self._is_mining or self.upkeep is None or self.rank:
            return {}
        return self.upkeep.store.staleness(self.state.progress.step)

    def _validation_embeddings(self) -> Floats:
        if self.data.val is None or not len(self.validation.rows_V):
            return np.empty((0, self.state.model.spec.embedding_dim), np.float32)
        self._tell(status="validating")
        return self.data.embedding.shared(self.validation.rows_V, self.data.val, self.state.evaluated)

    def _figures(self) -> Figures:
        figures = self.validation.figures(self._validation_embeddings(), self.state.progress.negatives)
        return self.watched.added(figures, self.data.embedding, self.state.evaluated)

    def _save_or_leave_when_asked(self, sums: EpochSums, anchors_done: int, step: int) -> None:
        """Write a checkpoint when it is time, and leave when asked; the workers decide together."""
        if self.num_workers > 1 and step % AGREE_EVERY:
            return
        request = None
        if self.rank == 0:
            due = time.monotonic() - self._last_saved > 60 * self.config.run.checkpoint_minutes
            request = LEAVE if self._requests.was_asked() else SAVE if due else GO_ON
        request = collective.broadcast(request)
        if request == GO_ON:
            return
        self.step.settle()
        all_sums, usage_3N = _over_all_workers(sums), collective.summed(self.state.usage.counts_3N)
        suspects = self._all_suspects()
        progress = dataclasses.replace(self.state.progress, anchors_done=anchors_done, sums=all_sums)
        self._save(progress, usage_3N, suspects)
        if request == LEAVE:
            raise JobStopped

    def _all_suspects(self) -> SuspectLog:
        """Return what all workers have found, on worker 0."""
        return SuspectLog.merged(collective.gathered(self.state.suspects.copied()))

    def _save(self, progress: checkpoints.Progress, usage_3N: npt.NDArray[np.int32], suspects: SuspectLog) -> None:
        self.state.save(self.config.run_url, progress, usage_3N, suspects)
        self._last_saved = time.monotonic()

    def _tell_progress(self, num_done: int, num_steps: int, images_a_batch: int, note: str) -> None:
        if self.rank:
            return
        epoch, epochs = self.state.progress.epoch, self.config.epochs
        self._tell(status=f"epoch {epoch}/{epochs}, step {num_done}/{num_steps}")
        images_a_step = self.num_workers * images_a_batch
        done, total = (epoch - 1) * num_steps + num_done, epochs * num_steps
        self.control.count.remote(done * images_a_step, total * images_a_step, note)

    def _tell(self, *, line: str = "", status: str = "") -> None:
        if self.rank == 0:
            self.control.tell.remote(line=line, status=status)


def _over_all_workers(sums: EpochSums) -> dict[str, float]:
    return dict(zip(SUM_NAMES, collective.summed(sums.values()).tolist(), strict=True))


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed: the activations of every step are as large as those of the step before.

    Otherwise it gives each large block back, and the next step pays 2,000 page faults an image for it.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc alone has it
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _out_of_memory(config: TrainConfig, error: Exception) -> str:
    return (
        f"the GPU's memory is too small for --batch-size {config.batch_size}: take a smaller one with --accumulate, or "
        f"--checkpoint-activations ({str(error).splitlines()[0]})"
    )
