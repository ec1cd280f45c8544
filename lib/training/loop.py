"""The loop of a worker: epochs of training steps, validation, and the refresh of the feature store.

A worker always starts from the newest checkpoint. So a new run, a restart after a failure, another number of workers
and a resumed run all take the same path. All random draws follow from seed, epoch, worker and step.
"""

import dataclasses
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lib import device as devices
from lib import storage
from lib.training import checkpoints, collective
from lib.training.batches import EpochBatches, EpochPlan
from lib.training.centre_start import start_centres
from lib.training.centre_store import CentreStore
from lib.training.control import WorkerJob
from lib.training.embedding_passes import StoreUpkeep
from lib.training.meeting import Meeting
from lib.training.objective import EpochSums
from lib.training.recipe import of_stage, stage_of
from lib.training.record import EpochOutcome, EpochSteps, RunRecord
from lib.training.reports import Reports
from lib.training.saving import Saving, all_suspects
from lib.training.schedule import learning_rate
from lib.training.state import TrainingState
from lib.training.step import TrainingStep
from lib.training.trial_runs import compile_model, images_that_fit
from lib.training.triplets import PhotoIndex
from lib.training.validation import Figures, Validation
from lib.training.watched_pairs import WatchedPairs
from lib.training.worker_data import open_data, photo_index


