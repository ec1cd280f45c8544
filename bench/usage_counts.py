"""What do the counts of how often photos were used cost a worker, at a start and at a checkpoint?

    python -m bench.usage_counts --photos 20000000 --workers 1 8

Each measurement has a process of its own, for its peak of memory: the first worker of so many reads and writes its part
of the counts. `inside` reads a checkpoint as it was before, with all counts in its own file.
"""

import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import tyro

from lib.training import checkpoints, collective
from lib.training.checkpoints import Checkpoint, Progress
from lib.training.usage import UsageCounter, loaded_usage


@dataclass(frozen=True, kw_only=True)
class Flags:
    """How much."""

    photos: int = 20_000_000
    workers: tuple[int, ...] = (1, 8)


def peak_mb() -> float:
    """Return the peak of this process's memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write(folder: str, photos: int) -> None:
    """Write both kinds of checkpoint: all counts in parts, and all inside."""
    counter = UsageCounter(photos)
    counter.add(*np.random.default_rng(0).integers(photos, size=(3, 1_000_000)))
    counter.save(f"{folder}/parts", Progress(epoch=1, num_counted=photos))
    checkpoints.write(f"{folder}/inside", Progress(epoch=1), {"usage": torch.from_numpy(counter.counts_3M)})


def read_parts(folder: str, photos: int, num_workers: int) -> dict[str, float]:
    """Read and write the counts as the first of so many workers."""
    collective.num_workers = lambda: num_workers
    progress = Progress(epoch=1, num_counted=photos)
    began = time.perf_counter()
    counter = loaded_usage(f"{folder}/parts", Checkpoint(progress=progress, tensors={}), photos)
    read_s, read_mb = time.perf_counter() - began, peak_mb()
    collective.num_workers = lambda: 1  # there is nobody to tell
    began = time.perf_counter()
    counter.save(f"{folder}/parts", Progress(epoch=2, num_counted=photos))
    return {"read_s": read_s, "read_peak_mb": read_mb, "write_s": time.perf_counter() - began, "peak_mb": peak_mb()}


def read_inside(folder: str, photos: int, _: int) -> dict[str, float]:
    """Read all counts, as every worker did."""
    began = time.perf_counter()
    loaded_usage(f"{folder}/inside", checkpoints.load_newest(f"{folder}/inside"), photos)
    return {"read_s": time.perf_counter() - began, "read_peak_mb": peak_mb()}


def alone(sender: Connection, measure: Callable[..., dict[str, float]], *arguments: Any) -> None:
    """Measure in this process, and send what grew."""
    before = peak_mb()
    found = measure(*arguments)
    sender.send({name: round(value - before if name.endswith("mb") else value, 2) for name, value in found.items()})


def main() -> None:
    """Measure and print."""
    flags = tyro.cli(Flags, description=__doc__)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        writer = context.Process(target=write, args=(folder, flags.photos))
        writer.start()
        writer.join()
        for measure, num_workers in ((read_inside, 1), *((read_parts, each) for each in flags.workers)):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=alone, args=(sender, measure, folder, flags.photos, num_workers))
            process.start()
            found = receiver.recv()
            process.join()
            print(json.dumps({"bench": "usage_counts", "photos": flags.photos, "workers": num_workers,
                              "kind": measure.__name__, **found}))  # fmt: skip


if __name__ == "__main__":
    main()
