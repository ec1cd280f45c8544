"""Processes that decode and augment. Threads would share Python's lock with the thread that feeds the GPU.

A process makes 700 to 1,000 crops of 240 pixels a second; a GPU takes several thousand. The processes do not import
torch. They read rows and draws from standard input and write pixels to standard output, so they end with their parent.

Shape suffixes: N images of a batch, H and W pixels, K numbers of one draw.
"""

import contextlib
import fcntl
import functools
import logging
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import cv2
import numpy as np
import numpy.typing as npt

from lib.training.augmentation import Making
from lib.training.face_cache import Crops, EncodedCrops

logger = logging.getLogger(__name__)

Image = npt.NDArray[np.uint8]

IMAGES_AT_ONCE = 16
"""Images of one task. They are few, so that all processes work on the next batch."""

PIPE_BYTES = 1 << 20
"""Size of the pipe: so many bytes pass before the reader's thread wakes up."""


class Decoders:
    """Some processes for any number of threads; close them at the end.

    Attributes:
        pids: of the processes.
    """

    def __init__(self, num_processes: int) -> None:
        """Start the processes. They need a second; earlier requests wait."""
        decoders = [_Decoder() for _ in range(num_processes)]
        self.pids = [decoder.process.pid for decoder in decoders]
        self._free: queue.SimpleQueue[_Decoder | None] = queue.SimpleQueue()
        for decoder in decoders:
            self._free.put(decoder)
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="decoders")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes after their current tasks."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._free.empty():
            if decoder := self._free.get():
                decoder.close()

    def filling(self, making: Making) -> Callable[..., npt.NDArray[np.bool_]]:
        """Return a function that does the same as `making.fill`, in these processes."""
        return functools.partial(self._fill, making)

    def _fill(
        self,
        making: Making,
        images_NHWC: Image,
        crops: Crops,
        rows_N: npt.NDArray[np.integer],
        draws_NK: npt.NDArray[np.float64] | None,
    ) -> npt.NDArray[np.bool_]:
        if not crops.path:  # they are in no file that the processes could open
            return making.fill(images_NHWC, crops, rows_N, draws_NK)
        parts = [slice(start, start + IMAGES_AT_ONCE) for start in range(0, len(rows_N), IMAGES_AT_ONCE)]
        failed = self._threads.map(
            lambda part: self._fill_part(
                making, images_NHWC[part], crops, rows_N[part], None if draws_NK is None else draws_NK[part]
            ),
            parts,
        )
        return np.concatenate([np.empty(0, bool), *failed])

    def _fill_part(self, making: Making, images_NHWC: Image, crops: Crops, *work: Any) -> npt.NDArray[np.bool_]:
        decoder = self._free.get()
        try:
            if decoder is None:
                return making.fill(images_NHWC, crops, *work)
            try:
                return decoder.fill(making, images_NHWC, crops.path, *work)
            except (OSError, EOFError) as error:
                logger.warning("a process that decodes crops died (%s): a thread takes its place", error)
                decoder.close()
                decoder = None
                return making.fill(images_NHWC, crops, *work)
        finally:
            self._free.put(decoder)


class _Decoder:
    """One process, for one thread at a time."""

    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lib.training.decoders"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # a signal to the group reaches only the parent, which then ends this process
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._requests, self._answers = self.process.stdin, self.process.stdout
        with contextlib.suppress(OSError):  # a user has limited memory for large pipes; the default one is slower
            fcntl.fcntl(self._answers, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def fill(
        self,
        making: Making,
        images_NHWC: Image,
        path: str,
        rows_N: npt.NDArray[np.integer],
        draws_NK: npt.NDArray[np.float64] | None,
    ) -> npt.NDArray[np.bool_]:
        pickle.dump((making, path, rows_N, draws_NK), self._requests)
        self._requests.flush()
        failed_N = np.empty(len(rows_N), bool)
        for answer in (failed_N.view(np.uint8), images_NHWC.ravel()):  # the pixels are contiguous, so this is a view
            if self._answers.readinto(answer) != answer.nbytes:  # type: ignore[attr-defined]
                raise EOFError(f"exit status {self.process.wait()}")
        return failed_N

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):  # a dead process has not read everything
            self._requests.close()
        self._answers.close()
        self.process.wait()


def _answer_until_closed() -> None:
    """Serve the requests on standard input until it ends."""
    cv2.setNumThreads(1)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    opened: dict[str, EncodedCrops] = {}
    while True:
        try:
            making, path, rows_N, draws_NK = pickle.load(requests)  # noqa: S301 - from our own parent
        except EOFError:
            return
        images_NHWC = np.empty((len(rows_N), making.size, making.size, 3), np.uint8)
        if path not in opened:
            # Shares of earlier epochs are gone.
            opened = {known: crops for known, crops in opened.items() if Path(known).exists()}
            opened[path] = EncodedCrops(path)
        failed_N = making.fill(images_NHWC, opened[path], rows_N, draws_NK)
        answers.write(failed_N.tobytes())
        answers.write(images_NHWC.data)
        answers.flush()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        _answer_until_closed()
