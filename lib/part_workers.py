"""Parts run by workers of Ray Data: a worker takes an item, writes its files, and returns one row about it."""

import logging
import os
import platform
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NoReturn

from lib import cluster
from lib.errors import JobError, UserError
from lib.progress import ProgressLine
from lib.terminal import send_log_to_driver

logger = logging.getLogger(__name__)

TRIES_OF_A_PART = 10
"""A worker that dies is replaced; one that always dies over the same part would be so for ever."""
READER_LIMIT_S = 10.0
LOOK_EVERY_S = 60.0


def summary(process: Callable[[dict[str, Any]], tuple[int, int]], item: dict[str, Any]) -> dict[str, Any]:
    """Process an item on a worker, and return what `run_parts` wants to know of it.

    `process` returns the number of units, and of those that it copied from older files.

    What ends the job, such as a full disk, comes as `failure`: raised, it would be logged with the stack of everything
    between.
    """
    started = time.monotonic()
    count, copied, failure = 0, 0, ""
    try:
        count, copied = process(item)
    except (UserError, JobError) as error:
        failure = str(error)
    seconds = time.monotonic() - started
    return {"count": count, "copied": copied, "seconds": seconds, "failure": failure, "node": platform.node()}


class Worker:
    """A worker that tells what kept it from starting. Ray would try again, and say in the end that workers died."""

    def __init__(self, worker: type, arguments: tuple[Any, ...]) -> None:
        self._failure: Exception | None = None
        send_log_to_driver()
        try:
            self._worker = worker(*arguments)
        except Exception as error:  # noqa: BLE001 - raised again below
            self._failure = error

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Return the summary of an item."""
        if isinstance(self._failure, UserError | JobError):
            return {"count": 0, "copied": 0, "seconds": 0.0, "failure": str(self._failure), "node": platform.node()}
        if self._failure:
            raise self._failure
        done: dict[str, Any] = self._worker(item)
        return done


def end_worker(reason: str) -> NoReturn:
    """End this worker's process. Ray starts another one, and does again what this one had not finished."""
    logger.warning("a worker on %s ends and is replaced: %s", platform.node(), reason)
    os._exit(1)  # whatever it has on a GPU may hang in an orderly end


@dataclass(frozen=True)
class Share:
    """What a worker holds: a CPU, or a part of a GPU and the CPUs that feed it.

    Attributes:
        num_workers: 0 for as many as the cluster has room for.
        num_parts: parts that a worker has in hand at once, each in a thread: it reads one and writes another while it
            computes a third.
    """

    num_workers: int = 0
    num_cpus: int = 1
    num_gpus: float = 0.0
    num_parts: int = 1

    @classmethod
    def of_gpus(cls, gpus: int, *, most_a_gpu: int) -> "Share":
        """Return the shares of so many GPUs of the connected cluster; of none, a CPU each.

        Several workers keep a GPU busy where one would wait for its CPU; each has two CPUs, or what is there.
        """
        if not gpus:
            return cls()
        cpus_a_gpu = cluster.cpus_a_gpu()
        a_gpu = max(1, min(most_a_gpu, cpus_a_gpu // 2))
        return cls(gpus * a_gpu, max(1, cpus_a_gpu // a_gpu), 1 / a_gpu)


@dataclass(frozen=True)
class Processed:
    """What workers did: units, of which `num_copied` came from older files, in the seconds since the first of them."""

    num: int = 0
    num_copied: int = 0
    seconds: float = 0.0

    def per_s(self) -> float | None:
        """Return the units a second, None where there were none."""
        return self.num / self.seconds if self.num else None


def run_parts(
    items: Sequence[dict[str, Any]],
    worker: type,
    worker_arguments: tuple[Any, ...],
    *,
    unit: str,
    num_done: int,
    num_all: int,
    share: "Share | None" = None,
    look: Callable[[], None] | None = None,
) -> Processed:
    """Run the parts on the connected cluster.

    A worker takes an item and returns its `summary`. Each has its `share` of the GPUs, or a CPU. `look` is called once
    a minute, and ends the work by what it raises.

    Raises:
        JobError: a worker's failure.
    """
    share = share or Share()
    num_workers = min(len(items), share.num_workers or cluster.num_cpus())
    summaries = _summaries(items, (worker, worker_arguments), num_workers, share)
    logger.info("%d %ss in %d parts on %d workers", num_all - num_done, unit, len(items), num_workers)
    started, num_processed, num_copied, num_by_node = 0.0, 0, 0, Counter[str]()
    looked = time.monotonic()
    with ProgressLine("working", unit=unit, total=num_all, done=num_done) as progress:
        for done in _rows(summaries):
            if done["failure"]:
                raise JobError(done["failure"])
            # The clock starts with the first worker's first photo: Ray's own start says nothing of the rate.
            started = started or time.monotonic() - done["seconds"]
            num_processed += done["count"] - done["copied"]
            num_copied += done["copied"]
            num_by_node[done["node"]] += done["count"]
            progress.add(done["count"])
            if look is not None and time.monotonic() - looked >= LOOK_EVERY_S:
                look()
                looked = time.monotonic()
    seconds = time.monotonic() - started
    by_node = ", ".join(f"{node} {num}" for node, num in sorted(num_by_node.items()))
    logger.info("%.0f %ss/s, %ss by node: %s", num_processed / max(seconds, 1e-9), unit, unit, by_node)
    return Processed(num_processed, num_copied, seconds)


def _summaries(items: Sequence[dict[str, Any]], arguments: tuple[Any, ...], num_workers: int, share: "Share") -> Any:
    """Return the dataset of what so many `Worker`s of these arguments say of the items."""
    import ray
    from ray.util.annotations import RayDeprecationWarning

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray adds a worker when this share of the places for calls is asked for. Full queues are to be enough, see below.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 0.875 * (share.num_parts + 1) / share.num_parts
    with warnings.catch_warnings():
        # Ray calls `max_task_retries` deprecated here, and names nothing in its place.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return ray.data.from_items(list(items), override_num_blocks=len(items)).map(
            Worker,
            fn_constructor_args=arguments,
            max_task_retries=TRIES_OF_A_PART - 1,
            num_cpus=share.num_cpus,
            num_gpus=share.num_gpus or None,
            # Nodes that join later are used too.
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                initial_size=num_workers,
                max_size=num_workers if share.num_gpus else len(items),
                max_concurrent_calls_per_actor=share.num_parts,
                # One more waits. Ray's two for each would leave the last parts to few workers.
                max_tasks_in_flight_per_actor=share.num_parts + 1,
                enable_true_multi_threading=share.num_parts > 1,
            ),
        )


def _rows(summaries: Any) -> Iterator[dict[str, Any]]:
    """Yield what the workers return. That they died is told in one line, and an error of ours keeps its stack."""
    from ray.exceptions import RayError, RayTaskError

    batches = summaries.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    try:
        with closing(iter(batches)) as tables:
            for rows in tables:
                yield from rows.to_pylist()
    except RayTaskError:
        raise
    except RayError as error:
        raise JobError(
            f"workers died {TRIES_OF_A_PART} times over one part ({type(error).__name__}): give them more memory, or "
            "find the photo that ends the process; what is done stays, and the same command goes on from here"
        ) from error
    finally:
        # Ray ends a process that leaves it while a thread of Ray Data still asks for rows.
        for thread in threading.enumerate():
            if thread.name == "iter_threaded":
                thread.join(READER_LIMIT_S)
