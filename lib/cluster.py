"""The Ray cluster a job runs on: the one it was submitted to, or one of its own on this machine."""

import contextlib
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from lib import local_ray, ray_watch, remote_ray
from lib.config import in_submitted_job, raise_on_stop_signals, signal_noticed
from lib.errors import UserError

logger = logging.getLogger(__name__)

WAIT_EVERY_S = 1.0

Gpus = Literal["auto"] | int
"""GPUs that a job computes on: all of the cluster, or so many; 0 computes on the CPUs."""

Precision = Literal["auto", "fp32", "bf16"]
"""Of a model's arithmetic. auto: bf16 on GPUs that have it, fp32 elsewhere."""
Compile = Literal["auto", "on", "off"]
"""Whether torch.compile builds kernels for a model. auto: on GPUs, where a run is long enough to pay for it."""

PROJECT_ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Connect to Ray for the duration: `$RAY_ADDRESS` where it is set, as in a submitted job, else a local cluster.

    Raises:
        UserError: `$RAY_ADDRESS` names no cluster that lets us in; JobError: Ray does not start or answer.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    with contextlib.ExitStack() as stack:
        address = os.environ.get("RAY_ADDRESS")
        if address and address != "local":
            # A submitted job's workers find `lib` in the uploaded working directory; others on the shared disk.
            logger.info("joining the Ray cluster at %s", address)
            paths = {} if in_submitted_job() else {"env_vars": {"PYTHONPATH": str(PROJECT_ROOT)}}
            remote_ray.join(address, {**paths, **_quoted_python()})
            stack.callback(ray.shutdown)
            watch = ray_watch.watched(ray_watch.raylet_of_this_driver(), None if address == "auto" else address)
        else:
            logger.info("starting Ray on this machine")
            # By the environment, which workers inherit: a runtime environment would cost each a process of its own.
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT_ROOT), os.environ.get("PYTHONPATH")]))
            stack.enter_context(local_ray.started(_quoted_python()))
            watch = ray_watch.watched(local_ray.daemons())
        raise_on_stop_signals()  # Ray has set a handler of its own, which would end in an abort
        try:
            with watch:
                yield
        except KeyboardInterrupt:
            signal_noticed()  # else it would come again while Ray is left
            raise
        finally:
            leave = stack.pop_all()
            with ray_watch.limited_leave():
                leave.close()
            raise_on_stop_signals()  # Ray has taken the handler away


def _quoted_python() -> dict[str, str]:
    """Return the part of a runtime environment without which no worker starts where Python's path has a space in it.

    Ray hands the path to a shell as it is, for every worker that has an environment of its own.
    """
    quoted = shlex.quote(sys.executable)
    return {} if quoted == sys.executable else {"py_executable": quoted}


def is_local() -> bool:
    """Return whether the connected cluster is one that this process has started on this machine."""
    return bool(local_ray.daemons())


def nodes_are_fixed() -> bool:
    """Return whether a node that is lost will not come back: so it is in a Slurm job, whose launcher says it."""
    return bool(os.environ.get("FIXED_NODES"))


def node_resources() -> list[dict[str, float]]:
    """Return the resources of each node of the connected cluster that is alive."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def wait_for(kind: str, count: int, *, limit_s: float) -> None:
    """Ask the cluster's autoscaler for so many CPUs or GPUs and wait until they are there, or until the limit."""
    import ray
    from ray.autoscaler.sdk import request_resources

    give_up = time.monotonic() + limit_s
    if limit_s <= 0 or ray.cluster_resources().get(kind, 0) >= count:
        return
    logger.info("waiting up to %g minutes for %d %ss", limit_s / 60, count, kind)
    request_resources(bundles=[{kind: 1}] * count)
    try:
        while ray.cluster_resources().get(kind, 0) < count and time.monotonic() < give_up:
            time.sleep(WAIT_EVERY_S)
    finally:
        # What is there now stays for a while; what is not asked for any more may go when nobody uses it.
        request_resources(bundles=[])


def num_cpus() -> int:
    """Return the logical CPUs of the connected cluster, at least 1."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def num_gpus() -> int:
    """Return the logical GPUs of the connected cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def cpus_a_gpu() -> int:
    """Return the fewest CPUs that a node with GPUs has for each of them, at least 1."""
    nodes = [node for node in node_resources() if node.get("GPU", 0) >= 1]
    return max(1, min((int(node.get("CPU", 0) // node["GPU"]) for node in nodes), default=1))


def chosen_gpus(asked: Gpus) -> int:
    """Return how many GPUs of the connected cluster to use, and tell it: `auto` takes all there are.

    Raises:
        UserError: more are asked for than there are.
    """
    there = num_gpus()
    if asked != "auto" and asked > there:
        raise UserError(f"--gpus is {asked}, but the cluster has {there}: ask for no more, or leave --gpus out")
    chosen = there if asked == "auto" else asked
    if chosen:
        logger.info("computing on %d GPU%s: --gpus 0 computes on the CPUs", chosen, "s" if chosen > 1 else "")
    else:
        logger.info("computing on the CPUs: %s", "no GPU is wanted" if there else "the cluster has no GPU")
    return chosen


def check_gpus(asked: Gpus) -> None:
    """Raise UserError where a value of `--gpus` makes no sense anywhere."""
    if asked != "auto" and asked < 0:
        raise UserError(f"--gpus is {asked}: auto, 0 or more")
