"""The evaluate job: takes models, faces or photos, and pairs; writes `metrics.json` and the report.

Shapes: N photos, P pairs, D embedding.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from lib import storage
from lib.config import absolute_url
from lib.errors import JobError, UserError
from lib.evaluation.evaluate_config import EvaluateConfig as EvaluateConfig  # Callers take it from here.
from lib.evaluation.findings import read_slices, slice_figures
from lib.evaluation.ijb_job import IjbPlan, evaluate_ijb
from lib.evaluation.listed_photos import photos_and_pairs
from lib.evaluation.lists_job import ListsPlan, evaluate_lists
from lib.evaluation.metrics import check_folds, kfold_accuracy
from lib.evaluation.model_metrics import Measured, Photos, check_embedded, chosen_threshold, measure
from lib.evaluation.pairs import Pairs
from lib.evaluation.published_sets import METRICS_NAME, REPORT_NAME
from lib.evaluation.remarks import accuracy_difference, notes_of
from lib.evaluation.report_content import present
from lib.evaluation.sets_job import SetsPlan, evaluate_sets
from lib.layout import Layout
from lib.recognition.embed_job import embed_source
from lib.recognition.embed_job import model_name as name_of
from lib.recognition.embedder import (
    Embedder,
    TorchEmbedder,
    extraction_settings,
    find_model,
    load_embedder,
)
from lib.recognition.embeddings_table import read_embeddings
from lib.recognition.face_source import Source, check_source, faces_source, photos_source
from lib.recognition.model import keep_threshold, was_evaluated

logger = logging.getLogger(__name__)

SUSPECTS_NAME = "suspects.csv"

KEPT_FIGURES = ("accuracy", "accuracy_std", "auc", "eer", "num_pairs")
"""Metrics in the job's result. The model keeps them beside its threshold."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure the models, write `metrics.json` and the report, and return the first model's metrics."""
    started = time.monotonic()
    layout = Layout(config.data)
    urls = [find_model(layout, given) for given in config.model or (None,)]
    if config.has_sets:
        return evaluate_sets(_sets_plan(config, layout, urls))
    if config.ijb is not None:
        return evaluate_ijb(_ijb_plan(config, absolute_url(config.ijb, "--ijb"), layout, urls))
    embedders = [load_embedder(url, config.onnx, flip=config.chosen_flip) for url in urls]
    sources = [_source(config, layout, embedder) for embedder in embedders]
    if config.has_lists:
        return evaluate_lists(_lists_plan(config, layout, urls, embedders, sources))
    pairs_url = absolute_url(config.pairs[0], "--pairs") if config.pairs else None
    photos, pairs, sources = photos_and_pairs(
        sources,
        pairs_url,
        config.taken,
        num_pairs=config.num_pairs,
        seed=config.seed,
        whole_split=config.whole_split,
    )
    check_folds(pairs.same_P, pairs.fold_P)
    if config.strict or config.dry_run:  # otherwise each model is checked when its turn comes
        for source, embedder in zip(sources, embedders, strict=True):
            check_source(source, embedder, strict=config.strict)
    output = _output(config, layout, urls[0])
    result: dict[str, Any] = {"job": "evaluate", "report": storage.join(output, REPORT_NAME)}
    if config.dry_run:
        if pairs.note:
            logger.warning("%s", pairs.note)
        logger.info("%d pairs of %d photos would be measured into %s", len(pairs), len(photos.names), output)
        return {**result, "dry_run": True, "num_pairs": len(pairs), "photos": len(photos.names), "models": urls}

    storage.check_writable(output)
    models = list(zip(_names(urls), embedders, sources, strict=True))
    figures = _write_report(config, output, models, photos, pairs)
    return {**result, **figures, "seconds": round(time.monotonic() - started, 1)}


def _write_report(
    config: EvaluateConfig, output: str, models: Sequence[tuple[str, Embedder, Source]], photos: Photos, pairs: Pairs
) -> dict[str, Any]:
    """Measure the models, write `metrics.json` and the report, and return the entries of the job's result."""
    slices, num_unknown = read_slices(config.slices, photos.names) if config.slices is not None else ({}, 0)
    measured = [_measured(config, output, *model, photos, pairs) for model in models]
    for each in measured:
        kfold = kfold_accuracy(each.distances_P, pairs.same_P, pairs.fold_P)
        each.figures["slices"] = slice_figures(
            slices, each.distances_P, pairs, kfold, chosen_threshold(each.figures), config.at_far
        )
    kept = _keep_thresholds(config, measured)
    metrics = {
        **{name: measured[0].figures[name] for name in KEPT_FIGURES},
        "pairs": storage.redacted(absolute_url(config.pairs[0], "--pairs")) if config.pairs else None,
        "seed": config.seed,
        "faces_within": str(config.taken) or None,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "notes": notes_of(photos, pairs, measured, num_unknown),
        "difference": accuracy_difference(measured),
        "models": [each.figures for each in measured],
    }
    page, found = present(measured, photos, pairs, metrics)
    storage.write_bytes(storage.join(output, SUSPECTS_NAME), found)
    storage.write_bytes(storage.join(output, REPORT_NAME), page)
    storage.write_json(storage.join(output, METRICS_NAME), metrics)
    return {
        **{name: metrics[name] for name in KEPT_FIGURES},
        "threshold": chosen_threshold(measured[0].figures),
        "operating_point": measured[0].figures["operating_point"],
        "threshold_kept": kept,
        "photos": len(photos.names),
    }


