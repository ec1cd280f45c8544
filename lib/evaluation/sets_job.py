"""The evaluate job on verification sets (`--pairs lfw.bin cfp_fp.bin`): `metrics.json` and the report.

The sets hold their own images, so no faces table and no photos are needed. This process embeds them.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from lib import storage
from lib.errors import UserError
from lib.evaluation.curves import RocCurve, roc_curve
from lib.evaluation.published_sets import METRICS_NAME, REPORT_NAME, Plan, about_model, other_template
from lib.evaluation.set_figures import Protocol, check_set, mean_figures, set_distances, set_figures, set_pairs
from lib.evaluation.sets_report import sets_page, text_table
from lib.evaluation.verification_sets import read_verification_set
from lib.recognition.embedder import Embedder, load_embedder, runtime_knows_gpus
from lib.recognition.encoded_crops import embed_images

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SetsPlan(Plan):
    """What to measure on which sets.

    Attributes:
        sets: URLs of the `.bin` files.
        models: URLs of the models.
        flip: whether to add the embedding of the mirror image. None leaves it to each model.
    """

    sets: tuple[str, ...]
    models: Sequence[str]
    flip: bool | None


def evaluate_sets(plan: SetsPlan) -> dict[str, Any]:
    """Measure the models on the sets, write `metrics.json` and the report, and return the first model's means.

    Raises:
        UserError: a file is not a verification set or cannot be measured; with `strict`, a model trained on other
            crops.
    """
    started = time.monotonic()
    embedders = [_loaded(plan, url) for url in plan.models]
    faces, advice = "the images of verification sets", ", or give photos and a list of pairs"
    notes = [note for each in embedders for note in other_template(each, faces, strict=plan.strict, advice=advice)]
    num_images = 0
    for url in plan.sets:  # each is read again later, because all of them together would take gigabytes
        one = read_verification_set(url)
        check_set(one, plan.protocol)
        num_images += len(one.images)
        if plan.protocol == "ours" and (note := set_pairs(one, seed=plan.seed).note):
            notes.append(note)
    result: dict[str, Any] = {"job": "evaluate", "report": storage.join(plan.output, REPORT_NAME)}
    if plan.dry_run:
        for note in notes:
            logger.warning("%s", note)
        logger.info("%d images of %d sets would be measured into %s", num_images, len(plan.sets), plan.output)
        return {**result, "dry_run": True, "images": num_images, "sets": len(plan.sets), "models": list(plan.models)}

    storage.check_writable(plan.output)
    models, curves = _measured(plan, embedders)
    notes += _failed(models)
    for note in notes:
        logger.warning("%s", note)
    means = write_figures(plan.output, models, curves, plan.protocol, plan.sets, seed=plan.seed, notes=notes)
    return {**result, **means, "images": num_images, "seconds": round(time.monotonic() - started, 1)}


def write_figures(
    output: str,
    models: Sequence[dict[str, Any]],
    curves: Mapping[str, Mapping[str, RocCurve]],
    protocol: Protocol,
    urls: Sequence[str],
    *,
    seed: int,
    notes: Sequence[str],
) -> dict[str, Any]:
    """Log the table, write `metrics.json` and the report, and return the means of the first model.

    Args:
        models: entry of each in `metrics.json`, with `sets` and their `mean`.
        curves: for each set the curve of each model.
        urls: of the sets.
    """
    for line in text_table(models):
        logger.info("%s", line)
    metrics = {
        **_means(models[0]),
        "protocol": protocol,
        "flip": all(model["flip"] for model in models),
        "pairs": [storage.redacted(url) for url in urls],
        "seed": seed,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "notes": notes,
        "models": models,
    }
    storage.write_bytes(storage.join(output, REPORT_NAME), sets_page(metrics, curves))
    storage.write_json(storage.join(output, METRICS_NAME), metrics)
    accuracies = {one["name"]: one["accuracy"] for one in models[0]["sets"]}
    return {**_means(models[0]), "sets": accuracies, "threshold_kept": False}


def _measured(
    plan: SetsPlan, embedders: Sequence[Embedder]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, RocCurve]]]:
    """Return the entry of each model in `metrics.json`, and for each set the curve of each model."""
    models = [{**about_model(name, embedder), "sets": []} for name, embedder in zip(plan.names, embedders, strict=True)]
    curves: dict[str, dict[str, RocCurve]] = {}
    for url in plan.sets:
        one = read_verification_set(url)
        pairs = set_pairs(one, seed=plan.seed)
        for model, embedder in zip(models, embedders, strict=True):
            label = f"embedding {one.name}" + (f" by {model['name']}" if len(models) > 1 else "")
            vectors_ND, failed_N = embed_images(embedder, one.images, label=label)
            if failed_N.all():
                raise UserError(f"{one.name}: not one of its {len(failed_N)} images is a square picture")
            model["sets"].append(set_figures(vectors_ND, failed_N, one, plan.protocol, seed=plan.seed))
            curve = roc_curve(set_distances(vectors_ND, failed_N, pairs), one.same_P)
            curves.setdefault(one.name, {})[model["name"]] = curve
    return [{**model, "mean": mean_figures(model["sets"])} for model in models], curves


def _loaded(plan: SetsPlan, url: str) -> Embedder:
    on_gpu = plan.gpus != 0 and torch.cuda.is_available() and (not url.endswith(".onnx") or runtime_knows_gpus())
    if plan.gpus not in ("auto", 0) and not on_gpu:
        raise UserError(f"--gpus is {plan.gpus}: verification sets are embedded by this process, which sees no GPU")
    return load_embedder(url, plan.onnx, device="cuda" if on_gpu else "cpu", flip=plan.flip)


def _failed(models: Sequence[dict[str, Any]]) -> list[str]:
    """Return a note for each set with images that cannot be read. They are the same for every model."""
    return [
        f"{one['name']}: {one['num_failed_images']} images are no square pictures and make every pair they are in an "
        "error"
        for one in models[0]["sets"]
        if one["num_failed_images"]
    ]


def _means(model: dict[str, Any]) -> dict[str, Any]:
    """Return the figures that every evaluation has in its result."""
    mean = model["mean"]
    return {
        "accuracy": mean["accuracy"],
        "accuracy_std": float(np.mean([one["accuracy_std"] for one in model["sets"]])),
        "auc": mean["auc"],
        "eer": mean["eer"],
        "num_pairs": mean["num_pairs"],
    }
