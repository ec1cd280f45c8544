"""Verification sets as InsightFace publishes them: `lfw.bin`, `cfp_fp.bin`, `agedb_30.bin` and others.

Such a file is a pickle of 2P encoded images and P booleans. A pickle is a program, and this reader never runs it. It
knows the few things that such files hold, and refuses anything else by name.

Shapes: P pairs.
"""

import io
import math
import pickle
import pickletools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib import storage
from lib.errors import UserError
from lib.redaction import redacted

SUFFIX = ".bin"

MAX_BYTES = 8 * 2**30
"""Far more than any set: the largest known one, of 14,000 images, has 0.1 GB."""

_FIRST_BYTES = (b"\x80", b"(", b"]")
"""First bytes of a pickle of protocol 2 or later, and of a tuple or a list in earlier protocols."""

_OPCODES = (
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE", "LIST", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
)
"""Dictionaries and sets are not among them: hashing nested tuples takes as long as a file wants."""


@dataclass(frozen=True, kw_only=True, eq=False)
class VerificationSet:
    """A verification set. Images 2p and 2p + 1 are pair p. All are aligned to ArcFace's template."""

    name: str
    """Name of the file without suffix, such as lfw."""
    images: list[bytes]
    """2P encoded pictures."""
    same_P: NDArray[np.bool_]
    """Whether both images of a pair show the same person."""

    def __len__(self) -> int:
        return len(self.same_P)


def is_verification_set(url: str) -> bool:
    """Return whether a file of pairs is one by its name."""
    return _path(url).suffix.lower() == SUFFIX


def set_name(url: str) -> str:
    """Return the name of a set: that of its file without the suffix."""
    return _path(url).stem


def _path(url: str) -> PurePosixPath:
    return PurePosixPath(url.partition("?")[0] if "://" in url else url)


def read_verification_set(url: str) -> VerificationSet:
    """Return the set in a `.bin` file.

    Raises:
        UserError: the file is missing, cut off or no verification set, or holds something else, which is named.
    """
    num_bytes = storage.file_info(url).num_bytes
    if num_bytes > MAX_BYTES:
        raise UserError(f"{redacted(url)} has {num_bytes / 2**30:.1f} GiB: no verification set is larger than 8")
    if not storage.read_bytes(url, 1).startswith(_FIRST_BYTES):
        raise _no_set(url, "it is no pickle")
    return parse_verification_set(storage.read_bytes(url), url)


def parse_verification_set(content: bytes, url: str) -> VerificationSet:
    """Return the set in the content of a file; `url` names it in messages.

    Raises:
        UserError: as `read_verification_set` does.
    """
    try:
        found = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except _RefusedError as refused:
        raise UserError(
            f"{redacted(url)} is refused: it wants {str(refused)[:200]!r}, and a verification set holds images and "
            "booleans only; take the file from its publisher"
        ) from None
    except Exception as error:  # damaged opcodes raise nearly anything
        raise _no_set(url, "it is cut off or damaged") from error
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise _no_set(url, "it does not hold two lists")
    images, same_P = _images(found[0], url), _booleans(found[1], url)
    if len(images) != 2 * len(same_P) or not images:
        raise _no_set(url, f"it has {len(images)} images for {len(same_P)} pairs, and a pair has two")
    return VerificationSet(name=set_name(url), images=images, same_P=same_P)


def _no_set(url: str, reason: str) -> UserError:
    return UserError(
        f"{redacted(url)} is no verification set: {reason}; such a file is a pickle of (images, booleans), as "
        "InsightFace's lfw.bin is"
    )


def _images(found: Any, url: str) -> list[bytes]:
    if not isinstance(found, list | tuple):
        raise _no_set(url, "its first part is no list of images")
    images = []
    for number, image in enumerate(found):
        if isinstance(image, _Array):
            image = image.data if image.kind == "u1" else None
        elif isinstance(image, str):  # a file of Python 2 that was read as latin-1 and written again
            image = image.encode("latin-1", "replace")
        if not isinstance(image, bytes):
            raise _no_set(url, f"image {number} is not an encoded picture")
        images.append(image)
    return images


def _booleans(found: Any, url: str) -> NDArray[np.bool_]:
    if isinstance(found, _Array):
        found = list(found.data or b"")
    if not isinstance(found, list | tuple) or any(
        type(each) not in (bool, int) or each not in (0, 1) for each in found
    ):
        raise _no_set(url, "its second part is no list of booleans")
    return np.array(found, bool)


