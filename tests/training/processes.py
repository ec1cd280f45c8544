"""Processes of a group of workers, as a distributed training has them."""

import multiprocessing
from collections.abc import Callable

# The workers are forked from one process that has imported what takes seconds, and has no threads.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed", "lib.training.centre_store", "lib.training.usage", "pytest"])

LIMIT_S = 150.0


def run_workers(work: Callable[..., None], num_workers: int, *arguments: object) -> None:
    """Run `work(rank, *arguments)` in a process for each rank, and wait for their ends."""
    workers = [_context.Process(target=work, args=(rank, *arguments)) for rank in range(num_workers)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=LIMIT_S)
        assert worker.exitcode == 0
