"""The evaluate job on IJB-B and IJB-C (`--ijb FOLDER`): `metrics.json` and the report.

The set brings its own images, landmarks and pairs, so no faces table is needed. The cluster embeds the images part by
part into a table below the output; a job that was killed goes on there.
"""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from lib import storage
from lib.errors import UserError
from lib.evaluation.curves import RocCurve
from lib.evaluation.ijb_embedding import embed_ijb
from lib.evaluation.ijb_files import IjbSet, read_ijb
from lib.evaluation.ijb_identification import identification
from lib.evaluation.ijb_report import ijb_page, text_tables
from lib.evaluation.ijb_verification import verification
from lib.evaluation.published_sets import METRICS_NAME, REPORT_NAME, Plan, about_model, other_template
from lib.evaluation.templates import template_vectors
from lib.recognition.embedder import load_embedder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class IjbPlan(Plan):
    """What to measure on which set.

    Attributes:
        url: folder of the set.
        models: URLs of the models.
        is_shared: whether the report goes to a subfolder of the output with the set's name.
        flip: whether to add the embedding of the mirror image. None leaves it to each model.
    """

    url: str
    models: Sequence[str]
    is_shared: bool
    flip: bool | None


def evaluate_ijb(plan: IjbPlan) -> dict[str, Any]:
    """Measure the models on the set, write `metrics.json` and the report, and return the first model's figures.

    Raises:
        UserError: as `read_ijb` does; no image can be read; with `strict`, a model trained on other crops.
    """
    started = time.monotonic()
    embedders = [load_embedder(url, plan.onnx, flip=plan.flip) for url in plan.models]
    notes = [note for each in embedders for note in other_template(each, "the faces of IJB", strict=plan.strict)]
    one = read_ijb(plan.url)
    _check(one)
    output = storage.join(plan.output, one.name) if plan.is_shared else plan.output
    size = f"{len(one.images):,} images, {len(one.templates_T):,} templates, {len(one.same_P):,} pairs"
    result: dict[str, Any] = {"job": "evaluate", "report": storage.join(output, REPORT_NAME), "set": one.name}
    if plan.dry_run:
        for note in notes:
            logger.warning("%s", note)
        logger.info("%s: %s would be measured into %s", one.name, size, output)
        counts = {"images": len(one.images), "templates": len(one.templates_T), "num_pairs": len(one.same_P)}
        return {**result, "dry_run": True, **counts, "models": list(plan.models)}

    storage.check_writable(output)
    logger.info("%s: %s", one.name, size)
    if one.probes is None:
        notes.append(f"no identification: {one.name} has no files of galleries and probes here")
    models: list[dict[str, Any]] = []
    curves: dict[str, RocCurve] = {}
    for name, embedder in zip(plan.names, embedders, strict=True):
        files = embed_ijb(one, embedder, storage.join(output, "embeddings", name), onnx=plan.onnx, gpus=plan.gpus)
        figures, curves[name] = _measured(plan, one, files)
        models.append({**about_model(name, embedder), **figures})
    figures = _write(plan, one, output, models, curves, notes + _failed(models, one))
    return {**result, **figures, "seconds": round(time.monotonic() - started, 1)}


def _write(
    plan: IjbPlan,
    one: IjbSet,
    output: str,
    models: Sequence[dict[str, Any]],
    curves: Mapping[str, RocCurve],
    notes: Sequence[str],
) -> dict[str, Any]:
    """Log notes and tables, write `metrics.json` and the report, and return the first model's figures."""
    for note in notes:
        logger.warning("%s", note)
    for line in text_tables(models):
        logger.info("%s", line)
    main = {key: models[0]["verification"][key] for key in ("auc", "eer", "num_pairs", "tar_at_far")}
    metrics = {
        "set": one.name,
        **main,
        "protocol": plan.protocol,
        "images": storage.redacted(one.images_url),
        "num_images": len(one.images),
        "num_templates": len(one.templates_T),
        "seed": plan.seed,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "notes": notes,
        "models": models,
    }
    storage.write_bytes(storage.join(output, REPORT_NAME), ijb_page(metrics, curves))
    storage.write_json(storage.join(output, METRICS_NAME), metrics)
    found = models[0]["identification"]
    return {**main, "identification": found and found["mean"], "threshold_kept": False, "images": len(one.images)}


def _measured(plan: IjbPlan, one: IjbSet, files: Sequence[str]) -> tuple[dict[str, Any], RocCurve]:
    """Return the entry in `metrics.json` of a model whose embeddings are in these files, and its curve."""
    by_score = plan.protocol == "insightface"
    vectors_TD, failed_T, failed = template_vectors(one, files, by_score=by_score)
    if failed_T.all():
        reasons = ", ".join(f"{count} {status}" for status, count in failed.most_common())
        raise UserError(
            f"not one of the {len(one.images)} images in {storage.redacted(one.images_url)} can be read ({reasons})"
        )
    figures, curve = verification(vectors_TD, failed_T, one, plan.protocol, seed=plan.seed)
    found = identification(vectors_TD, failed_T, one, plan.protocol, seed=plan.seed)
    about = {"failed_images": dict(failed), "num_failed_templates": int(failed_T.sum()), "by_score": by_score}
    return {**about, "verification": figures, "identification": found}, curve


def _check(one: IjbSet) -> None:
    """Refuse pairs of one kind only, before anything is embedded."""
    num_same = int(one.same_P.sum())
    if num_same in (0, len(one.same_P)):
        raise UserError(
            f"{one.name}: {num_same} of {len(one.same_P)} pairs are of the same person: both kinds are needed"
        )


def _failed(models: Sequence[dict[str, Any]], one: IjbSet) -> list[str]:
    """Return a note about images that cannot be read. They are the same for every model."""
    failed = Counter(models[0]["failed_images"])
    if not failed:
        return []
    reasons = ", ".join(f"{count} {status}" for status, count in sorted(failed.items()))
    note = (
        f"{failed.total()} of {len(one.images)} images cannot be read ({reasons}) and are left out of their templates"
    )
    return [f"{note}; {models[0]['num_failed_templates']} templates have no other, and never match"]
