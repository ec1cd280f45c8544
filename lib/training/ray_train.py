"""Ray Train for our runs: quiet, and with torch only in the workers, because importing it takes seconds.

Ray Train's controller, which only watches the workers, gets what is in this module, and packed settings.
"""

import os
import pickle
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.constants import DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.callbacks.preemption_callback import PreemptionCallback
from ray.train.v2._internal.constants import HEALTH_CHECK_INTERVAL_S_ENV_VAR
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from lib.imports import quick_imports

LOOK_EVERY_S = 0.25
"""How often the controller checks whether workers have ended or died. Ray Train's 2 s make each run end late."""


class _Backend(Backend):
    """Does the same as `ray.train.torch`, which cannot be imported without torch."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: "Torch") -> None:
        """Connect the workers of one start."""
        if backend_config.folder:
            # A file for this start alone: torch's usual store listens on all networks.
            place, url = {}, (Path(backend_config.folder) / f"workers-{uuid.uuid4().hex}").as_uri()
        else:
            address, port = worker_group.execute_single(0, get_address_and_port)
            place, url = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}, "env://"
        world = len(worker_group)
        ray.get(
            [worker_group.execute_single_async(n, _join, backend_config, place, url, n, world) for n in range(world)]
        )

    def on_shutdown(self, worker_group: Any, _: "Torch") -> None:
        """Disconnect the workers."""
        left = worker_group.execute_async(_leave, len(worker_group) > 1)
        try:
            ray.get(left, timeout=DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S)
        except GetTimeoutError:
            return  # the hanging worker is killed next


@dataclass
class Torch(BackendConfig):
    """How the workers of a run find each other.

    Attributes:
        backend: torch's, such as gloo.
        folder: on this machine, seen by all workers; empty if they are on several machines.
    """

    backend: str
    folder: str = ""
    timeout_s: int = 1800

    @property
    def backend_cls(self) -> type[_Backend]:
        """The backend that Ray Train calls."""
        return _Backend

    @property
    def train_func_context(self) -> Any:
        """The context in which workers train."""
        return _on_own_device


def _join(config: Torch, place: dict[str, str], url: str, rank: int, world: int) -> None:
    """Connect this worker with the others."""
    with quick_imports():
        from ray.train.torch import config as ray_torch

    os.environ.update(place)
    ray_torch._set_torch_distributed_env_vars()
    ray_torch._setup_torch_process_group(config.backend, rank, world, url, config.timeout_s)


def _leave(destroy: bool) -> None:
    from ray.train.torch import config as ray_torch

    ray_torch._shutdown_torch(destroy_process_group=destroy)


@contextmanager
def _on_own_device() -> Iterator[None]:
    from ray.train.torch.config import TorchConfigContextManager

    with TorchConfigContextManager():
        yield


def train_worker(settings: dict[str, Any]) -> None:
    """Train until the run ends or is asked to stop; Ray Train calls this on every worker."""
    with quick_imports():
        import ray.train.torch
        import torch

        from lib.training.worker_process import work

    job = pickle.loads(settings["job"])  # noqa: S301 - of our own driver
    work(job, ray.train.torch.get_device() if job.use_gpu else torch.device("cpu"))


class ClusterTrainer(DataParallelTrainer):
    """Ray Train's trainer without its placement group cleaner, and without a process for Ray Data, which is not used.

    The cleaner asks the dashboard each second, and warns each second if there is none. It would free resources after a
    driver was killed, but Ray itself frees them, because they belong to the job.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unused = PlacementGroupCleanerCallback | DatasetsCallback
        return [each for each in super()._create_default_callbacks() if not isinstance(each, unused)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        os.environ.setdefault(HEALTH_CHECK_INTERVAL_S_ENV_VAR, str(LOOK_EVERY_S))  # goes to the controller
        return super()._initialize_and_run_controller(**arguments)


class OneMachineTrainer(ClusterTrainer):
    """The same for a local cluster, which loses no nodes and whose processes have the driver's environment.

    With an environment of Ray Train's own, each process would have to start twice.
    """

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if isinstance(arguments["scaling_policy"], FixedScalingPolicy):
            arguments["scaling_policy"] = _Fixed(self.scaling_config)
        controller = ray.remote(num_cpus=0)(_OneMachineController).remote(**arguments)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())


class _Fixed(FixedScalingPolicy):
    """A fixed number of workers. A local cluster has no autoscaler, and the process that asks for it takes seconds."""

    def after_controller_start(self, _: Any) -> None:
        """Request nothing, here and below."""

    def _maybe_send_resource_request(self) -> None: ...


class _OneMachineController(TrainController):
    def __init__(self, **arguments: Any) -> None:
        ray._private.worker.blocking_get_inside_async_warned = True  # Ray Train's environment would silence it
        super().__init__(**arguments)
        self._health_check_interval_s = LOOK_EVERY_S
        propagated = self._worker_group_callbacks_to_propagate
        propagated[:] = [each for each in propagated if not isinstance(each, PreemptionCallback)]
