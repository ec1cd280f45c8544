"""The process of one worker: it trains its part, and tells the driver why it cannot go on."""

import contextlib
import ctypes

import ray
import torch

from lib.errors import JobError, JobStopped, UserError
from lib.terminal import send_log_to_driver
from lib.training import collective, loop
from lib.training.control import WorkerJob, connect_control
from lib.training.settings import TrainConfig

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of malloc.h."""


def work(job: WorkerJob, device: torch.device) -> None:
    """Train as a worker of a run: alone, or as a member of torch's process group."""
    send_log_to_driver()
    control = connect_control(job.config.run_url)
    if ray.get(control.has_failed.remote()):
        return  # Ray Train has restarted it, but the run cannot go on: the driver is about to say why.
    if device.type == "cpu":
        _keep_freed_memory()
    try:
        with contextlib.closing(loop.Worker(job, control, device)) as worker:
            worker.run()
    except torch.OutOfMemoryError as error:
        ray.get(control.fail.remote("user", _out_of_memory(job.config, error)))
    except (UserError, JobError) as error:
        # Not raised: Ray Train would restart all workers. The driver ends the run as soon as it hears of this.
        ray.get(control.fail.remote("user" if isinstance(error, UserError) else "job", str(error)))
    except JobStopped:
        return  # everything is saved
    except RuntimeError:
        # A collective raises this after another worker has left the group.
        if not ray.get(control.has_failed.remote()):
            raise
    else:
        return
    collective.hang_up()


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory, because each step needs blocks of the same sizes again.

    Otherwise glibc returns each large block to the kernel, and the next step pays 2,000 page faults an image.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # only glibc has it
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _out_of_memory(config: TrainConfig, error: Exception) -> str:
    return (
        f"the GPU's memory is too small for --batch-size {config.batch_size}: take a smaller one with --accumulate, or "
        f"--checkpoint-activations ({str(error).splitlines()[0]})"
    )
