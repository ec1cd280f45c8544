"""The parts of a checkpoint beside its own file: the centres of identities, and how often photos were used.

Each worker writes what it owns, and reads what it owns of what any number of workers have written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lib import storage
from lib.errors import UserError
from lib.training.checkpoints import FOLDER, SUFFIX, Progress, name_of, write_file

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]


def write_centres(run_url: str, progress: Progress, start: int, tensors: Tensors) -> None:
    """Write the tensors of consecutive identities from `start` on; `checkpoints.write` then completes the checkpoint.

    Raises:
        JobError: as `checkpoints.write`.
    """
    num = len(next(iter(tensors.values())))
    write_file(run_url, _part(progress, f"centres-{start:012d}-{start + num:012d}"), tensors)


def read_centres(run_url: str, progress: Progress, identities: range) -> Iterator[tuple[int, Tensors]]:
    """Yield the first identity and the tensors of each part with some of the identities, one at a time.

    Raises:
        UserError: a part is damaged, or some are missing.
    """
    folder = _folder(run_url, progress)
    reached = identities.start
    for info in storage.list_files(folder, suffix=SUFFIX):
        found = re.fullmatch(r"centres-(\d{12,})-(\d{12,})\.safetensors", info.path)
        start, stop = (int(number) for number in found.groups()) if found else (0, 0)
        if start >= identities.stop or stop <= identities.start:
            continue
        tensors = _read(storage.join(folder, info.path), _advice(folder))
        if start > reached or any(len(tensor) != stop - start for tensor in tensors.values()):
            break
        yield start, tensors
        reached = stop
    if reached < identities.stop:
        raise UserError(f"{storage.redacted(folder)} lacks the centres of identity {reached}: {_advice(folder)}")


def write_usage(run_url: str, progress: Progress, block: int, counts: torch.Tensor) -> None:
    """Write the counts of a block of photos. Its name does not depend on the number of workers.

    Raises:
        JobError: as `checkpoints.write`.
    """
    write_file(run_url, _part(progress, _usage_name(block)), {"counts": counts})


def read_usage(run_url: str, progress: Progress, block: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the counts of a block of photos, of this shape.

    Raises:
        UserError: the part is damaged or missing.
    """
    folder = _folder(run_url, progress)
    url = storage.join(folder, _usage_name(block) + SUFFIX)
    if not storage.exists(url):
        raise UserError(f"{storage.redacted(url)} is gone, which counts the use of photos: {_advice(folder)}")
    counts = _read(url, _advice(folder)).get("counts")
    if counts is None or counts.shape != shape:
        raise UserError(f"{storage.redacted(url)} counts other photos than those of the run: {_advice(folder)}")
    return counts


def _read(url: str, advice: str) -> Tensors:
    import safetensors.torch

    try:
        return safetensors.torch.load(storage.read_bytes(url))
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(f"{storage.redacted(url)} is damaged ({error}): {advice}") from error


def _usage_name(block: int) -> str:
    return f"usage-{block:06d}"


def _part(progress: Progress, name: str) -> str:
    return storage.join(name_of(progress).removesuffix(SUFFIX), name + SUFFIX)


def _folder(run_url: str, progress: Progress) -> str:
    return storage.join(run_url, FOLDER, name_of(progress).removesuffix(SUFFIX))


def _advice(folder: str) -> str:
    return f"remove {storage.redacted(folder)}{SUFFIX}, and the run goes on from the checkpoint before"
