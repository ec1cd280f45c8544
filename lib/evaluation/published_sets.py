"""The parts that evaluations on published sets share: their flags, and their entries about a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib import cluster, storage
from lib.errors import UserError
from lib.evaluation.report import Table
from lib.evaluation.set_figures import Protocol
from lib.faces.alignment import ARCFACE
from lib.recognition.embedder import Embedder
from lib.recognition.onnx_model import OnnxInput

METRICS_NAME, REPORT_NAME = "metrics.json", "report.html"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to measure.

    Attributes:
        names: what the models are called.
        output: folder of the report.
    """

    names: Sequence[str]
    onnx: OnnxInput
    output: str
    protocol: Protocol
    gpus: cluster.Gpus = "auto"
    seed: int = 0
    strict: bool = False
    dry_run: bool = False


def about_model(name: str, embedder: Embedder) -> dict[str, Any]:
    """Return a model's entry in `metrics.json`, without its figures."""
    return {
        "name": name,
        "model": storage.redacted(embedder.url),
        "digest": embedder.digest,
        "template": embedder.template,
        "flip": embedder.flip,
    }


def about_table(metrics: Mapping[str, Any], measured_on: Mapping[str, str]) -> Table:
    """Return the table about the models and what they were measured on: labels and texts."""
    models = metrics["models"]
    return Table(
        title="What was measured",
        text="",
        header=["", *(model["name"] for model in models)],
        rows=[
            ["Model", *(model["model"] for model in models)],
            ["Digest of its weights and input", *(model["digest"] for model in models)],
            ["Alignment of its training faces", *(model["template"] for model in models)],
            ["Mirror images", *("added" if model["flip"] else "left out" for model in models)],
            *([label, *[text] * len(models)] for label, text in measured_on.items()),
            ["Measured", *[metrics["measured_at"]] * len(models)],
        ],
    )


def other_template(embedder: Embedder, faces: str, *, strict: bool, advice: str = "") -> list[str]:
    """Return a warning if the model's training faces were aligned in another way than these faces.

    Raises:
        UserError: with `strict`, such a model.
    """
    if embedder.template == ARCFACE:
        return []
    message = (
        f"{faces} are aligned to {ARCFACE!r}, and {storage.redacted(embedder.url)} was trained on faces aligned to "
        f"{embedder.template!r}: its figures are too low"
    )
    if strict:
        raise UserError(f"{message}; train on --aligned {ARCFACE} faces{advice}")
    return [message]
