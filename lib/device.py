"""The one place that knows devices: which one computes, in which arithmetic, and what makes it fast there.

Everything here runs on a CPU too, so that what a GPU does is tested without one.
"""

import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import torch

from lib.errors import UserError

logger = logging.getLogger(__name__)

Precision = Literal["auto", "fp32", "bf16"]
"""Of a model's arithmetic. auto: bf16 on GPUs that have it, fp32 elsewhere."""
Compile = Literal["auto", "on", "off"]
"""Whether torch.compile builds kernels for a model. auto: on GPUs, where a run is long enough to pay for it."""

_BF16_CAPABILITY = (8, 0)
"""First generation of NVIDIA GPUs that computes bfloat16 in hardware (Ampere)."""


def worker_device(*, use_gpu: bool) -> torch.device:
    """Return the device of this process: the first GPU it sees, or the CPU.

    Raises:
        UserError: a GPU is asked for and cannot be used; says why.
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
    elif caught:  # of a driver that is too old, for one
        reason = str(caught[-1].message).strip().splitlines()[0].split(" (Triggered", 1)[0]
    else:
        reason = "PyTorch finds no NVIDIA driver or no device: see `nvidia-smi`"
    raise UserError(f"a GPU was asked for and cannot be used: {reason}; --gpus 0 runs on the CPUs")


def prepare(device: torch.device, *, deterministic: bool = False) -> None:
    """Set up this process for speed on its device: TF32 for what stays float32, and kernels chosen by trial."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = not deterministic


def chosen_precision(asked: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """Return the arithmetic to use; what is asked for is taken at its word, with a warning where it is slow."""
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
    """Return the array on the device; the copy to a GPU runs beside what the process does next."""
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
    if device.type == "cuda" and tensor.device.type == "cpu":
        if not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)
    return tensor.to(device)


def adamw(groups: Iterable[dict[str, Any]], device: torch.device, *, lr: float) -> torch.optim.AdamW:
    """Return AdamW; on GPUs the fused one, which updates all weights by a few kernels."""
    return torch.optim.AdamW(groups, lr=lr, fused=device.type == "cuda")


def compiled(
    function: Callable[..., Any], asked: Compile, device: torch.device, *, pays: bool = True, **options: Any
) -> Callable[..., Any]:
    """Return `function`, or a module, compiled; as it is where compiling is not asked for, does not pay or fails.

    The compiler runs at the first call. Where it fails, as on a machine without Triton or a C compiler, one line says
    so, and the function runs as it is from then on.
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
            if not _is_of_the_compiler(error):
                raise
            state["has_failed"] = True
            reason = str(error).strip().splitlines()[0][:200]
            logger.warning("not compiled (%s): the model runs as it is, slower", reason)
            return function(*arguments, **named)
        state["is_compiled"] = True
        return result

    return call


def _is_of_the_compiler(error: Exception) -> bool:
    """Return whether an error comes from the compiler itself, not from what it compiled."""
    modules = {type(each).__module__.split(".")[0] + "." for each in _chain(error)}
    names = {type(each).__module__ for each in _chain(error)}
    return "triton." in modules or any(name.startswith(("torch._dynamo", "torch._inductor")) for name in names)


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def told(device: torch.device) -> str:
    """Return the device's name for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
