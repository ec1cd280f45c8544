"""What an error of a device means: memory that is short, a GPU that is lost, a compiler that fails."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the device had no memory for something, after which it can go on."""
    named = ("STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError) or any(name in str(error) for name in named)


def is_lost(error: BaseException) -> bool:
    """Return whether an error is one of CUDA, after which this process cannot use the GPU any more."""
    if is_out_of_memory(error):
        return False
    named = ("CUDA error", "CUDA driver error", "cuDNN error")
    return any(
        isinstance(each, torch.AcceleratorError) or (isinstance(each, RuntimeError) and str(each).startswith(named))
        for each in _chain(error)
    )


def is_of_the_compiler(error: Exception) -> bool:
    """Return whether an error comes from the compiler, not from the compiled code."""
    names = [type(each).__module__ for each in _chain(error)]
    return any(name.startswith(("triton", "torch._dynamo", "torch._inductor")) for name in names)


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
