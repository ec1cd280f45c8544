"""The data of a worker: the crops of its node's cache, and the threads or processes that decode them."""

import contextlib
import os
from dataclasses import dataclass

import torch

from lib import device as devices
from lib.training.cache_building import NoFacesError
from lib.training.cache_files import default_folder
from lib.training.decoders import Decoders
from lib.training.embedding_passes import EmbeddingPass
from lib.training.face_cache import FaceCache
from lib.training.node_share import NodeShare, open_train
from lib.training.set_cache import SetFaces
from lib.training.settings import TrainConfig
from lib.training.table_crops import cached_faces, cached_set
from lib.training.triplets import PhotoIndex
from lib.training.validation_sources import PairGroup, TableFaces, ValidationSources, own_people

MAX_LOADER_THREADS, MAX_LOADER_PROCESSES = 8, 16


@dataclass(frozen=True, kw_only=True)
class WorkerData:
    """The photos of a run, and how this worker loads and embeds them."""

    train: FaceCache
    share: NodeShare | None
    """What gives `train` the crops of an epoch, where this node does not hold all."""
    val: FaceCache | None
    """None if no photo of a validation person is aligned."""
    watched: list[tuple[PairGroup, FaceCache]]
    """The groups of files with pairs, each with its faces."""
    num_threads: int
    decoders: Decoders | None
    """Processes that decode for a GPU; a CPU's threads do it themselves."""
    upload: devices.Upload
    embedding: EmbeddingPass

    def close(self) -> None:
        """End the processes that decode."""
        if self.decoders is not None:
            self.decoders.close()


def open_data(
    config: TrainConfig,
    device: torch.device,
    faces_run_id: str | None = None,
    sources: ValidationSources | None = None,
) -> WorkerData:
    """Copy the crops of this version of the table to this node, unless it has them, and start the decoders.

    Without `sources`, the validation people are those of the table.

    Raises:
        UserError: no crop to train on, or a part of the table is damaged.
    """
    folder = config.run.cache_dir or default_folder()
    train, share = open_train(config, folder, faces_run_id)
    sources = sources or own_people(config, faces_run_id)
    val = None
    # Other errors are raised: training would hide a damaged part, which other nodes may not notice.
    with contextlib.suppress(NoFacesError):
        val = _open(sources.people, folder)
    watched = [(group, _open(group.faces, folder)) for group in sources.groups]
    num_cpus = int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))
    num_threads = config.run.loader_threads or min(MAX_LOADER_THREADS, num_cpus)
    decoders = None
    if device.type == "cuda":
        decoders = Decoders(config.run.loader_threads or min(MAX_LOADER_PROCESSES, num_cpus))
    return WorkerData(
        train=train,
        share=share,
        val=val,
        watched=watched,
        num_threads=num_threads,
        decoders=decoders,
        upload=devices.Upload(device),
        embedding=EmbeddingPass(
            device=device,
            precision=devices.chosen_precision(config.run.precision, device),
            num_threads=num_threads,
            decoders=decoders,
        ),
    )


def photo_index(cache: FaceCache, config: TrainConfig) -> PhotoIndex:
    """Return the photos that batches are drawn from: those that can be decoded and that this node holds.

    Raises:
        UserError: there are too few.
    """
    held_N = None if cache.held is None else cache.held.rows_N
    failed = sorted(cache.failed_rows)
    return PhotoIndex(cache.labels_N, excluded_rows=failed, held_N=held_N, needs_pairs=config.needs_pairs)


def _open(faces: TableFaces | SetFaces, folder: str) -> FaceCache:
    if isinstance(faces, SetFaces):
        return cached_set(faces, folder)
    return cached_faces(faces.url, faces.splits, folder, only=faces.only, run_id=faces.run_id)
