"""Checkpoints: everything that a run needs to go on, in one file, written whole or not at all.

A file is safetensors, so that loading one from a bucket that others write to runs nobody's code. Its name says how far
the training was; the newest whole one counts. How far a run is can be read without torch, which takes seconds to load.
"""

from __future__ import annotations

import json
import logging
import re
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

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
"""In that folder: what the model is whose weights the checkpoints hold."""
NUM_KEPT = 2
"""The one before the last stays, in case the last one is damaged."""

TRIES = 3
FIRST_PAUSE_S = 5.0
"""A full disk may be cleared, a storage may come back: a checkpoint is tried again after 5 and after 10 s."""

STATE_KEY = "state"

LENGTH_BYTES = 8
MAX_HEAD_BYTES = 100_000_000
"""Longer heads than this are refused by safetensors too."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is, and what its next decisions depend on."""

    epoch: int = 0
    """The epoch that is under way, or comes next; epochs count from 1."""
    anchors_done: int = 0
    """Anchors of that epoch that were trained on, all workers together."""
    step: int = 0
    """Optimiser steps since the beginning."""
    negatives: str = "random"
    phase_first_epoch: int = 1
    best: float | None = None
    """The best value of `--best-by` so far; more is better."""
    best_epoch: int = 0
    fixed_statistics: bool = False
    """Whether BatchNorm goes by the statistics that came with the initial weights."""
    clip_norm: float = PRETRAINED_CLIP_NORM
    """Norm that gradients are scaled down to."""
    lr: float = USUAL_LR
    """Peak learning rate."""
    batch_size: int = 0
    """What `--batch-size auto` has found; 0 before that, and where the flag says a number."""
    finished: bool = False
    """No further epoch follows."""
    sums: dict[str, float] = field(default_factory=dict)
    """What the epoch under way has added up."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded checkpoint."""

    progress: Progress
    tensors: Tensors
    """By the names that were given to `write`."""


def write(run_url: str, progress: Progress, tensors: Tensors) -> None:
    """Write a checkpoint and remove those before the last two.

    Raises:
        JobError: the storage is full or away, after several tries; earlier checkpoints are as they were.
    """
    import safetensors.torch

    data = safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        metadata={STATE_KEY: json.dumps(asdict(progress))},
    )
    url = storage.join(run_url, FOLDER, _name(progress))
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
    for name in sorted(_names(run_url))[:-NUM_KEPT]:
        storage.remove(storage.join(run_url, FOLDER, name))


def load_newest(run_url: str) -> Checkpoint | None:
    """Return the newest whole checkpoint, None where there is none.

    Raises:
        UserError: there are checkpoints, but all are damaged.
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
    return None


def newest_progress(run_url: str) -> Progress | None:
    """Return how far a run is, None where it has no checkpoint; only the head of a file is read."""
    for name in sorted(_names(run_url), reverse=True):
        url = storage.join(run_url, FOLDER, name)
        length = int.from_bytes(storage.read_bytes(url, LENGTH_BYTES), "little")
        try:
            return _progress(storage.read_bytes(url, LENGTH_BYTES + min(length, MAX_HEAD_BYTES)))
        except (ValueError, TypeError, KeyError):
            continue
    return None


def _progress(data: bytes) -> Progress:
    # The head of a safetensors file is 8 bytes of length and so much JSON.
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    head: Any = json.loads(data[LENGTH_BYTES : LENGTH_BYTES + length])
    return Progress(**json.loads(head["__metadata__"][STATE_KEY]))


def _name(progress: Progress) -> str:
    return f"epoch-{progress.epoch:06d}-step-{progress.step:010d}.safetensors"


def _names(run_url: str) -> list[str]:
    found = storage.list_files(storage.join(run_url, FOLDER), suffix=".safetensors")
    return [info.path for info in found if re.fullmatch(r"epoch-\d{6,}-step-\d{10,}\.safetensors", info.path)]


def flat_optimizer(optimizer: torch.optim.Optimizer) -> Tensors:
    """Return the optimiser's state as named tensors, in the order of its parameters."""
    import torch

    return {
        f"{index}.{name}": value if torch.is_tensor(value) else torch.tensor(value)
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Put back what `flat_optimizer` returned; the settings of the groups stay as they are."""
    state: dict[int, Tensors] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    """Return the tensors under `prefix/name`."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Tensors) -> Tensors:
    """Return those of the tensors that stand under `prefix/`, by their own names."""
    return {name.removeprefix(f"{prefix}/"): t for name, t in tensors.items() if name.startswith(f"{prefix}/")}