def _measured(
    config: EvaluateConfig, output: str, name: str, embedder: Embedder, source: Source, photos: Photos, pairs: Pairs
) -> Measured:
    """Embed the faces with a model, and return its metrics."""
    folder = storage.join(output, "embeddings", name)
    # These files are from an earlier report of other pairs or of an earlier model.
    embed_source(source, embedder, folder, onnx=config.onnx, strict=config.strict, gpus=config.gpus, overwrite=True)
    made = read_embeddings(folder)
    check_embedded(made, folder)
    return measure(
        name,
        embedder,
        source,
        made,
        photos,
        pairs,
        tolerance=config.tolerance,
        with_original=not config.pairs,
        seed=config.seed,
        at_far=config.at_far,
    )


def _sets_plan(config: EvaluateConfig, layout: Layout, urls: Sequence[str]) -> SetsPlan:
    return SetsPlan(
        sets=tuple(absolute_url(url, "--pairs") for url in config.pairs),
        models=urls,
        flip=config.chosen_flip,
        output=_sets_output(config, layout, urls[0]),
        **_how(config, urls),
    )


def _lists_plan(
    config: EvaluateConfig,
    layout: Layout,
    urls: Sequence[str],
    embedders: Sequence[Embedder],
    sources: Sequence[Source],
) -> ListsPlan:
    return ListsPlan(
        lists=[absolute_url(url, "--pairs") for url in config.pairs],
        embedders=embedders,
        sources=sources,
        within=config.taken,
        output=_sets_output(config, layout, urls[0]),
        **_how(config, urls),
    )


def _ijb_plan(config: EvaluateConfig, url: str, layout: Layout, urls: Sequence[str]) -> IjbPlan:
    return IjbPlan(
        url=url,
        models=urls,
        flip=config.chosen_flip,
        output=_output(config, layout, urls[0]),
        is_shared=config.output is None,
        **_how(config, urls),
    )


def _how(config: EvaluateConfig, urls: Sequence[str]) -> dict[str, Any]:
    """Return the fields of every `Plan`, except its output."""
    same = {name: getattr(config, name) for name in ("onnx", "protocol", "gpus", "seed", "strict", "dry_run")}
    return {"names": _names(urls), **same}


def _sets_output(config: EvaluateConfig, layout: Layout, first_model: str) -> str:
    report = _output(config, layout, first_model)
    # The report of the other evaluation stays beside it.
    return storage.join(report, "sets") if config.output is None else report


def _output(config: EvaluateConfig, layout: Layout, first_model: str) -> str:
    run, _, last = first_model.rstrip("/").rpartition("/")
    given = storage.join(run, "report") if config.output is None and last == "model" else config.output
    return layout.output("report", given)


def _names(urls: Sequence[str]) -> list[str]:
    names = [name_of(url) for url in urls]
    return [name if names.count(name) == 1 else f"{name} ({n})" for n, name in enumerate(names, 1)]


def _source(config: EvaluateConfig, layout: Layout, embedder: Embedder) -> Source:
    if config.photos is None:
        return faces_source(layout.faces(config.faces), config.splits)
    return photos_source(
        layout.photos(config.photos),
        config.identities and absolute_url(config.identities, "--identities"),
        # One face per photo, whatever the model was trained on, because pairs name photos.
        replace(extraction_settings(embedder, config.detector_weights), policy="prominent"),
        split_seed=config.split_seed,
        splits=config.splits,
        reading=config.reading,
    )


def _keep_thresholds(config: EvaluateConfig, measured: Sequence[Measured]) -> bool:
    """Write the threshold into each model without one, or into all; return whether the first model got it."""
    kept = False
    for n, each in enumerate(measured):
        if not isinstance(each.embedder, TorchEmbedder) or not each.embedder.is_folder:
            continue  # a file stays as it is
        is_own_flip = each.embedder.flip == each.embedder.own_flip
        if config.keep_threshold or (is_own_flip and not was_evaluated(each.embedder.url)):
            figures = {name: each.figures[name] for name in KEPT_FIGURES}
            if each.figures["operating_point"]:
                figures["operating_point"] = each.figures["operating_point"]
            threshold = chosen_threshold(each.figures)
            try:
                keep_threshold(each.embedder.url, threshold, figures, flip=each.embedder.flip)
            except (UserError, JobError) as error:  # a shared model may be read-only; the report is what matters
                logger.warning("could not write threshold %.4f into the model: %s", threshold, error)
                continue
            logger.info("wrote threshold %.4f into %s", threshold, each.embedder.url)
            each.figures["model_threshold"] = threshold
            kept = kept or n == 0
        elif not is_own_flip:
            logger.warning(
                "%s stays as it is, %s mirror images: --keep-threshold keeps --%sflip and its threshold",
                each.embedder.url,
                "with" if each.embedder.own_flip else "without",
                "no-" if each.embedder.own_flip else "",
            )
        elif config.at_far is not None:
            logger.warning("%s keeps the threshold that it has: --keep-threshold replaces it", each.embedder.url)
    return kept
