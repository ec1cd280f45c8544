"""The Ray cluster that a job runs on: the one it was submitted to, or its own on this machine."""

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
"""Number of GPUs that a job computes on. auto: all of the cluster; 0: the CPUs."""

Precision = Literal["auto", "fp32", "bf16"]
"""Arithmetic of a model. auto: bf16 on GPUs that support it, fp32 elsewhere."""
Compile = Literal["auto", "on", "off"]
"""Whether torch.compile builds kernels for a model. auto: on GPUs, if the run is long enough to pay for it."""

PROJECT_ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Connect to Ray for the duration: to `$RAY_ADDRESS` if it is set, as in a submitted job, else to a local cluster.

    Raises:
        UserError: `$RAY_ADDRESS` names no cluster, or one that refuses us. JobError: Ray does not start or answer.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    with contextlib.ExitStack() as stack:
        address = os.environ.get("RAY_ADDRESS")
        if address and address != "local":
            # Workers of a submitted job find `lib` in the uploaded working directory, others on the shared disk.
            logger.info("joining the Ray cluster at %s", address)
            paths = {} if in_submitted_job() else {"env_vars": {"PYTHONPATH": str(PROJECT_ROOT)}}
            remote_ray.join(address, {**paths, **_quoted_python()})
            stack.callback(ray.shutdown)
            watch = ray_watch.watched(ray_watch.raylet_of_this_driver(), None if address == "auto" else address)
        else:
            logger.info("starting Ray on this machine")
            # Workers inherit the environment. A runtime environment would cost each of them another process.
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT_ROOT), os.environ.get("PYTHONPATH")]))
            stack.enter_context(local_ray.started(_quoted_python()))
            watch = ray_watch.watched(local_ray.daemons())
        raise_on_stop_signals()  # Ray has set its own handler, which would abort
        try:
            with watch:
                yield
        except KeyboardInterrupt:
            signal_noticed()  # otherwise it would be raised again while Ray shuts down
            raise
        finally:
            leave = stack.pop_all()
            with ray_watch.limited_leave():
                leave.close()
            raise_on_stop_signals()  # Ray has removed the handler


def _quoted_python() -> dict[str, str]:
    """Return the part of a runtime environment that workers need if the path of Python has a space in it.

    Ray passes the path to a shell unquoted, for every worker with a runtime environment.
    """
    quoted = shlex.quote(sys.executable)
    return {} if quoted == sys.executable else {"py_executable": quoted}


def is_local() -> bool:
    """Return whether this process has started the connected cluster, on this machine."""
    return bool(local_ray.daemons())


def nodes_are_fixed() -> bool:
    """Return whether a lost node will not come back, as in a Slurm job; the launcher sets `$FIXED_NODES`."""
    return bool(os.environ.get("FIXED_NODES"))


def node_resources() -> list[dict[str, float]]:
    """Return the resources of each live node of the connected cluster."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def wait_for(kind: str, count: int, *, limit_s: float) -> None:
    """Ask the autoscaler for `count` CPUs or GPUs, and wait until the cluster has them, `limit_s` at most."""
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
        # The nodes stay for a while. The autoscaler may remove them once they are idle.
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
    """Return how many GPUs of the connected cluster to use, and log the choice; `auto` takes all.

    Raises:
        UserError: the cluster has fewer than were asked for.
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
    """Raise UserError if a value of `--gpus` makes no sense on any cluster."""
    if asked != "auto" and asked < 0:
        raise UserError(f"--gpus is {asked}: auto, 0 or more")
