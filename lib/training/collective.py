"""Communication between the workers of a run, on the CPU by gloo; it also works for a single worker.

Every function has to be called by every worker, in the same order.
"""

import gc
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

Value = TypeVar("Value")
Number = TypeVar("Number", bound=np.generic)


def num_workers() -> int:
    """Return how many workers there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this worker, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def broadcast(value: Value | None) -> Value:
    """Return worker 0's value on all workers; the others pass None."""
    values = [value]
    if num_workers() > 1:
        dist.broadcast_object_list(values, src=0)
    assert values[0] is not None
    return values[0]


def summed(values: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """Return the sum over the workers of arrays of one shape and type."""
    if num_workers() == 1:
        return values
    total = torch.from_numpy(values.copy())
    dist.all_reduce(total)
    return total.numpy()


def wait_for_all() -> None:
    """Return when all workers have come here. A broadcast does not do that: it waits for the first worker alone."""
    summed(np.ones(1))


def exchanged(rows_XK: npt.NDArray[np.integer], counts_W: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    """Return the rows [Y, K] that all workers have for this one. Of the own rows the first worker gets the first
    `counts_W[0]`, the second the next `counts_W[1]`, …
    """
    if num_workers() == 1:
        return rows_XK
    given = torch.from_numpy(counts_W.astype(np.int64))
    taken = torch.empty_like(given)
    dist.all_to_all_single(taken, given)
    received = torch.empty((int(taken.sum()), rows_XK.shape[1]), dtype=torch.int64)
    dist.all_to_all_single(received, torch.from_numpy(rows_XK), taken.tolist(), given.tolist())
    return received.numpy()


def in_turn(mine_MK: npt.NDArray[Number]) -> list[npt.NDArray[Number]] | None:
    """Return the rows of all workers on worker 0, one worker after the other, and None on the others."""
    if num_workers() == 1:
        return [mine_MK]
    mine = torch.from_numpy(np.ascontiguousarray(mine_MK))
    lengths = [torch.empty(1, dtype=torch.int64) for _ in range(num_workers())]
    dist.all_gather(lengths, torch.tensor([len(mine)]))
    if rank():
        if len(mine):
            dist.send(mine, dst=0)
        return None
    parts = [mine.numpy()]
    for source, length in enumerate(lengths[1:], start=1):
        part = torch.empty((int(length), *mine.shape[1:]), dtype=mine.dtype)
        if len(part):
            dist.recv(part, src=source)
        parts.append(part.numpy())
    return parts


def interleaved(mine_MD: npt.NDArray[np.float32], num_rows: int) -> npt.NDArray[np.float32]:
    """Return all rows [N, D] where worker r of W holds rows r, r + W, r + 2 W, …"""
    world = num_workers()
    if world == 1:
        return mine_MD
    longest = -(-num_rows // world)
    padded = np.zeros((longest, *mine_MD.shape[1:]), np.float32)
    padded[: len(mine_MD)] = mine_MD
    parts = [torch.empty(padded.shape) for _ in range(world)]
    dist.all_gather(parts, torch.from_numpy(padded))
    return torch.stack(parts, dim=1).flatten(0, 1)[:num_rows].numpy()


def from_all(value: Value) -> list[Value]:
    """Return the values of all workers on every worker."""
    values: list[Value] = [value] * num_workers()
    if num_workers() > 1:
        dist.all_gather_object(values, value)
    return values


def gathered(value: Value) -> list[Value]:
    """Return the values of all workers on worker 0, and an empty list on the others."""
    if num_workers() == 1:
        return [value]
    values: list[Value] | None = [value] * num_workers() if rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []


def hang_up() -> None:
    """Leave the group. Workers that wait for this one get a RuntimeError."""
    gc.collect()  # otherwise a model in training keeps the connections open
    if dist.is_initialized():
        dist.destroy_process_group()