class _RefusedError(Exception):
    """The pickle asks for something that no verification set holds."""


class _Type:
    """Stands for NumPy's dtype."""

    def __init__(self, code: Any, *_: Any) -> None:
        name = code.decode("latin-1") if isinstance(code, bytes) else code
        self.kind = name.lstrip("|")
        if self.kind not in ("u1", "b1"):
            raise _RefusedError(f"a NumPy array of type {name}")

    def __setstate__(self, state: Any) -> None:
        """Ignore the byte order, which a byte does not have."""


class _Array:
    """Stands for a one-dimensional NumPy array of bytes or booleans; `data` are its values."""

    def __init__(self, *_: Any) -> None:
        self.kind, self.data = "", b""

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, _, data = state
        self._fill(shape, kind, data)

    @classmethod
    def of_buffer(cls, buffer: Any, kind: Any, shape: Any, *_: Any) -> "_Array":
        """Return the array that protocol 5 describes."""
        array = cls()
        array._fill(shape, kind, buffer)
        return array

    def _fill(self, shape: Any, kind: Any, data: Any) -> None:
        if isinstance(data, str):
            data = data.encode("latin-1")
        if not isinstance(kind, _Type) or not isinstance(data, bytes):
            raise TypeError("no array")
        if len(shape) != 1:
            raise _RefusedError(f"a NumPy array of {len(shape)} dimensions")
        if math.prod(shape) != len(data):
            raise ValueError("an array of another length")
        self.kind, self.data = kind.kind, data


def _scalar(kind: Any, data: Any) -> bool | int:
    (value,) = data.encode("latin-1") if isinstance(data, str) else data
    return bool(value) if kind.kind == "b1" else int(value)


def _encode(text: str, encoding: Any = "utf-8") -> bytes:
    """Return the bytes that Python 3 writes as text in protocol 2."""
    if encoding not in ("latin1", "latin-1", b"latin1", b"latin-1"):
        raise _RefusedError("_codecs.encode to something else than latin1")
    return text.encode("latin-1")


def _empty_bytes() -> bytes:
    return b""


def _named_alike(modules: Sequence[str], names: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    return {f"{module}.{name}": found for module in modules for name, found in names.items()}


_KNOWN: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _encode,
    **_named_alike(("builtins", "__builtin__"), {"bytes": _empty_bytes}),
    **_named_alike(("numpy",), {"ndarray": _Array, "dtype": _Type}),
    **_named_alike(("numpy.core.multiarray", "numpy._core.multiarray"), {"_reconstruct": _Array, "scalar": _scalar}),
    **_named_alike(("numpy.core.numeric", "numpy._core.numeric"), {"_frombuffer": _Array.of_buffer}),
}
"""What stands for the functions and types that a set names. Nothing of NumPy's or Python's own is called."""


class _Dispatch(dict[int, Callable[..., Any]]):
    """What is done for each opcode."""

    def __missing__(self, code: int) -> Callable[..., Any]:
        names = [opcode.name for opcode in pickletools.opcodes if opcode.code == chr(code)]
        if not names:
            raise ValueError("no pickle")
        raise _RefusedError(f"the opcode {names[0]}")


class _Unpickler(pickle._Unpickler):
    """Python's own reader, in which a file can name nothing but `_KNOWN`.

    It is the one in Python: the faster one in C reserves as much memory as a damaged file asks for.
    """

    read: Callable[[int], bytes]
    append: Callable[[Any], None]

    def find_class(self, module: Any, name: Any) -> Callable[..., Any]:
        """Return the stand-in for a function or a type.

        Raises:
            _RefusedError: it is none of those that a set holds.
        """
        wanted = f"{module}.{name}"
        if wanted not in _KNOWN:
            raise _RefusedError(wanted)
        return _KNOWN[wanted]

    def _load_bytearray(self) -> None:
        length = int.from_bytes(self.read(8), "little")
        data = self.read(length)  # Python's own reserves the length first
        if len(data) != length:
            raise EOFError
        self.append(data)

    dispatch = _Dispatch(
        (getattr(pickle, name)[0], pickle._Unpickler.dispatch[getattr(pickle, name)[0]]) for name in _OPCODES
    )
    dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray
