"""How workers of one machine find each other: by a file, for torch's usual store listens on every network."""

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch import config as ray_torch


class _FileBackend(ray_torch._TorchBackend):
    def on_start(self, worker_group: Any, backend_config: "OneMachine") -> None:
        """Connect the workers of one start; those of the next take another file."""
        worker_group.execute(ray_torch._set_torch_distributed_env_vars)
        file = Path(backend_config.folder) / f"workers-{uuid.uuid4().hex}"
        ray.get(
            [
                worker_group.execute_single_async(
                    rank,
                    ray_torch._setup_torch_process_group,
                    backend=backend_config.backend,
                    world_rank=rank,
                    world_size=len(worker_group),
                    init_method=file.as_uri(),
                    timeout_s=backend_config.timeout_s,
                )
                for rank in range(len(worker_group))
            ]
        )


@dataclass
class OneMachine(TorchConfig):
    """Ray's settings for torch, where all workers see one folder of this machine."""

    folder: str = ""

    @property
    def backend_cls(self) -> type[_FileBackend]:
        """What Ray Train calls."""
        return _FileBackend
