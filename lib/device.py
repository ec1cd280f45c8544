"""All device-specific code: which device computes, in which arithmetic, and what makes it fast.

Everything here also runs on a CPU, so that tests need no GPU.
"""

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from lib.cluster import Compile, Precision
from lib.device_errors import is_of_the_compiler
from lib.errors import UserError

logger = logging.getLogger(__name__)

_BF16_CAPABILITY = (8, 0)
"""First generation of NVIDIA GPUs with bfloat16 in hardware (Ampere)."""


def worker_device(*, use_gpu: bool) -> torch.device:
    """Return the device of this process: its first visible GPU, or the CPU.

    Raises:
        UserError: a GPU was asked for and cannot be used. The message says why.
    """
    if not use_gpu:
        return torch.device("cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if available:
        return torch.device("cuda", torch.cuda.current_device())
    if torch.version.cuda is None:
        reason = "this PyTorch is built for CPUs: install the CUDA build of requirements.txt"
    elif caught:  # such as a warning about an old driver
        reason = str(caught[-1].message).strip().splitlines()[0].split(" (Triggered", 1)[0]
    else:
        reason = "PyTorch finds no NVIDIA driver or no device: see `nvidia-smi`"
    raise UserError(f"a GPU was asked for and cannot be used: {reason}; --gpus 0 runs on the CPUs")


def prepare(device: torch.device, *, deterministic: bool = False, by_trial: bool = True) -> None:
    """Set up this process for speed: TF32 for float32 products, and kernels chosen by trial.

    Without `by_trial`, processes on equal devices choose equal kernels.
    """
    if deterministic != torch.are_deterministic_algorithms_enabled():  # setting it imports the compiler: seconds
        torch.use_deterministic_algorithms(deterministic)
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = by_trial and not deterministic


def chosen_precision(asked: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """Return the arithmetic to use. An explicit choice is kept, with a warning if it is slow on this device."""
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _BF16_CAPABILITY
    if asked == "auto":
        return "bf16" if has_bf16 else "fp32"
    if asked == "bf16" and device.type == "cuda" and not has_bf16:
        logger.warning("%s has no bfloat16: --precision fp32 is faster there", torch.cuda.get_device_name(device))
    return asked


def autocast(device: torch.device, precision: Literal["fp32", "bf16"]) -> torch.autocast:
    """Return the context in which a model computes in this arithmetic."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def to_device(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the array on the device. The copy to a GPU is asynchronous."""
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
    if device.type == "cuda" and tensor.device.type == "cpu":
        if not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)
    return tensor.to(device)


class Upload:
    """Copies arrays to a device while it computes, from any thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def empty(self, *shape: int) -> np.ndarray:
        """Return an empty uint8 array that can be copied without waiting: for GPUs, in pinned memory."""
        array: np.ndarray = torch.empty(shape, dtype=torch.uint8, pin_memory=self._stream is not None).numpy()
        return array

    def __call__(self, array: np.ndarray) -> "Uploaded":
        """Start the copy of an array. The array must not change afterwards."""
        if self._stream is None:
            return Uploaded(torch.from_numpy(array), None)
        with torch.cuda.stream(self._stream):
            tensor = torch.from_numpy(array).to(self.device, non_blocking=True)
        return Uploaded(tensor, self._stream.record_event())


class Uploaded:
    """An array on its way to a device."""

    def __init__(self, tensor: torch.Tensor, event: torch.cuda.Event | None) -> None:
        self._tensor = tensor
        self._event = event

    def tensor(self) -> torch.Tensor:
        """Return the array on the device. The caller does not wait for the copy; its next operations there do."""
        if self._event is not None:
            stream = torch.cuda.current_stream(self._tensor.device)
            stream.wait_event(self._event)
            self._tensor.record_stream(stream)  # otherwise a later array could reuse the memory too early
        return self._tensor


class Fetched:
    """A tensor on its way from a device to the CPU."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.detach()
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor.detach(), non_blocking=True)
            self._event = torch.cuda.current_stream(tensor.device).record_event()

    @property
    def is_there(self) -> bool:
        """Whether `numpy` would not wait."""
        return self._event is None or self._event.query()

    def numpy(self) -> np.ndarray:
        """Wait for the copy and return the array."""
        if self._event is not None:
            self._event.synchronize()
        array: np.ndarray = self._tensor.numpy()
        return array


