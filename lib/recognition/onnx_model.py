"""Any ONNX file that takes an aligned face and returns one vector, as an `Embedder`.

Only the graph of the file runs: external data is refused, and only ONNX Runtime's own operators exist.

Shape suffixes: N faces, H and W pixels, C channels, D embedding dimension.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import onnxruntime

from lib.errors import UserError
from lib.faces.alignment import ARCFACE, EYES
from lib.recognition.model import resized_crops
from lib.recognition.onnx_outputs import embedding_output
from lib.recognition.onnx_session import GPU_PROVIDER, REFUSED, first_line, open_session
from lib.storage import read_bytes

logger = logging.getLogger(__name__)

METADATA_KEY = "conv-facenet"
"""Key in the file's metadata for a model of this project as JSON, see `lib.recognition.export_job`."""

ARCFACE_SIZE = 112

AT_ONCE = {"cpu": 8, "cuda": 64}
"""Faces of a run where the file takes any number. On CPUs more are slower, and take gigabytes."""

_DTYPES = {"tensor(float16)": np.float16, "tensor(double)": np.float64}
"""Input types besides float32 that get the same values."""


@dataclass(frozen=True, kw_only=True)
class OnnxInput:
    """Input of a model from elsewhere, ONNX or weights. Files of jobs/export.py describe their own."""

    alignment: Literal["arcface-112", "faces"] = "arcface-112"
    """Model from elsewhere: arcface-112 aligns to the five points of most public models; faces uses the crops of the
    faces table."""
    layout: Literal["nchw", "nhwc"] = "nchw"
    """ONNX model: order of the input's axes."""
    color: Literal["rgb", "bgr"] = "rgb"
    """Model from elsewhere: order of the color channels."""
    input_size: int | None = None
    """ONNX model: side of the input, in pixels. Default: what the file says, else 112."""
    model_output: str | None = None
    """ONNX model: name of the output that holds the embedding. Default: the first, if no other could be one."""
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    """Model from elsewhere: value subtracted from pixels of 0 to 255, per channel."""
    std: tuple[float, float, float] = (127.5, 127.5, 127.5)
    """Model from elsewhere: value by which the result is divided, per channel."""
    normalize: bool = True
    """Model from elsewhere: scale its vectors to length 1, as cosine similarity does."""

    def __post_init__(self) -> None:
        if min(self.std) <= 0:
            raise UserError(f"--std is {' '.join(map(str, self.std))}: allowed is anything above 0")
        if self.input_size is not None and not 16 <= self.input_size <= 4096:
            raise UserError(f"--input-size is {self.input_size}: allowed are 16 to 4096 pixels")


