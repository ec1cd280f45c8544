"""The export job: writes a model as one ONNX file for uint8 faces, checked against the model on real faces.

Shape suffixes: N faces, H and W pixels, C channels, D embedding dimension.
"""

import io
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import onnx
import torch
import tyro
from torch import nn
from torch.nn import functional

from lib import storage
from lib.config import absolute_url, default_data_url
from lib.errors import JobError, UserError
from lib.faces import table
from lib.faces.export_faces import export_faces
from lib.faces.export_plan import FacesOut
from lib.layout import Layout
from lib.recognition.embedder import FlipFlag, chosen_flip, find_model, open_model
from lib.recognition.face_source import faces_source
from lib.recognition.model import EmbeddingModel, embed, resized_crops, standardized
from lib.recognition.onnx_model import METADATA_KEY, OnnxInput, OnnxModel
from lib.recognition.recognizer import decoded_crop

logger = logging.getLogger(__name__)

OPSET = 18
MAX_DIFFERENCE, MAX_MIRRORED_DIFFERENCE = 1e-3, 1e-5
"""Largest difference from the model in any value of an embedding, without and with mirror images in the graph.
Embeddings with mirror images have length 1. They differ by 2e-7 with ConvNeXt and EfficientNet."""

NUM_CROPS = 64
"""Number of real faces that check and time the file."""
TIMED_ROUNDS = 5
TIMED_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a model as an ONNX file, or a faces table in a format that other projects train on."""

    data: str = field(default_factory=default_data_url)
    """Folder or URL that holds everything, such as s3://bucket/folder. Default: $DATA_URL, else ./data."""
    to: Literal["onnx", "webdataset", "folder", "parquet"] = "onnx"
    """onnx: the model. Of the faces table: webdataset, tars with a .jpg and a .json for each face; folder,
    PERSON/PHOTO.jpg, as InsightFace trains on; parquet, with image and label as Hugging Face reads them."""
    model: str | None = None
    """Model folder, run folder or weights of iResNet. Default: the only run with a model below --data."""
    faces: str | None = None
    """Faces table to export, or whose crops check the ONNX file. Default: faces/ below --data."""
    output: str | None = None
    """File to write. Default: model.onnx in the run of the model, or beside a file of weights by its name. Of
    faces: the folder to write, which has no default."""
    flip: FlipFlag = False
    """Add mirror images in the file, even if the model does not."""
    no_flip: FlipFlag = False
    """Leave mirror images out of the file, even if the model adds them."""
    dry_run: bool = False
    """Check the input, then stop."""
    faces_out: FacesOut = field(default_factory=FacesOut)
    onnx: Annotated[OnnxInput, tyro.conf.arg(name="")] = field(default_factory=OnnxInput)

    def __post_init__(self) -> None:
        flip = chosen_flip(self.flip, self.no_flip)
        if self.to != "onnx":
            if self.output is None:
                raise UserError(f"--to {self.to} writes many files: name a folder for them by --output")
            if self.model is not None or flip is not None:
                raise UserError(f"--to {self.to} writes faces: leave out --model, --flip and --no-flip")
        elif self.output is not None and not self.output.endswith(".onnx"):
            raise UserError(f"--output is {self.output!r}: the file name must end in .onnx")


class _WholeModel(nn.Module):
    """The model and its normalisation. It takes uint8 RGB faces and returns embeddings."""

    mean_C: torch.Tensor
    std_C: torch.Tensor

    def __init__(self, model: EmbeddingModel) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean_C", torch.tensor(model.spec.mean))
        self.register_buffer("std_C", torch.tensor(model.spec.std))

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        images_NCHW = standardized(faces, self.mean_C, self.std_C)
        if not self.model.spec.flip:
            return self.model(images_NCHW)
        # One batch of faces and mirror images, so that the file holds the backbone only once.
        both_ND = self.model(torch.cat([images_NCHW, images_NCHW.flip(3)]), raw=True)
        return functional.normalize(both_ND[: len(faces)] + both_ND[len(faces) :], dim=1)


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the ONNX file if it agrees with the model, or the faces. Return the entries of the job's result."""
    layout = Layout(config.data)
    if config.to != "onnx":
        output = absolute_url(str(config.output), "--output")
        return export_faces(layout.faces(config.faces), output, config.to, config.faces_out, dry_run=config.dry_run)
    model_url = find_model(layout, config.model)
    if model_url.endswith(".onnx"):
        raise UserError(f"--model {model_url} is an ONNX file already: name a model folder of this project")
    opened = open_model(model_url, config.onnx, chosen_flip(config.flip, config.no_flip))
    model = opened.model
    folder, _, name = model_url.rstrip("/").rpartition("/")
    output = storage.join(folder, "model.onnx" if opened.is_folder else f"{name.rpartition('.')[0]}.onnx")
    if config.output is not None:
        output = absolute_url(config.output, "--output")
    crops_NHWC = resized_crops(real_crops(layout.faces(config.faces), NUM_CROPS), model.spec.image_size)
    result: dict[str, Any] = {"job": "export", "onnx": output, "faces_checked": len(crops_NHWC)}
    if config.dry_run:
        return {**result, "dry_run": True}

    storage.check_writable(output.rpartition("/")[0])
    logging.getLogger("onnx_ir").setLevel(logging.WARNING)  # it logs every tensor that it merges
    content = onnx_bytes(model, opened.digest, opened.template)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.onnx"
        path.write_bytes(content)
        exported = OnnxModel(str(path), OnnxInput())
    difference = largest_difference(model, exported, crops_NHWC)
    limit = MAX_MIRRORED_DIFFERENCE if model.spec.flip else MAX_DIFFERENCE
    if not difference <= limit:  # NaN too
        advice = "give --no-flip, and report" if model.spec.flip else "please report"
        raise JobError(
            f"the ONNX file gives embeddings that differ by {difference:.2g} from the model's, more than "
            f"{limit:g}: nothing was written; {advice} the backbone {model.spec.backbone!r}"
        )
    storage.write_bytes(output, content)
    rates = {
        "pytorch_faces_per_s": _rate(lambda: embed(model, crops_NHWC), len(crops_NHWC)),
        "onnxruntime_faces_per_s": _rate(lambda: exported.embed(crops_NHWC), len(crops_NHWC)),
    }
    logger.info("largest difference %.2g; faces/s: %s", difference, rates)
    return {**result, "bytes": len(content), "max_difference": difference, **rates, "threads": torch.get_num_threads()}


