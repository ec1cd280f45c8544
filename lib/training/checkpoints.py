"""Checkpoints: everything that a run needs to resume, in one file, and what the workers share in files beside it.

The files are safetensors, so loading one from a shared bucket runs nobody's code. The name contains the progress; the
newest intact file counts. The files of `checkpoint_parts` are in a folder of the same name. They are written first, so
a checkpoint whose own file exists is complete. The progress can be read without torch, which takes seconds to import.
"""

from __future__ import annotations

import json
import logging
import re
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lib import storage
from lib.errors import JobError, UserError
from lib.training.schedule import PRETRAINED_CLIP_NORM, USUAL_LR

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
FOLDER = "checkpoints"
SPEC_NAME = "spec.json"
"""In that folder: the spec of the model whose weights are in the checkpoints."""
IDENTITIES_NAME = "identities.parquet"
"""In that folder: the people of the centres, in their order."""
NUM_KEPT = 2
"""The last but one stays too, in case the last is damaged."""

TRIES = 3
FIRST_PAUSE_S = 5.0
"""A write is retried after 5 and after 10 s, because the disk may have room or the storage may answer again."""

STATE_KEY = "state"
SUFFIX = ".safetensors"

LENGTH_BYTES = 8
MAX_HEAD_BYTES = 100_000_000
"""safetensors refuses longer heads too."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is, and what its next decisions depend on."""

    epoch: int = 0
    """The present epoch, or the next one; epochs count from 1."""
    anchors_done: int = 0
    """Anchors of that epoch that all workers together have trained on."""
    step: int = 0
    """Optimiser steps since the start."""
    negatives: str = "random"
    phase_first_epoch: int = 1
    best: float | None = None
    """The best value of `--best-by` so far; more is better."""
    best_epoch: int = 0
    fixed_statistics: bool = False
    """Whether BatchNorm uses the statistics of the initial weights."""
    clip_norm: float = PRETRAINED_CLIP_NORM
    """Gradients are scaled down to this norm."""
    lr: float = USUAL_LR
    """Peak learning rate."""
    batch_size: int = 0
    """The number that `--batch-size auto` has found; 0 before that, and if the flag is a number."""
    finished: bool = False
    """No further epoch follows."""
    stage: int = 0
    """Stage of the recipe, from 0, that the optimiser's state belongs to."""
    may_freeze: bool = False
    """Whether a recipe may freeze stages: the weights are pretrained, and timm tells the backbone's stages."""
    num_centres: int = 0
    """Identities whose centres are stored beside the checkpoint."""
    num_counted: int = 0
    """Photos whose use is stored beside the checkpoint; 0 in an older one, which has it inside."""
    sums: dict[str, float] = field(default_factory=dict)
    """Sums of the present epoch so far."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded checkpoint."""

    progress: Progress
    tensors: Tensors
    """By the names given to `write`."""


def write(run_url: str, progress: Progress, tensors: Tensors) -> None:
    """Write a checkpoint and remove those before the last two.

    Raises:
        JobError: the storage is full or does not answer, after several tries; earlier checkpoints are unchanged.
    """
    write_file(run_url, name_of(progress), tensors, {STATE_KEY: json.dumps(asdict(progress))})
    _remove_but(run_url, sorted(_names(run_url))[-NUM_KEPT:])


def remove_unfinished(run_url: str) -> None:
    """Remove the parts of checkpoints that were never completed. No worker of the run may be writing."""
    _remove_but(run_url, _names(run_url))


def _remove_but(run_url: str, kept: list[str]) -> None:
    """Remove all but these checkpoints: the own file first, so that what is there is complete at any moment."""
    found = {info.path.partition("/")[0] for info in storage.list_files(storage.join(run_url, FOLDER))}
    for name in sorted(found, key=lambda name: not name.endswith(SUFFIX)):
        if _is_checkpoint(name) and name.removesuffix(SUFFIX) + SUFFIX not in kept:
            remove = storage.remove if name.endswith(SUFFIX) else storage.remove_tree
            remove(storage.join(run_url, FOLDER, name))