class Worker:
    """One process of a run: its state, its data, and the loop over both."""

    def __init__(self, job: WorkerJob, control: Any, device: torch.device) -> None:
        """Open the crops, and load model, optimiser and counts from the newest checkpoint."""
        config = job.config
        self._job = job
        self.control = control
        self.device = device
        self.rank, self.num_workers = collective.rank(), collective.num_workers()
        devices.prepare(device, deterministic=config.run.deterministic)
        checkpoint = checkpoints.load_newest(config.run_url)
        if self.rank == 0:
            storage.remove_unfinished(config.run_url)
            checkpoints.remove_unfinished(config.run_url)
        self._reports = Reports(control, is_first=self.rank == 0)
        self._reports.status("reading the faces")
        with Meeting(control):
            self.data = open_data(config, device, job.faces_run_id, job.sources)
        self._notes = job.sources.notes if job.sources else ()
        self._saving = Saving(config, control)
        self._begin_stage(checkpoint)

    def _begin_stage(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Load a checkpoint, with the settings of the recipe's stage that its epoch belongs to."""
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
        if config.batch_size == "auto":
            self._choose_batch_size()
        self.anchors_per_step = self.config.anchors_per_step(self.index)
        self.anchors_per_epoch = config.sampling.triplets_per_epoch or len(self.data.train)
        self._hold_share()
        if self.state.centres is not None and not checkpoint.progress.num_centres:
            self._start_centres(self.state.centres)
        self.validation = Validation(self.data.val, self.config)
        self.watched = WatchedPairs(self.data.watched, self.config, decide=not self.validation.has_pairs)
        self.upkeep = StoreUpkeep.connected(job, self.data.train, self.data.embedding)
        self.step = TrainingStep(
            self.state,
            self.config,
            self.data.train.labels_N,
            device=device,
            store=self.upkeep.store if self.upkeep else None,
            identities=self.data.train.identities,
        )

    def _hold_share(self) -> None:
        """Copy the crops of this epoch's people, where the nodes do not hold all."""
        data, epoch = self.data, self.state.progress.epoch
        if data.share is None or self.state.progress.finished or data.share.epoch == epoch:
            return
        self._reports.status("copying the crops of this epoch")
        num_held = data.share.hold(epoch, Meeting(self.control))
        self.index = photo_index(data.train, self.config)
        data.share.check_batch(self.config.anchors_per_step(self.index), self.anchors_per_step)
        self.anchors_per_epoch = self.config.sampling.triplets_per_epoch or num_held

    def _start_centres(self, centres: CentreStore) -> None:
        self._reports.status("starting the centres")
        spec, data, model = self.state.model.spec, self.data, self.state.evaluated
        self._reports.line(start_centres(centres, self.config.init, spec, data.train, data.embedding, model))

    def _choose_batch_size(self) -> None:
        """Replace `--batch-size auto` by the number that an earlier start has found, or else by what fits."""
        progress = self.state.progress
        found = progress.batch_size or images_that_fit(self.state, self.config, self.device)
        self.config = self.config.with_batch_of(found)
        self.state.progress = dataclasses.replace(progress, batch_size=int(self.config.batch_size))
        self._reports.line(f"--batch-size auto: {self.config.batch_size} images")

    def close(self) -> None:
        """End the processes that decode."""
        self.data.close()

    def run(self) -> None:
        """Train the epochs that are left."""
        state = self.state
        record = self._record() if self.rank == 0 else None
        if step := state.progress.step:
            place = f"epoch {state.progress.epoch}, step {step}"
            self._reports.line(f"resuming from the checkpoint of {place}, with {self.num_workers} worker(s)")
        if not state.progress.finished:
            self.compile()
        while not state.progress.finished:
            outcome = self._epoch()
            progress = None
            if record:
                progress = record.end_epoch(state.progress, outcome, state.evaluated)
                state.best_scores_P = record.best_scores_P
            self._saving.after_epoch(state, progress, outcome.suspects, self.data.train.photos)
            if not state.progress.finished and stage_of(self._job.config, state.progress.epoch) != state.progress.stage:
                state, record = self._next_stage()
        if record:
            record.finish(state.progress)
        # Nobody leaves before the record is complete: Ray Train ends all workers with the first that fails.
        collective.broadcast(True)

    def _next_stage(self) -> tuple[TrainingState, RunRecord | None]:
        """Continue from the checkpoint just written, as a resumed run does."""
        collective.broadcast(True)  # worker 0 has written it
        self._begin_stage(checkpoints.load_newest(self.config.run_url))
        self.compile()
        self._reports.line(f"stage {self.state.progress.stage + 1} of the recipe: --loss {self.config.objective.loss}")
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
        # A start within the first epoch says them again: the row that holds them is not written yet.
        notes = [*self._notes, validation.notice] if state.progress.epoch == 1 else []
        if validation.problem:
            decider = self.watched.decider
            decided = f": the pairs of {decider} decide which epoch is kept" if decider else ""
            notes.append(validation.problem + decided)
        for note in filter(None, notes):
            record.note(note)
        return record

    def compile(self) -> None:
        """Compile the model if that saves time."""
        config = self.config
        epochs_left = config.epochs - self.state.progress.epoch + 1
        if compile_model(
            self.state,
            config,
            self.device,
            num_images=self.anchors_per_step * (3 if config.sampling.batch == "triplets" else 1),
            left=epochs_left * self.anchors_per_epoch // self.num_workers,
        ):
            self._reports.line(f"the model is compiled for this {devices.device_name(self.device)}")

    def _epoch(self) -> EpochOutcome:
        """Train the steps of an epoch that are left, and validate the model."""
        began = time.perf_counter()
        self._hold_share()
        num_filled = self._fill_store()
        steps = self.train_epoch()
        refresh_s = self.refresh_store(steps.was_used_N)
        return EpochOutcome(
            sums=steps.sums,
            figures=self._figures(),
            usage=self.state.usage.statistics(),
            suspects=all_suspects(self.state),
            staleness=self._mined.store.staleness(self.state.progress.step) if self._mined and self.rank == 0 else {},
            num_corrupt=len(self.data.train.failed_rows),
            num_filled=num_filled,
            seconds={**steps.seconds, "refresh": refresh_s, "epoch": time.perf_counter() - began},
        )

    def train_epoch(self) -> EpochSteps:
        """Do the steps of the epoch that are left."""
        config, state, progress = self.config, self.state, self.state.progress
        num_steps, accumulate = self._steps_of_an_epoch()
        anchors_a_step = self.anchors_per_step * self.num_workers
        first_step = min(num_steps, -(-progress.anchors_done // anchors_a_step))
        state.seed_torch(config.run.seed, self.rank, first_step)
        sums = EpochSums(self.device, progress.sums if self.rank == 0 else {})
        batches = self._batches(first_step, num_steps)
        began = time.perf_counter()
        self._reports.begin_epoch(progress.epoch, config.epochs, num_steps)
        self.step.begin_epoch()
        with batches:
            for number, batch in enumerate(batches, start=first_step):
                share_done = (progress.epoch - 1 + number / num_steps) / config.epochs
                is_last = (number + 1) % accumulate == 0
                lr = learning_rate(progress.lr, share_done, config.optimizer.warmup_share)
                self.step(batch, sums, lr, share=1 / accumulate, is_last=is_last)
                self._reports.step(number + 1, self.num_workers * len(batch.loaded.images), sums)
                if is_last and number + 1 < num_steps:
                    self._saving.within_epoch(state, self.step, sums, (number + 1) * anchors_a_step, number)
            self.step.settle()
        train_s = time.perf_counter() - began
        return EpochSteps(
            sums=sums.over_all_workers(),
            seconds={"train": train_s, "data_wait": batches.data_wait_s, "store_wait": batches.store_wait_s},
            was_used_N=self.step.was_used_N,
        )

    def _steps_of_an_epoch(self) -> tuple[int, int]:
        """Return how many batches a worker trains on in an epoch, and how many of them make one update."""
        num_steps = max(1, self.anchors_per_epoch // (self.anchors_per_step * self.num_workers))
        accumulate = min(self.config.sampling.accumulate, num_steps)
        return num_steps - num_steps % accumulate, accumulate

    def _batches(self, first_step: int, num_steps: int) -> EpochBatches:
        data = self.data
        if data.train.failed_rows:
            self.index = photo_index(data.train, self.config)
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
    def _mined(self) -> StoreUpkeep | None:
        """The feature store, if this epoch mines negatives from it."""
        return None if self.state.progress.negatives == "random" else self.upkeep

    def _fill_store(self) -> int:
        """Embed the photos without a stored feature, if this epoch mines; return how many there were."""
        if self._mined is None:
            return 0
        self._reports.status("filling the feature store")
        num_filled = self._mined.fill(self.state.evaluated, self.state.progress.step)
        if self.config.fills_batches_with_confusable_people(self.state.progress.negatives):
            self._mined.share_means(self.state.progress.epoch)
        return num_filled

    def refresh_store(self, was_used_N: npt.NDArray[np.bool_]) -> float:
        """Embed a share of the photos again, first those that the epoch used; return the seconds it took."""
        share = self.config.mining.refresh_fraction
        if self._mined is None or not share:
            return 0.0
        self._reports.status("refreshing the feature store")
        began = time.perf_counter()
        used = np.flatnonzero(collective.summed(was_used_N.astype(np.uint8)))
        self._mined.refresh(self.state.evaluated, self.state.progress.step, used, share)
        return time.perf_counter() - began

    def _figures(self) -> Figures:
        """Embed the validation photos and the pairs of files, and return the figures of the model."""
        model = self.state.evaluated
        embeddings_VD = np.empty((0, model.spec.embedding_dim), np.float32)
        if self.data.val is not None and len(self.validation.rows_V):
            self._reports.status("validating")
            embeddings_VD = self.data.embedding.shared(self.validation.rows_V, self.data.val, model)
        figures = self.validation.figures(embeddings_VD, self.state.progress.negatives)
        return self.watched.added(figures, self.data.embedding, model)