def adamw(groups: Iterable[dict[str, Any]], device: torch.device, *, lr: float) -> torch.optim.AdamW:
    """Return AdamW; on GPUs the fused version, which updates all weights with a few kernels."""
    return torch.optim.AdamW(groups, lr=lr, fused=device.type == "cuda")


def compiled(
    function: Callable[..., Any], asked: Compile, device: torch.device, *, pays: bool = True, **options: Any
) -> Callable[..., Any]:
    """Return a function or module compiled, or unchanged if compiling is off, does not pay, or fails.

    The compiler runs at the first call. If it fails, as on a machine without Triton or a C compiler, one line says so,
    and the function runs without it from then on.
    """
    if asked == "off" or (asked == "auto" and (device.type != "cuda" or not pays)):
        return function
    fast = torch.compile(function, **options)
    state = {"is_compiled": False, "has_failed": False}

    def call(*arguments: Any, **named: Any) -> Any:
        if state["has_failed"]:
            return function(*arguments, **named)
        if state["is_compiled"]:
            return fast(*arguments, **named)
        try:
            result = fast(*arguments, **named)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if not is_of_the_compiler(error):
                raise
            state["has_failed"] = True
            reason = str(error).strip().splitlines()[0][:200]
            logger.warning("not compiled (%s): the model runs as it is, slower", reason)
            return function(*arguments, **named)
        state["is_compiled"] = True
        return result

    return call


def compile_module(
    module: nn.Module,
    asked: Compile,
    device: torch.device,
    first_run: Callable[[], Any],
    *,
    pays: bool = True,
    parts: Iterable[nn.Module] = (),
) -> bool:
    """Compile a module in place, without renaming its parts, and return whether that worked.

    `first_run` runs the module forward and backward, which starts the compiler and tries its result. `parts` are
    compiled instead of the whole module, equal parts once. If the compiler fails, as on a machine without Triton or a C
    compiler, one line says so, and the module stays unchanged.
    """
    if asked == "off" or (asked == "auto" and (device.type != "cuda" or not pays)):
        return False
    import torch._dynamo  # takes seconds

    chosen = list(parts) or [module]
    # Each kind of part and each shape counts as another compilation of the same function.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    try:
        for part in chosen:
            part.compile(dynamic=False)
        first_run()
    except Exception as error:
        for part in chosen:
            part._compiled_call_impl = None
        if isinstance(error, torch.OutOfMemoryError) or not is_of_the_compiler(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        logger.warning("not compiled (%s): the model runs as it is, slower", reason)
        return False
    return True


def largest_batch(run: Callable[[int], Any], device: torch.device, *, reserved: int) -> int | None:
    """Return how many images `run` can take at once on a GPU; None on a CPU, whose memory other programs use too.

    A tenth of the memory stays free, and `reserved` bytes for later, such as the optimiser's state.
    """
    if device.type != "cuda":
        return None
    peaks = []
    for num_images in _PROBES:
        torch.cuda.reset_peak_memory_stats(device)
        run(num_images)
        peaks.append(torch.cuda.max_memory_allocated(device))
    free, total = torch.cuda.mem_get_info(device)
    ours = torch.cuda.memory_reserved(device)
    return fitting(peaks, free + ours - total // 10 - reserved)


_PROBES = (16, 48)
"""Numbers of images in the two runs that measure the memory of one image."""


def fitting(peaks: Sequence[int], room: int) -> int:
    """Return how many images fit into `room` bytes. `peaks` is the memory of the two runs of `_PROBES`."""
    each = max(1.0, (peaks[1] - peaks[0]) / (_PROBES[1] - _PROBES[0]))
    return max(0, int((room - (peaks[0] - each * _PROBES[0])) / each))


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Run compiled modules without their compiled code, for shapes that would need another compilation."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Compute matrix products in full float32: TF32 would lose the distances of near vectors."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def free_memory() -> None:
    """Return unused GPU memory of this process to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_name(device: torch.device) -> str:
    """Return the device's name for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