def write_file(run_url: str, name: str, tensors: Tensors, metadata: dict[str, str] | None = None) -> None:
    """Write one file of a checkpoint, with several tries.

    Raises:
        JobError: as `write`.
    """
    import safetensors.torch

    data = safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata=metadata
    )
    url = storage.join(run_url, FOLDER, name)
    for pause_s in (*(FIRST_PAUSE_S * 2**i for i in range(TRIES - 1)), None):
        try:
            storage.write_bytes(url, data)
            break
        except (UserError, JobError) as error:
            if pause_s is None:
                raise JobError(
                    f"no checkpoint could be written: {error}; the earlier one is intact, and the same command goes "
                    "on from it"
                ) from error
            logger.warning("no checkpoint could be written (%s); trying again in %g s", error, pause_s)
            time.sleep(pause_s)


def write_identities(run_url: str, names: pa.Array) -> None:
    """Write the people of a run's centres, in their order."""
    table = pa.table({"identity": names.cast(pa.string())})
    storage.write_parquet(storage.join(run_url, FOLDER, IDENTITIES_NAME), table)


def read_identities(run_url: str) -> pa.Array:
    """Return the people of a run's centres, in their order.

    Raises:
        UserError: the file cannot be read.
    """
    url = storage.join(run_url, FOLDER, IDENTITIES_NAME)
    return storage.read_parquet(url, [pa.field("identity", pa.string())])["identity"].combine_chunks()


def load_newest(run_url: str) -> Checkpoint:
    """Return the newest intact checkpoint.

    Raises:
        UserError: this node sees no checkpoint, or all are damaged.
    """
    import safetensors.torch

    names = sorted(_names(run_url), reverse=True)
    for name in names:
        url = storage.join(run_url, FOLDER, name)
        data = storage.read_bytes(url)
        try:
            return Checkpoint(progress=_progress(data), tensors=safetensors.torch.load(data))
        except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
            logger.warning("the checkpoint %s is damaged (%s); taking the one before", storage.redacted(url), error)
    if names:
        raise UserError(
            f"every checkpoint in {storage.redacted(storage.join(run_url, FOLDER))} is damaged: remove that folder to "
            "start again, or choose another --name"
        )
    raise UserError(
        f"this node does not see the checkpoints in {storage.redacted(run_url)}: put --data on a disk that all nodes "
        "share, or in an object store such as s3://bucket/folder"
    )


def newest_progress(run_url: str) -> Progress | None:
    """Return how far a run is, None if it has no checkpoint; reads only the head of a file."""
    for name in sorted(_names(run_url), reverse=True):
        url = storage.join(run_url, FOLDER, name)
        length = int.from_bytes(storage.read_bytes(url, LENGTH_BYTES), "little")
        try:
            return _progress(storage.read_bytes(url, LENGTH_BYTES + min(length, MAX_HEAD_BYTES)))
        except (ValueError, TypeError, KeyError):
            continue
    return None


def _progress(data: bytes) -> Progress:
    # A safetensors file starts with 8 bytes, the length of the JSON that follows.
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    head: Any = json.loads(data[LENGTH_BYTES : LENGTH_BYTES + length])
    return Progress(**json.loads(head["__metadata__"][STATE_KEY]))


def name_of(progress: Progress) -> str:
    """Return the name of a checkpoint's own file."""
    return f"epoch-{progress.epoch:06d}-step-{progress.step:010d}{SUFFIX}"


def _names(run_url: str) -> list[str]:
    found = storage.list_files(storage.join(run_url, FOLDER), suffix=SUFFIX)
    return [info.path for info in found if "/" not in info.path and _is_checkpoint(info.path)]


def _is_checkpoint(name: str) -> bool:
    """Return whether a file is a checkpoint, or a folder belongs to one."""
    return bool(re.fullmatch(r"epoch-\d{6,}-step-\d{10,}(\.safetensors)?", name))


def flat_optimizer(optimizer: torch.optim.Optimizer) -> Tensors:
    """Return the optimiser's state as named tensors, in the order of its parameters."""
    import torch

    return {
        f"{index}.{name}": value if torch.is_tensor(value) else torch.tensor(value)
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Load what `flat_optimizer` returned; the settings of the groups stay as they are."""
    state: dict[int, Tensors] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    """Return the tensors under `prefix/name`."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Tensors) -> Tensors:
    """Return the tensors whose names begin with `prefix/`, by the rest of their names."""
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}
