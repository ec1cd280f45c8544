"""The evaluate job on several lists of pairs, or on one list by InsightFace's protocol. It reports one table.

The photos come from a faces table or are raw. Each photo is embedded once, even if several lists name it.

Shapes: N photos, P pairs.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib import storage
from lib.evaluation.curves import RocCurve, roc_curve
from lib.evaluation.listed_photos import photos_and_lists
from lib.evaluation.model_metrics import Photos, check_embedded, of_photos
from lib.evaluation.pair_lists import list_names
from lib.evaluation.pairs import Pairs
from lib.evaluation.published_sets import REPORT_NAME, Plan, about_model
from lib.evaluation.remarks import train_note
from lib.evaluation.set_figures import check_pairs, mean_figures, pair_figures, set_distances
from lib.evaluation.sets_job import write_figures
from lib.faces.face_filter import FaceFilter
from lib.recognition.embed_job import embed_source
from lib.recognition.embedder import Embedder
from lib.recognition.embeddings_table import Embeddings, read_embeddings
from lib.recognition.face_source import Source, check_source

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ListsPlan(Plan):
    """What to measure on which lists.

    Attributes:
        lists: URLs of the files of pairs.
        sources: the photos, as each model needs them.
    """

    lists: Sequence[str]
    embedders: Sequence[Embedder]
    sources: Sequence[Source]
    within: FaceFilter


def evaluate_lists(plan: ListsPlan) -> dict[str, Any]:
    """Measure the models on the lists, write `metrics.json` and the report, and return the first model's means.

    Raises:
        UserError: as `read_pairs` does; a list without figures; with `strict`, faces of other settings.
    """
    started = time.monotonic()
    names = list(list_names(plan.lists).values())
    photos, lists, sources = photos_and_lists(plan.sources, plan.lists, plan.within, seed=plan.seed)
    for name, pairs in zip(names, lists, strict=True):
        check_pairs(name, pairs, plan.protocol)
    if plan.strict or plan.dry_run:
        for source, embedder in zip(sources, plan.embedders, strict=True):
            check_source(source, embedder, strict=plan.strict)
    notes = [f"{name}: {pairs.note}" for name, pairs in zip(names, lists, strict=True) if pairs.note]
    notes += train_note(photos, lists, sources[0])
    result: dict[str, Any] = {"job": "evaluate", "report": storage.join(plan.output, REPORT_NAME)}
    num_pairs = sum(map(len, lists))
    if plan.dry_run:
        for note in notes:
            logger.warning("%s", note)
        logger.info("%d pairs of %d photos would be measured into %s", num_pairs, len(photos.names), plan.output)
        models = [embedder.url for embedder in plan.embedders]
        return {**result, "dry_run": True, "num_pairs": num_pairs, "photos": len(photos.names), "models": models}

    storage.check_writable(plan.output)
    measured: list[dict[str, Any]] = []
    curves: dict[str, dict[str, RocCurve]] = {name: {} for name in names}
    for model_name, embedder, source in zip(plan.names, plan.embedders, sources, strict=True):
        folder = storage.join(plan.output, "embeddings", model_name)
        embed_source(source, embedder, folder, onnx=plan.onnx, strict=plan.strict, gpus=plan.gpus, overwrite=True)
        made = read_embeddings(folder)
        check_embedded(made, folder)
        model = {**about_model(model_name, embedder), "sets": []}
        notes += _add_figures(model, curves, made, photos, dict(zip(names, lists, strict=True)), plan)
        measured.append({**model, "mean": mean_figures(model["sets"])})
    for note in notes:
        logger.warning("%s", note)
    means = write_figures(plan.output, measured, curves, plan.protocol, plan.lists, seed=plan.seed, notes=notes)
    return {**result, **means, "photos": len(photos.names), "seconds": round(time.monotonic() - started, 1)}


def _add_figures(
    model: dict[str, Any],
    curves: dict[str, dict[str, RocCurve]],
    made: Embeddings,
    photos: Photos,
    lists: dict[str, Pairs],
    plan: ListsPlan,
) -> list[str]:
    """Add the figures of each list to a model, and its curves. Return notes about photos without an embedding."""
    vectors_ND, failed_N, statuses = of_photos(made, photos)
    for name, pairs in lists.items():
        in_pairs_N = np.zeros(len(failed_N), bool)
        in_pairs_N[np.concatenate([pairs.a_P, pairs.b_P])] = True
        figures = pair_figures(name, vectors_ND, failed_N, pairs, photos.people_N, plan.protocol, seed=plan.seed)
        model["sets"].append({**figures, "num_failed_images": int((failed_N & in_pairs_N).sum())})
        curves[name][model["name"]] = roc_curve(set_distances(vectors_ND, failed_N, pairs), pairs.same_P)
    reasons = Counter(statuses[n] for n in np.flatnonzero(failed_N))
    if not reasons:
        return []
    named = ", ".join(f"{count} {status}" for status, count in sorted(reasons.items()))
    shown = ", ".join(photos.names[n] for n in np.flatnonzero(failed_N)[:5])
    note = f"{model['name']}: {reasons.total()} photos have no embedding ({named}), such as {shown}"
    return [f"{note}; they make every pair they are in an error"]
