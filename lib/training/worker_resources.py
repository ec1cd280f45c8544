"""How many workers a run has, and the CPUs and GPUs that each of them gets from the cluster."""

from dataclasses import dataclass, replace

from lib import cluster
from lib.errors import UserError
from lib.training.settings import TrainConfig


def with_devices(config: TrainConfig, least: int = 0) -> TrainConfig:
    """Return the settings with `--gpus auto` replaced by the number of GPUs of the connected cluster.

    Waits up to `--wait-minutes` for `least` CPUs or GPUs, by default as many as the smallest number of workers needs.
    """
    gpus = 0 if config.run.deterministic else config.gpus
    if gpus == "auto":
        gpus = cluster.chosen_gpus("auto")
    least = least or (config.workers[0] if config.workers else gpus or 1)
    cluster.wait_for("GPU" if gpus else "CPU", least, limit_s=60 * config.run.wait_minutes)
    return replace(config, gpus=gpus)


@dataclass(frozen=True, kw_only=True)
class WorkerResources:
    """How many workers there are, and what each of them gets."""

    num_workers: int | tuple[int, int]
    each: dict[str, float]
    text: str

    def fit(self, nodes: list[dict[str, float]]) -> bool:
        """Return whether nodes with these resources have room for the smallest number of workers."""
        least = self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]
        return least <= sum(min(int(node.get(kind, 0) // n) for kind, n in self.each.items()) for node in nodes)


def worker_resources(config: TrainConfig) -> WorkerResources:
    """Return the workers that the settings of `with_devices` ask for, if the connected cluster has room for them.

    Raises:
        UserError: the cluster has fewer CPUs or GPUs than workers.
    """
    nodes = [node for node in cluster.node_resources() if node.get("CPU", 0) >= 1]
    kind = "GPU" if config.gpus else "CPU"
    places = [int(node.get(kind, 0)) for node in nodes]
    total = sum(places)
    assert config.gpus != "auto"
    least = config.workers[0] if config.workers else max(1, config.gpus or len(nodes))
    if total < least:
        advice = "--gpus 0 trains on the CPUs" if config.gpus else "ask for fewer by --workers"
        raise UserError(
            f"{least} workers need {least} {kind}s, and this cluster of {len(nodes)} nodes has {total}: {advice}, "
            "add nodes, or wait for those of a growing cluster by --wait-minutes"
        )
    if config.gpus:
        num_cpus = min(int(node["CPU"]) // int(node["GPU"]) for node in nodes if node.get("GPU", 0) >= 1)
    else:
        num_cpus = cpus_each(places, least)
    num_cpus = max(1, num_cpus)
    most = config.workers[-1] if config.workers else least
    return WorkerResources(
        num_workers=least if most == least else (least, most),
        each={"CPU": num_cpus, **({"GPU": 1} if config.gpus else {})},
        text=f"{least if most == least else f'{least} to {most}'} workers of {num_cpus} CPUs"
        + (" and a GPU" if config.gpus else ""),
    )


def cpus_each(cpus_of_nodes: list[int], num_workers: int) -> int:
    """Return the most CPUs that each of so many workers can have on these nodes."""
    return next(
        each for each in range(max(cpus_of_nodes), 0, -1) if sum(cpus // each for cpus in cpus_of_nodes) >= num_workers
    )
