"""Detection on GPUs for workers on any node: one actor a GPU, which batches what many workers ask."""

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lib import cluster
from lib.errors import UserError
from lib.faces.detection import Detections, load_detector
from lib.faces.extraction import Detect, ExtractionSettings

MAX_BATCH = 16


class DetectionServer:
    """Detects in batches: what arrives while one batch runs makes up the next."""

    def __init__(self, name: str, weights_url: str | None, *, use_gpu: bool) -> None:
        self._detector = load_detector(name, weights_url, use_gpu=use_gpu)
        self._waiting: list[tuple[np.ndarray, asyncio.Future[Detections]]] = []
        self._running: asyncio.Task[None] | None = None

    async def detect(self, pictures: list[np.ndarray]) -> list[Detections]:
        """Return the faces of each picture."""
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in pictures]
        self._waiting.extend(zip(pictures, futures, strict=True))
        if self._running is None or self._running.done():
            self._running = loop.create_task(self._run())
        return list(await asyncio.gather(*futures))

    async def _run(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
            try:
                found = await asyncio.to_thread(self._detector.detect, [picture for picture, _ in batch])
            except Exception as error:  # noqa: BLE001 - whoever asked gets it, whatever it is
                for _, future in batch:
                    if not future.cancelled():
                        future.set_exception(error)
                continue
            for (_, future), detections in zip(batch, found, strict=True):
                if not future.cancelled():  # or one who gave up would leave the others waiting
                    future.set_result(detections)


def gpu_detectors(settings: ExtractionSettings, num_gpus: int) -> list[Any]:
    """Start one detection actor a GPU and return their handles, once each is ready.

    Raises:
        UserError: the cluster has fewer GPUs, or they cannot be used.
    """
    import ray

    if num_gpus > cluster.num_gpus():
        raise UserError(
            f"--gpus is {num_gpus}, but the cluster has {cluster.num_gpus()}: ask for no more, or leave --gpus out"
        )
    server = ray.remote(num_gpus=1, num_cpus=0, max_restarts=-1, max_task_retries=-1)(DetectionServer)
    handles = [server.remote(settings.detector, settings.detector_weights, use_gpu=True) for _ in range(num_gpus)]
    try:
        ray.get([handle.detect.remote([]) for handle in handles])
    except ray.exceptions.RayActorError as error:
        raise UserError(str(error).strip().splitlines()[-1]) from error
    return handles


def remote_detect(handles: list[Any]) -> Detect:
    """Return a detect function that asks the actors in turn."""
    import ray

    turns = itertools.cycle(handles)

    def detect(pictures: Sequence[np.ndarray]) -> list[Detections]:
        return ray.get(next(turns).detect.remote(list(pictures)))

    return detect
