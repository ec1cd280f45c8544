"""The driver watches its workers: it shows their progress, passes signals on, and ends where waiting is of no use."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from lib import cluster
from lib.config import EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR, STOP_SIGNALS, note_signal
from lib.errors import JobError
from lib.progress import ProgressLine
from lib.terminal import terminal
from lib.training.control import News, failure_error
from lib.training.worker_resources import WorkerResources

logger = logging.getLogger(__name__)

WATCH_EVERY_S = 0.25
FAILURE_LIMIT_S = 60.0
"""How long the other workers may take to end after one has failed."""

LEAVE_LIMIT_S = 600.0
"""How long workers may take to write a checkpoint after they were asked to leave."""

TOO_FEW_LIMIT_S = 10.0
"""How long the driver accepts too few nodes on a cluster whose lost nodes do not come back."""


def watch(work: Callable[[], Any], control: Any, *, unit: str, resources: WorkerResources | None = None) -> bool:
    """Do the work on a thread, and show its progress until it ends; return whether a signal asked it to stop early.

    With `resources` the process ends, to be queued again, when lost nodes leave too few for them.

    Raises:
        UserError, JobError: the reason why a worker failed, or why Ray failed after its last restart.
    """
    import ray

    ended: list[BaseException | None] = []
    leave_until: float | None = None

    def run() -> None:
        try:
            work()
            ended.append(None)
        except BaseException as error:  # noqa: BLE001 - raised again below, on the main thread
            ended.append(error)

    with _stop_signals() as asked:
        working = threading.Thread(target=run, daemon=True)
        working.start()
        with ProgressLine("starting the workers", unit=unit) as progress:
            fitted_at = time.monotonic()
            while not ended:
                is_asked = asked.wait(WATCH_EVERY_S)
                news = ray.get(control.news.remote())
                _show(news, progress)
                if news.failure:
                    _fail(news.failure, working)
                if is_asked and leave_until is None:
                    logger.info("asked to stop: saving everything")
                    control.request_stop.remote()
                    leave_until = time.monotonic() + LEAVE_LIMIT_S
                if leave_until is not None:
                    time.sleep(WATCH_EVERY_S)
                fitted_at = _check_limits(leave_until, fitted_at, resources)
            news = ray.get(control.news.remote())
            _show(news, progress)
    if news.failure:
        raise failure_error(news.failure)
    if ended[0] is not None:
        raise JobError(f"the workers failed too often: {_reason(ended[0])}") from ended[0]
    return leave_until is not None


def _fail(failure: tuple[str, str], working: threading.Thread) -> NoReturn:
    """Raise the failure of a worker; end this process if the others do not end in time."""
    working.join(FAILURE_LIMIT_S)
    if working.is_alive():
        kind, message = failure
        if kind == "user":
            terminal().abandon(f"error: {message}", EXIT_USER_ERROR)
        terminal().abandon(f"failed: {message}", EXIT_FAILURE)
    raise failure_error(failure)


def _check_limits(leave_until: float | None, fitted_at: float, resources: WorkerResources | None) -> float:
    """Return when the cluster last had enough nodes for the run; end this process if waiting cannot help.

    Ray's trainer still waits in its thread then, so an orderly exit from Ray would crash. Ray itself ends the workers
    of a driver that is gone.
    """
    now = time.monotonic()
    if leave_until is not None and now > leave_until:
        terminal().abandon(
            "failed: the workers did not stop in time: run the same command again to resume from the last checkpoint",
            EXIT_FAILURE,
        )
    if resources is None or not cluster.nodes_are_fixed() or resources.fit(cluster.node_resources()):
        return now
    if now - fitted_at > TOO_FEW_LIMIT_S:
        terminal().abandon(
            f"stopped: nodes are lost, and too few are left for {resources.text}: run the same command on enough nodes "
            "to resume from the last checkpoint",
            EXIT_STOPPED,
        )
    return fitted_at


def _show(news: News, progress: ProgressLine) -> None:
    for line in news.lines:
        logger.info(line)
    progress.update(news.num_images, total=news.total_images, label=news.status, note=news.note)


def _reason(error: BaseException) -> str:
    """Return the last line of an error whose text contains another error."""
    return str(error).strip().splitlines()[-1]


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Set the event at SIGTERM and SIGUSR1, which Slurm and Kubernetes send before they end a job."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def on_signal(number: int, _: object) -> None:
        note_signal(number)  # a signal to the whole process group also kills Ray
        asked.set()

    before = [signal.signal(kind, on_signal) for kind in STOP_SIGNALS]
    try:
        yield asked
    finally:
        for kind, handler in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(kind, handler)