def onnx_bytes(model: EmbeddingModel, digest: str, template: str) -> bytes:
    """Return the model as an ONNX file: input `faces`, uint8 [N, S, S, 3] RGB; output `embeddings`, float32 [N, D].

    N is any number. The graph contains the normalisation, and mirror images if `spec.flip` is set. The metadata hold
    the threshold (a Euclidean distance), the fingerprint and the template of the faces, and `digest`. A gallery of the
    model has the same digest, so it works with the file, too.

    Raises:
        JobError: torch cannot export this backbone.
    """
    spec = model.spec
    whole = _WholeModel(model).eval().to("cpu")
    example = torch.zeros(2, spec.image_size, spec.image_size, 3, dtype=torch.uint8)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # deprecations within torch
            program = torch.onnx.export(
                whole,
                (example,),
                input_names=["faces"],
                output_names=["embeddings"],
                dynamic_shapes=({0: torch.export.Dim("num_faces")},),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        reason = str(error).strip().splitlines()[0]
        raise JobError(f"torch cannot export the backbone {spec.backbone!r} to ONNX: {reason}") from error
    assert program is not None
    proto = program.model_proto
    about = {
        "image_size": spec.image_size,
        "embedding_dim": spec.embedding_dim,
        "threshold": spec.threshold,
        "normalize": spec.normalize,
        "flip": spec.flip,
        "backbone": spec.backbone,
        "digest": digest,
        "template": template,
        "fingerprint": dict(spec.fingerprint),
        "metrics": dict(spec.metrics),
    }
    onnx.helper.set_model_props(proto, {METADATA_KEY: json.dumps(about)})
    sink = io.BytesIO()
    onnx.save(proto, sink)
    return sink.getvalue()


def real_crops(faces_url: str, num: int) -> np.ndarray:
    """Return up to `num` aligned faces [N, H, W, 3], uint8 RGB, of a faces table; those of the split test first.

    Raises:
        UserError: the table does not exist, or has no aligned photo.
    """
    source = faces_source(faces_url, table.SPLITS)
    crops: list[np.ndarray] = []
    for name in sorted(source.file_names, key=lambda name: (not name.startswith("split=test/"), name)):
        rows = storage.read_parquet(storage.join(faces_url, name), table.columns("crop"))
        crops.extend(decoded_crop(crop) for crop in rows["crop"].drop_null().slice(0, num - len(crops)).to_pylist())
        if len(crops) == num:
            break
    if not crops:
        raise UserError(f"{faces_url} holds no aligned face to check the file on: run jobs/preprocess.py on photos")
    return np.stack(crops)


def largest_difference(model: EmbeddingModel, exported: OnnxModel, crops_NHWC: np.ndarray) -> float:
    """Return the largest difference between values of the embeddings, over batches of one and of all."""
    whole_ND = embed(model, crops_NHWC)
    pairs = [(whole_ND, exported.embed(crops_NHWC)), (whole_ND[:1], exported.embed(crops_NHWC[:1]))]
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)


def _rate(run: Callable[[], object], num: int) -> float:
    """Return the faces per second: the median of a few rounds of `num` faces, of fewer rounds if they are slow."""
    seconds: list[float] = []
    while len(seconds) < TIMED_ROUNDS and sum(seconds) < TIMED_SECONDS:
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return round(num / float(np.median(seconds)), 1)