class OnnxModel:
    """An ONNX file in use, see `Embedder`; `flip` overrules whether mirror images are added.

    A file of jobs/export.py that was made with mirror images has them in its graph. For others they are added here, to
    the vectors as the file gives them.

    Raises:
        UserError: the file is no ONNX model, keeps data elsewhere, its input or output does not fit, or several of its
            outputs could be the embedding; mirror images that cannot be left out, or for which vectors would have to
            stay raw.
    """

    def __init__(self, url: str, wanted: OnnxInput, *, device: str = "cpu", flip: bool | None = None) -> None:
        content = read_bytes(url)
        self.url = url
        self._session = open_session(url, content, device)
        self._about = _own_metadata(url, self._session)
        self._wanted = wanted
        self.threshold: float | None = self._about.get("threshold")
        self.fingerprint: Mapping[str, Any] = self._about.get("fingerprint", {})
        self.digest = self._about.get("digest") or self._digest(content)
        self._adds_mirror = self._must_add_mirror(flip)
        self.flip = self._adds_mirror or bool(self._about.get("flip"))
        if self._adds_mirror:
            self.digest = hashlib.sha256(f"{self.digest} with mirror images".encode()).hexdigest()[:16]
            self.threshold = None
        if self._about or wanted.alignment == "faces":
            self.template = self._about.get("template") or self.fingerprint.get("template", EYES)
        else:
            self.template = ARCFACE
        if not (self._session.get_inputs() and self._output_names()):
            raise UserError(f"{url!r} has no input or no output: give a model that takes one picture")
        self._input = self._session.get_inputs()[0]
        first = self._input.shape[0] if self._input.shape else None
        on_gpu = GPU_PROVIDER in self._session.get_providers()
        self._at_once = AT_ONCE["cuda" if on_gpu else "cpu"]
        self._batch_size = first if isinstance(first, int) and first > 0 else None
        self._dtype = _DTYPES.get(self._input.type, np.float32)
        self._size = self._about.get("image_size") or self._input_size()
        self._output, self.embedding_dim = self._probe()

    def embed(self, crops_NHWC: np.ndarray) -> np.ndarray:
        """Return float32 embeddings_ND of uint8 RGB crops of any size."""
        crops_NHWC = resized_crops(crops_NHWC, self._size)
        vectors_ND = self._vectors(crops_NHWC)
        if self._adds_mirror:
            vectors_ND += self._vectors(np.ascontiguousarray(crops_NHWC[:, :, ::-1]))
        elif self._about or not self._wanted.normalize:
            return vectors_ND
        # A zero vector stays zero: NaN would look like an error of the model.
        return vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), 1e-12)

    def _vectors(self, crops_NHWC: np.ndarray) -> np.ndarray:
        """Return what the file gives for crops of its size, float32 [N, D]."""
        images = self._images(crops_NHWC)
        at_once = self._batch_size or self._at_once
        starts = range(0, len(images), at_once) or [0]
        vectors = [self._run(images[n : n + at_once], [self._output])[0] for n in starts]
        return np.concatenate(vectors).reshape(len(images), -1).astype(np.float32)

    def _digest(self, content: bytes) -> str:
        """Return the digest of somebody's file. That its first output is named changes nothing."""
        taken = asdict(self._wanted)
        if taken["model_output"] in (None, *self._output_names()[:1]):
            del taken["model_output"]
        return hashlib.sha256(content + json.dumps(taken, sort_keys=True).encode()).hexdigest()[:16]

    def _must_add_mirror(self, flip: bool | None) -> bool:
        if self._about.get("flip"):
            if flip is False:
                raise UserError(
                    f"{self.url!r} adds mirror images in its graph: leave --no-flip out, or make a file without them "
                    "by jobs/export.py --no-flip"
                )
            return False
        if flip and not self._about.get("normalize", self._wanted.normalize):
            raise UserError(f"--flip gives vectors of length 1, and {self.url!r} raw ones (--no-normalize): drop one")
        return bool(flip)

    def buffer(self, num: int) -> np.ndarray:
        """Return an empty array for so many crops of the size that the model takes."""
        return np.empty((num, self._size, self._size, 3), np.uint8)

    def launch(self, crops_NHWC: np.ndarray) -> Callable[[], np.ndarray]:
        """Embed crops, and return what returns them: ONNX Runtime waits for its device."""
        embeddings_ND = self.embed(crops_NHWC)
        return lambda: embeddings_ND

    def _images(self, crops_NHWC: np.ndarray) -> np.ndarray:
        if self._about:
            return crops_NHWC  # normalisation and layout are in the graph
        wanted = self._wanted
        ordered_NHWC = crops_NHWC[..., ::-1] if wanted.color == "bgr" else crops_NHWC
        mean_C, std_C = np.array(wanted.mean, np.float32), np.array(wanted.std, np.float32)
        images = (ordered_NHWC.astype(np.float32) - mean_C) / std_C
        if wanted.layout == "nchw":
            images = images.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(images, self._dtype)

    def _run(self, images: np.ndarray, names: list[str]) -> list[np.ndarray]:
        """Return these outputs for images; a file with a fixed batch is padded with empty images."""
        missing = max(0, (self._batch_size or 0) - len(images))
        batch = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)]) if missing else images
        try:
            outputs = [np.asarray(each) for each in self._session.run(names, {self._input.name: batch})]
            return [each[: len(images)] if missing and each.ndim else each for each in outputs]
        except REFUSED as error:
            raise UserError(
                f"{self.url!r} does not take faces of shape {list(images.shape)}, {images.dtype}; its input is "
                f"{self._input.name}: {self._input.shape}, {self._input.type}: {self._remedy()} ({first_line(error)})"
            ) from error

    def _remedy(self) -> str:
        """Return the next step for a file that does not take faces as they are given."""
        if self._about:
            return "make the file again with jobs/export.py"
        if self._input.type not in (*_DTYPES, "tensor(float)"):
            return "export it with an input of float32"
        channels = self._input.shape[1 if self._wanted.layout == "nchw" else 3]
        if isinstance(channels, int) and channels != 3:
            return f"a model of three colours is needed, not {channels}"
        return "correct --input-size" if self._wanted.input_size else "give the right one by --input-size"

    def _output_names(self) -> list[str]:
        """Return the outputs that are arrays; classifiers of other libraries give maps, too."""
        return [str(each.name) for each in self._session.get_outputs() if each.type.startswith("tensor(")]

    def _input_size(self) -> int:
        if len(self._session.get_inputs()) != 1:
            inputs = ", ".join(f"{each.name} {each.shape}" for each in self._session.get_inputs())
            raise UserError(f"{self.url!r} takes {inputs}: export it with the picture as its only input")
        if len(self._input.shape) != 4:
            raise UserError(
                f"{self.url!r} takes {self._input.shape}: a model that takes a picture, in four axes, is needed"
            )
        known = self._known_sides(self._wanted.layout)
        size = self._wanted.input_size or (known[0] if known else ARCFACE_SIZE)
        if any(side != size for side in known):
            raise UserError(
                f"{self.url!r} takes {self._input.shape}, not squares of {size} pixels in the layout "
                f"{self._wanted.layout}: {self._size_remedy(known)}"
            )
        return size

    def _known_sides(self, layout: str) -> list[int]:
        sides = self._input.shape[2:] if layout == "nchw" else self._input.shape[1:3]
        return [side for side in sides if isinstance(side, int)]

    def _size_remedy(self, known: list[int]) -> str:
        other = "nhwc" if self._wanted.layout == "nchw" else "nchw"
        if len(set(known)) == 1:
            return f"correct --input-size to {known[0]}, or leave it out"
        if len(set(self._known_sides(other))) == 1:
            return f"give --layout {other}"
        return "a model that takes squares is needed"

    def _probe(self) -> tuple[str, int]:
        """Return the output with the embedding and its length, which the file may not state."""
        names = self._output_names()
        outputs = self._run(self._images(np.zeros((1, self._size, self._size, 3), np.uint8)), names)
        return embedding_output(self.url, dict(zip(names, outputs, strict=True)), self._wanted.model_output)


def _own_metadata(url: str, session: onnxruntime.InferenceSession) -> dict[str, Any]:
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        return {}
    try:
        about = json.loads(text)
    except ValueError:
        about = None
    wanted = {"image_size": int, "fingerprint": dict, "threshold": float | int | None, "digest": str}
    if isinstance(about, dict) and all(isinstance(about.get(name), kind) for name, kind in wanted.items()):
        threshold = about["threshold"]
        if 16 <= about["image_size"] <= 4096 and (threshold is None or math.isfinite(threshold)):
            return about
    raise UserError(f"the metadata of {url!r} is damaged: make the file again with jobs/export.py")
