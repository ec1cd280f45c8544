"""Work in parts that may be stopped at any moment: a plan, files that are there or not, and Ray Data for the rest.

The name and content of a part's files follow from the plan alone. So what is there is done, whoever wrote it, and a
part that was done twice is the same file. The plan is written first, `_SUCCESS` last.
"""

import logging
import platform
import threading
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from lib import cluster, storage
from lib.errors import JobError, UserError
from lib.progress import ProgressLine
from lib.terminal import send_log_to_driver

logger = logging.getLogger(__name__)

PLAN_NAME = "_plan.json"
SUCCESS_NAME = "_SUCCESS"
PART_PREFIX = "split="
"""What the folders begin with that hold the files of the parts."""
TRIES_OF_A_PART = 10
"""A worker that dies is replaced; one that always dies over the same part would be so for ever."""
READER_LIMIT_S = 10.0

Plan = Mapping[str, Any]


SUCCESS_ENTRIES = {"run_id": str, "fingerprint": dict, "counts": dict}
"""What `_SUCCESS` holds, with their types; `parts`, the size of each file in bytes, is not in older ones."""


def settle(
    url: str,
    plan: Plan,
    *,
    flag: str,
    overwrite: bool,
    file_names: Sequence[str],
    other_names: Sequence[str] = (),
    before_removal: Callable[[], object] = lambda: None,
) -> dict[str, Any] | None:
    """Return the `_SUCCESS` of a finished output of this very plan, or None where there is work to do.

    A finished output that has lost some of its `file_names` is work to do: those are made again. With `overwrite` the
    output of another plan is removed, and nothing else: its parts, `other_names`, its plan. `before_removal` is called
    first, and raises where the new output could not be made.

    Raises:
        UserError: the folder holds the output of another plan, or files of someone else. `flag` names the folder.
    """
    earlier, problem = earlier_plan(url, PLAN_NAME, plan)
    if earlier is not None and earlier.get("job") != plan.get("job"):
        raise UserError(
            f"{url} holds what another job made, which is never overwritten: choose another folder by {flag}"
        )
    if not problem:
        return None if earlier is None else _finished(url, file_names)
    if not overwrite:
        raise UserError(
            f"{url} {problem}: choose another folder by {flag}, go back to those settings, or replace it with "
            "--overwrite"
        )
    if earlier is None:
        raise UserError(f"{url} {problem}: --overwrite replaces what this job made only; choose another folder")
    before_removal()
    logger.info("removing what was made earlier in %s", storage.redacted(url))
    # What says that all is there goes first, and what says whose it is goes last.
    storage.remove(storage.join(url, SUCCESS_NAME))
    for info in storage.list_files(url, suffix=".parquet"):
        if info.path.startswith(PART_PREFIX):
            storage.remove(storage.join(url, info.path))
    for name in other_names:
        storage.remove(storage.join(url, name))
    storage.remove(storage.join(url, PLAN_NAME))
    return None


def earlier_plan(
    url: str, plan_name: str, plan: Plan, *, defaults: Plan | None = None, begun: str | None = None
) -> tuple[Plan | None, str]:
    """Return the plan of the output in a folder, None where none has begun, and what keeps ours from going on there.

    `defaults` are for `differences`. Files in the folder `begun` may be there before the plan is.
    """
    plan_url = storage.join(url, plan_name)
    if storage.exists(plan_url):
        earlier = storage.read_json(plan_url, {"fingerprint": dict})
        different = "; ".join(differences(plan, earlier, defaults))
        return earlier, f"was made with other settings ({different})" if different else ""
    first = next(iter(storage.list_files(url)), None)
    if first is None or (begun is not None and first.path.startswith(f"{begun}/")):
        return None, ""
    return None, f"holds files but no {plan_name}, such as {first.path}"


def write_plan(url: str, plan: Plan) -> str:
    """Write the plan unless it is there, and return the id of the run that wrote it."""
    plan_url = storage.join(url, PLAN_NAME)
    if storage.exists(plan_url):
        return str(storage.read_json(plan_url, {"run_id": str})["run_id"])
    run_id = uuid.uuid4().hex[:12]
    storage.write_json(plan_url, {"run_id": run_id, **plan})
    return run_id


def present_files(url: str) -> dict[str, int]:
    """Return the sizes in bytes of the Parquet files that are there, by their paths below `url`."""
    return {info.path: info.num_bytes for info in storage.list_files(url, suffix=".parquet")}


def read_success(url: str, *, what: str, job: str) -> dict[str, Any]:
    """Return what a finished output says of itself, once all its parts are there.

    Raises:
        UserError: there is none, it is not finished, or parts of it are gone. `what` and `job` name it and its maker.
    """
    success_url = storage.join(url, SUCCESS_NAME)
    shown = storage.redacted(url)
    if not storage.exists(success_url):
        raise UserError(f"no finished {what} at {shown} (no {SUCCESS_NAME}): run {job} first")
    success = storage.read_json(success_url, SUCCESS_ENTRIES)
    if lost := _lost(url, success):
        raise UserError(
            f"{len(lost)} of the {len(success['parts'])} parts of {shown} are gone or not as they were written, such "
            f"as {lost[0]}: run {job} again with the settings of that table, and it makes them again"
        )
    return success


def _lost(url: str, success: Mapping[str, Any]) -> list[str]:
    """Return the parts that `_SUCCESS` names and that are not there, or of another size."""
    parts = success.get("parts")
    if not isinstance(parts, dict):
        return []
    present = present_files(url)
    return [name for name, num_bytes in parts.items() if present.get(name) != num_bytes]


def _finished(url: str, file_names: Sequence[str]) -> dict[str, Any] | None:
    """Return `_SUCCESS` where all is there; else remove the parts that were changed, so that they are made again."""
    success_url = storage.join(url, SUCCESS_NAME)
    if not storage.exists(success_url):
        return None
    success = storage.read_json(success_url, SUCCESS_ENTRIES)
    present = present_files(url)
    lost = set(_lost(url, success)) | {name for name in file_names if name not in present}
    if not lost:
        return success
    logger.warning("%d parts of %s are gone or damaged: they are made again", len(lost), storage.redacted(url))
    for name in lost & set(file_names) & set(present):
        storage.remove(storage.join(url, name))
    return None


def summary(process: Callable[[dict[str, Any]], int], item: dict[str, Any]) -> dict[str, Any]:
    """Process an item on a worker, and return what `run_parts` wants to know of it.

    What ends the job, such as a full disk, comes as `failure`: raised, it would be logged with the stack of everything
    between.
    """
    started = time.monotonic()
    count, failure = 0, ""
    try:
        count = process(item)
    except (UserError, JobError) as error:
        failure = str(error)
    return {"count": count, "seconds": time.monotonic() - started, "failure": failure, "node": platform.node()}


class Worker:
    """A worker that tells what kept it from starting, where Ray would try again and print the stack each time."""

    def __init__(self, worker: type, arguments: tuple[Any, ...]) -> None:
        self._failure = ""
        send_log_to_driver()
        try:
            self._worker = worker(*arguments)
        except (UserError, JobError) as error:
            self._failure = str(error)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Return the summary of an item."""
        if self._failure:
            return {"count": 0, "seconds": 0.0, "failure": self._failure, "node": platform.node()}
        done: dict[str, Any] = self._worker(item)
        return done


@dataclass(frozen=True)
class Share:
    """What a worker holds: a CPU, or a part of a GPU and the CPUs that feed it.

    Attributes:
        num_workers: 0 for as many as the cluster has room for.
    """

    num_workers: int = 0
    num_cpus: int = 1
    num_gpus: float = 0.0

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


def run_parts(
    items: Sequence[dict[str, Any]],
    worker: type,
    worker_arguments: tuple[Any, ...],
    *,
    unit: str,
    num_done: int,
    num_all: int,
    share: "Share | None" = None,
) -> tuple[int, float]:
    """Run the parts on the connected cluster; return the units processed and the seconds since the first of them.

    A worker takes an item and returns its `summary`. Each has its `share` of the GPUs, or a CPU.

    Raises:
        JobError: a worker's failure.
    """
    share = share or Share()
    num_workers = min(len(items), share.num_workers or cluster.num_cpus())
    summaries = _summaries(items, (worker, worker_arguments), num_workers, share)
    logger.info("%d %ss in %d parts on %d workers", num_all - num_done, unit, len(items), num_workers)
    started, num_processed, num_by_node = 0.0, 0, Counter[str]()
    with ProgressLine("working", unit=unit, total=num_all, done=num_done) as progress:
        for done in _rows(summaries):
            if done["failure"]:
                raise JobError(done["failure"])
            # The clock starts with the first worker's first photo: Ray's own start says nothing of the rate.
            started = started or time.monotonic() - done["seconds"]
            num_processed += done["count"]
            num_by_node[done["node"]] += done["count"]
            progress.add(done["count"])
    seconds = time.monotonic() - started
    by_node = ", ".join(f"{node} {num}" for node, num in sorted(num_by_node.items()))
    logger.info("%.0f %ss/s, %ss by node: %s", num_processed / max(seconds, 1e-9), unit, unit, by_node)
    return num_processed, seconds


def _summaries(items: Sequence[dict[str, Any]], arguments: tuple[Any, ...], num_workers: int, share: "Share") -> Any:
    """Return the dataset of what so many `Worker`s of these arguments say of the items."""
    import ray
    from ray.util.annotations import RayDeprecationWarning

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
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
                min_size=1, initial_size=num_workers, max_size=num_workers if share.num_gpus else len(items)
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


def differences(ours: Plan, theirs: Plan, defaults: Plan | None = None) -> list[str]:
    """Return each setting in which two plans differ, those of their fingerprints too, with both values.

    A setting that `theirs` does not know is newer than it. It had its default then, or where there are no `defaults`
    the present value.
    """
    newer = [name for name in ours if name not in theirs]
    if newer:
        theirs = {**theirs, **{name: (ours if defaults is None else defaults).get(name) for name in newer}}
        told = ", ".join(f"{name} {theirs[name]}" for name in newer)
        logger.info("settings that are newer than what is there are taken to have been: %s", told)
    flat_ours = {**ours, **ours["fingerprint"], "fingerprint": None, "id": None}
    flat_theirs = {**theirs, **theirs.get("fingerprint", {}), "fingerprint": None, "id": None, "run_id": None}
    names = sorted(name for name in flat_ours if flat_ours[name] != flat_theirs.get(name))
    if names == ["manifest"]:
        return ["other photos or identities, as many as before"]
    return [f"{name}: {flat_theirs.get(name)} there, {flat_ours[name]} now" for name in names if name != "manifest"]
