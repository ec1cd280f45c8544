"""Files of named tensors: reads them without running pickled code, and copies them into a module."""

import io
import pickle
import re
import struct
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import nn

from lib.errors import UserError
from lib.recognition.spec import SAFETENSORS_SUFFIX
from lib.storage import exists, read_bytes

# Errors that torch.load raised when it was fed thousands of damaged and hostile files.
_UNREADABLE = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    LookupError,
    AssertionError,
    AttributeError,
    TypeError,
    struct.error,
)

_GLOBAL = re.compile(r"\bGLOBAL (\S+)")
"""How PyTorch names a function or class that a pickle wants."""

_WRAPPERS = ("state_dict_ema", "model_state_dict", "state_dict", "model")
"""Keys under which training scripts store the tensors. Averaged weights come first."""

_NUM_NAMED = 5

Tensors = dict[str, torch.Tensor]


def read_tensors(url: str) -> Tensors:
    """Return the named tensors of a .safetensors, .pth or .pt file. Code in a .pth is refused and never runs.

    A .pth can hold its tensors under `state_dict`, `model` and similar keys, as training scripts write them.

    Raises:
        UserError: the file is missing, damaged, or holds anything but named tensors.
    """
    return tensors_of(read_weights(url), url)


def read_weights(url: str) -> bytes:
    """Return the content of a file of weights.

    Raises:
        UserError: the file is missing.
    """
    if not exists(url):
        raise UserError(f"no weights at {url!r}: the file does not exist")
    return read_bytes(url)


def tensors_of(content: bytes, url: str) -> Tensors:
    """Return the named tensors of a file's content, as `read_tensors` does. Messages call the file `url`."""
    if url.endswith(SAFETENSORS_SUFFIX):
        try:
            return safetensors.torch.load(content)
        except safetensors.SafetensorError as error:
            raise UserError(f"{url!r} is not a whole safetensors file ({error}): write or copy it again") from error
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise UserError(f"{url!r} cannot be read as PyTorch weights: {_why(error)}") from error
    return _named_tensors(loaded, url)


def _why(error: Exception) -> str:
    """Return what is wrong with a file of weights, without PyTorch's advice to trust it."""
    text = str(error)
    wanted = _GLOBAL.search(text)
    if wanted or "WeightsUnpickler" in text:
        what = f"wants {wanted[1]!r}" if wanted else "holds more than tensors"
        return f"it {what}, and only tensors are ever unpickled; save its state_dict() alone and try again"
    reason = " ".join(re.split(r"\. |\n", text.strip())[0].split())[:200] or type(error).__name__
    return f"it is damaged, or holds no tensors ({reason}); copy it again, or save its state_dict() and try again"


def load_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy `tensors` into `module`. The names must be exactly the module's.

    Raises:
        UserError: a tensor is missing, unknown, of another shape, or holds NaN or infinity. The message names a few.
    """
    expected = module.state_dict()
    misfits = [
        f"{name} is {tuple(tensors[name].shape)}, the model needs {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    misfits += [f"{name} is missing" for name in expected if name not in tensors]
    misfits += [f"{name} is not part of the model" for name in tensors if name not in expected]
    if misfits:
        named = sum(name in expected for name in tensors)
        if not named:
            advice = "none of its names is one of the model: choose the backbone it was made for"
        elif any("pos_embed" in each or "relative_position" in each for each in misfits):
            advice = "it was made for images of another size: name that by --image-size, such as 224"
        else:
            advice = f"{named} of {len(expected)} names are the model's: choose the backbone and head it was made for"
        raise UserError(f"{source!r} does not fit the model: {first_few(misfits)}; {advice}")
    broken = [f"{name} holds NaN or infinity" for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(f"{source!r} is broken: {first_few(broken)}; take an earlier or another copy")
    module.load_state_dict(tensors)


def _named_tensors(loaded: Any, url: str) -> Tensors:
    for wrapper in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict):
        raise UserError(f"{url!r} holds a {type(loaded).__name__}, not named tensors: save a state_dict() there")
    strangers = [f"{name!r} is {type(value).__name__}" for name, value in loaded.items() if not torch.is_tensor(value)]
    if strangers or not loaded:
        raise UserError(f"{url!r} is not a state_dict of tensors: {first_few(strangers) or 'it is empty'}")
    return dict(loaded)


def first_few(problems: list[str]) -> str:
    """Return the first few of a list in one line, and how many more there are."""
    rest = len(problems) - _NUM_NAMED
    return "; ".join(problems[:_NUM_NAMED]) + (f"; and {rest} more" if rest > 0 else "")
