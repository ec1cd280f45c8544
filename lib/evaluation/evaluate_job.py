"""The evaluate job: takes models, faces or photos, and pairs; writes `metrics.json` and the report.

Shapes: N photos, P pairs, D embedding.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Annotated, Any

import numpy as np
import tyro

from lib import cluster, storage
from lib.config import absolute_url, default_data_url
from lib.errors import JobError, UserError
from lib.evaluation.findings import read_slices, slice_figures
from lib.evaluation.listed_photos import photos_and_pairs
from lib.evaluation.metrics import check_folds, kfold_accuracy
from lib.evaluation.model_metrics import Measured, check_embedded, chosen_threshold, measure
from lib.evaluation.remarks import accuracy_difference, notes_of
from lib.evaluation.report_content import present
from lib.evaluation.set_figures import Protocol
from lib.evaluation.sets_job import METRICS_NAME, REPORT_NAME, SetsPlan, evaluate_sets
from lib.evaluation.verification_sets import is_verification_set, set_name
from lib.faces import table
from lib.faces.face_filter import FaceFilter, face_filter
from lib.layout import Layout
from lib.recognition.embed_job import embed_source
from lib.recognition.embed_job import model_name as name_of
from lib.recognition.embedder import Embedder, extraction_settings, find_model, load_embedder
from lib.recognition.embeddings_table import read_embeddings
from lib.recognition.face_source import Source, check_source, faces_source, photos_source
from lib.recognition.model import keep_threshold, was_evaluated
from lib.recognition.onnx_model import OnnxInput

logger = logging.getLogger(__name__)

SUSPECTS_NAME = "suspects.csv"

KEPT_FIGURES = ("accuracy", "accuracy_std", "auc", "eer", "num_pairs")
"""Metrics in the job's result, and in the model beside the threshold they belong to."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure how well a model tells people apart."""

    data: str = field(default_factory=default_data_url)
    """Folder or URL that holds everything, such as s3://bucket/folder. Default: $DATA_URL, else ./data."""
    model: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Model folder, run folder or .onnx file. Give it twice to compare two. Default: the only run below --data."""
    faces: str | None = None
    """Faces table. Default: faces/ below --data."""
    photos: str | None = None
    """Raw photos instead of a faces table. They are aligned as each model needs it."""
    identities: str | None = None
    """File of lines "photo-name identity" for --photos. Default: identities.txt beside the photos, else their
    folders."""
    pairs: tuple[str, ...] = ()
    """Pairs to judge: .txt in LFW's format, or .csv or .parquet with photo_a, photo_b, same. Or one or several
    verification sets (lfw.bin cfp_fp.bin), which hold their own faces. Default: made from --split."""
    protocol: Protocol = "ours"
    """With verification sets: ours, with intervals, or insightface, as published figures are made (implies --flip)."""
    flip: bool = False
    """With verification sets: add the embedding of the mirror image to that of the image."""
    split: str = "test"
    """Without --pairs: split whose photos make the pairs: train, val, test, or all."""
    num_pairs: int = 6_000
    """Without --pairs: number of pairs, in 10 folds that share no person."""
    seed: int = 0
    """Seed of the pairs and of the bootstrap."""
    min_quality: float = 0.0
    """Measure on faces of at least this quality, 0 to 1. Pairs with another face are left out."""
    where: str = ""
    """Measure on faces within ranges of the columns eye_distance, sharpness, brightness, contrast, yaw, pitch, roll and
    quality, such as yaw=-30:30,sharpness=50: with one end or both."""
    tolerance: float | None = None
    """Threshold for the table of the original project. Default: the model's threshold, else the best one."""
    slices: str | None = None
    """CSV file with the columns photo and attribute. Each attribute gets metrics of its own."""
    output: str | None = None
    """Folder for the report. Default: report/ in the model's run, or report/ below --data."""
    at_far: float | None = None
    """Choose the threshold for this share of false accepts, such as 1e-4, instead of for the highest accuracy."""
    keep_threshold: bool = False
    """Replace the threshold of an earlier evaluation in the model. A model without one always gets it."""
    detector_weights: str | None = None
    """With --photos: weights file of the detector, if the model's faces were made with one."""
    split_seed: int = 0
    """With --photos: seed of the split of identities into train, val and test."""
    gpus: cluster.Gpus = "auto"
    """GPUs to embed on. auto: all of the cluster. 0: none."""
    strict: bool = False
    """Stop if the faces were made with other settings than a model's training faces. Without it the job warns."""
    dry_run: bool = False
    """Check models, photos and pairs and print the plan, then stop."""
    onnx: Annotated[OnnxInput, tyro.conf.arg(name="")] = field(default_factory=OnnxInput)

    def __post_init__(self) -> None:
        if len(self.model) > 2:
            raise UserError(f"--model is given {len(self.model)} times: one model, or two side by side")
        if self.faces is not None and self.photos is not None:
            raise UserError("--faces and --photos are both given: choose one")
        self._check_pairs()
        if self.split not in (*table.SPLITS, "all"):
            raise UserError(f"--split is {self.split!r}: allowed are {', '.join(table.SPLITS)} and all")
        if self.tolerance is not None and not 0 <= self.tolerance < np.inf:
            raise UserError(f"--tolerance is {self.tolerance}: a distance, 0 or more")
        if self.at_far is not None and not 0 < self.at_far < 1:
            raise UserError(f"--at-far is {self.at_far}: a share between 0 and 1, such as 1e-4")
        if self.taken and self.photos is not None:
            raise UserError("--min-quality and --where look at the columns of a faces table: leave --photos out")
        cluster.check_gpus(self.gpus)
        for flag, value in (("--seed", self.seed), ("--split-seed", self.split_seed)):
            if value < 0:
                raise UserError(f"{flag} is {value}: 0 or more")

    def _check_pairs(self) -> None:
        """Check --pairs, and that no flag is given that means nothing for them."""
        sets = [is_verification_set(url) for url in self.pairs]
        if len(sets) > 1 and not all(sets):
            raise UserError(f"--pairs names {len(sets)} files: one list of pairs, or verification sets (.bin) only")
        for flag, given in (("--protocol insightface", self.protocol != "ours"), ("--flip", self.flip)):
            if given and not any(sets):
                raise UserError(f"{flag} is for verification sets: --pairs lfw.bin, or leave the flag out")
        for flag, given in (
            ("--photos", self.photos is not None),
            ("--slices", self.slices is not None),
            ("--min-quality or --where", bool(self.min_quality or self.where)),
            ("--tolerance", self.tolerance is not None),
            ("--at-far", self.at_far is not None),
            ("--keep-threshold", self.keep_threshold),
        ):
            if given and any(sets):
                raise UserError(f"{flag} means nothing for verification sets (.bin): leave it out")
        names = [set_name(url) for url in self.pairs]
        if len(set(names)) < len(names):
            raise UserError(
                f"--pairs names two sets that are called {max(names, key=names.count)!r}: rename one of them"
            )

    @property
    def has_sets(self) -> bool:
        """Whether --pairs names verification sets."""
        return bool(self.pairs) and is_verification_set(self.pairs[0])

    @property
    def taken(self) -> FaceFilter:
        """Which faces are measured on."""
        return face_filter(self.min_quality, self.where)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits whose photos are used: all of them when --pairs names the photos."""
        return table.SPLITS if self.pairs or self.split == "all" else (self.split,)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure the models, write `metrics.json` and the report, and return the first model's metrics."""
    started = time.monotonic()
    layout = Layout(config.data)
    urls = [find_model(layout, given) for given in config.model or (None,)]
    if config.has_sets:
        return evaluate_sets(_sets_plan(config, layout, urls))
    embedders = [load_embedder(url, config.onnx) for url in urls]
    sources = [_source(config, layout, embedder) for embedder in embedders]
    pairs_url = absolute_url(config.pairs[0], "--pairs") if config.pairs else None
    photos, pairs, sources = photos_and_pairs(
        sources, pairs_url, config.taken, num_pairs=config.num_pairs, seed=config.seed
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
    slices, num_unknown = read_slices(config.slices, photos.names) if config.slices is not None else ({}, 0)
    measured = []
    for name, embedder, source in zip(_names(urls), embedders, sources, strict=True):
        folder = storage.join(output, "embeddings", name)
        # These files are from an earlier report of other pairs or of an earlier model.
        embed_source(source, embedder, folder, onnx=config.onnx, strict=config.strict, gpus=config.gpus, overwrite=True)
        made = read_embeddings(folder)
        check_embedded(made, folder)
        measured.append(
            measure(
                name,
                embedder,
                source,
                made,
                photos,
                pairs,
                tolerance=config.tolerance,
                with_original=pairs_url is None,
                seed=config.seed,
                at_far=config.at_far,
            )
        )
    for each in measured:
        kfold = kfold_accuracy(each.distances_P, pairs.same_P, pairs.fold_P)
        each.figures["slices"] = slice_figures(
            slices, each.distances_P, pairs, kfold, chosen_threshold(each.figures), config.at_far
        )
    kept = _keep_thresholds(config, measured)
    notes = notes_of(photos, pairs, measured, num_unknown)
    metrics = {
        **{name: measured[0].figures[name] for name in KEPT_FIGURES},
        "pairs": pairs_url and storage.redacted(pairs_url),
        "seed": config.seed,
        "faces_within": str(config.taken) or None,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "notes": notes,
        "difference": accuracy_difference(measured),
        "models": [each.figures for each in measured],
    }
    page, found = present(measured, photos, pairs, metrics)
    storage.write_bytes(storage.join(output, SUSPECTS_NAME), found)
    storage.write_bytes(storage.join(output, REPORT_NAME), page)
    storage.write_json(storage.join(output, METRICS_NAME), metrics)
    return {
        **result,
        **{name: metrics[name] for name in KEPT_FIGURES},
        "threshold": chosen_threshold(measured[0].figures),
        "operating_point": measured[0].figures["operating_point"],
        "threshold_kept": kept,
        "photos": len(photos.names),
        "seconds": round(time.monotonic() - started, 1),
    }


def _sets_plan(config: EvaluateConfig, layout: Layout, urls: Sequence[str]) -> SetsPlan:
    report = _output(config, layout, urls[0])
    return SetsPlan(
        sets=tuple(absolute_url(url, "--pairs") for url in config.pairs),
        models=urls,
        names=_names(urls),
        onnx=config.onnx,
        # The report of the other evaluation stays beside it.
        output=storage.join(report, "sets") if config.output is None else report,
        protocol=config.protocol,
        flip=config.flip or config.protocol == "insightface",
        gpus=config.gpus,
        seed=config.seed,
        strict=config.strict,
        dry_run=config.dry_run,
    )


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
    )


def _keep_thresholds(config: EvaluateConfig, measured: Sequence[Measured]) -> bool:
    """Write the threshold into each model without one, or into all; return whether the first model got it."""
    kept = False
    for n, each in enumerate(measured):
        is_folder = not each.embedder.url.endswith(".onnx")
        if is_folder and (config.keep_threshold or not was_evaluated(each.embedder.url)):
            figures = {name: each.figures[name] for name in KEPT_FIGURES}
            if each.figures["operating_point"]:
                figures["operating_point"] = each.figures["operating_point"]
            threshold = chosen_threshold(each.figures)
            try:
                keep_threshold(each.embedder.url, threshold, figures)
            except (UserError, JobError) as error:  # a shared model may be read-only; the report is what matters
                logger.warning("could not write threshold %.4f into the model: %s", threshold, error)
                continue
            logger.info("wrote threshold %.4f into %s", threshold, each.embedder.url)
            each.figures["model_threshold"] = threshold
            kept = kept or n == 0
        elif is_folder and config.at_far is not None:
            logger.warning("%s keeps the threshold that it has: --keep-threshold replaces it", each.embedder.url)
    return kept
