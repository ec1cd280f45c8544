"""Turns measurements into the content of the report: pictures of pairs, plots, tables of text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from lib import storage
from lib.csv_text import csv_bytes
from lib.evaluation import plots
from lib.evaluation.curves import roc_curve
from lib.evaluation.findings import DUPLICATE, WRONG_LABEL, Finding, Suspect, suspects, worst_pairs
from lib.evaluation.model_metrics import Measured, Photos
from lib.evaluation.pairs import Pairs
from lib.evaluation.report import (
    DASH,
    PairSection,
    Plot,
    Report,
    ShownPair,
    ShownPhoto,
    Table,
    html,
    number,
    percent,
)
from lib.faces.alignment import EYES
from lib.recognition.crops import read_crops
from lib.recognition.face_source import PhotosSource

NUM_SHOWN = 24
"""The report shows this many pairs of each kind of error, and suspects of each kind. suspects.csv holds all
suspects."""

HISTORY_NAME = "history.parquet"
HISTORY_PLOTS = {
    # A softmax over many negatives and a triplet loss have different magnitudes.
    "Training: loss": ("Loss", ("loss",), True),
    "Training: verification": ("Share", ("accuracy", "auc", "tar_at_far"), False),
}
"""Plots of a run's history: the label of the axis, a part of the names of the columns to show, and whether the axis is
logarithmic."""
ORIGINAL_COLUMNS = ("Train Loss", "Test Loss")
"""Columns that repeat others under the original project's names."""

SUSPECTS_HEADER = ("model", "kind", "photo", "identity", "other_photo", "other_identity", "distance", "own_distance")


def present(
    measured: Sequence[Measured], photos: Photos, pairs: Pairs, metrics: Mapping[str, Any]
) -> tuple[bytes, bytes]:
    """Return the report as HTML, and all suspects as CSV."""
    curves = {each.name: roc_curve(each.distances_P, pairs.same_P) for each in measured}
    shown_plots = [Plot(name="ROC", content=plots.roc_plot(curves)), Plot(name="DET", content=plots.det_plot(curves))]
    pair_sections: list[PairSection] = []
    suspect_rows: list[tuple[Any, ...]] = []
    for each in measured:
        threshold = each.figures["threshold"]
        histogram = plots.histogram_plot(each.name, each.distances_P, pairs.same_P, threshold)
        shown_plots.append(Plot(name=f"Distances: {each.name}", content=histogram))
        known_N = np.array([identity is not None for identity in photos.identities])
        found = suspects(
            each.vectors_ND, photos.people_N, known_N & ~each.failed_N, each.distances_P[pairs.same_P], threshold
        )
        suspect_rows.extend(_suspect_row(each.name, photos, suspect) for suspect in found)
        pair_sections.extend(_pair_sections(each, photos, pairs, found))
    for each in measured:
        shown_plots.extend(_history_plots(each))
    difference = metrics["difference"]
    report = Report(
        title=" and ".join(each.name for each in measured),
        models=[each.figures for each in measured],
        notes=metrics["notes"],
        difference=(difference and f"{100 * difference['accuracy']:+.2f} ± {100 * difference['std']:.2f}") or "",
        about=_about(measured, photos, metrics),
        plots=shown_plots,
        tables=[*_original_tables(measured), *_slice_tables(measured)],
        pair_sections=pair_sections,
    )
    return html(report), csv_bytes(SUSPECTS_HEADER, suspect_rows)


def _pair_sections(measured: Measured, photos: Photos, pairs: Pairs, found: Sequence[Suspect]) -> list[PairSection]:
    threshold = measured.figures["threshold"]
    by_kind = ([each for each in found if each.kind == kind] for kind in (DUPLICATE, WRONG_LABEL))
    wanted: list[tuple[Sequence[Finding], int]] = [
        *worst_pairs(measured.distances_P, pairs, threshold, NUM_SHOWN),
        *((of_kind[:NUM_SHOWN], len(of_kind)) for of_kind in by_kind),
    ]
    indices = {index for findings, _ in wanted for finding in findings for index in (finding.a, finding.b)}
    crops = read_crops(measured.source, [photos.names[index] for index in indices])

    def shown(index: int) -> ShownPhoto:
        name = photos.names[index]
        return ShownPhoto(name=name, identity=photos.identities[index] or "nobody known", crop=crops.get(name))

    titles = (
        ("Worst false matches", f"Different people within the best threshold, {threshold:.3f}: the nearest first."),
        ("Worst false non-matches", f"One person beyond the best threshold, {threshold:.3f}: the farthest first."),
        (
            "Suspects: duplicates across identities",
            "Photos of two identities, nearer than nearly any two photos of one: one photo, or one person, twice.",
        ),
        (
            "Suspects: wrong labels",
            "Photos far from all others of their identity and near to someone else's: the suspect, then that one.",
        ),
    )
    return [
        PairSection(
            title=f"{title}: {measured.name}",
            text=f"{text} {len(findings):,} of {num:,}." if num else text,
            pairs=[ShownPair(a=shown(each.a), b=shown(each.b), distance=each.distance) for each in findings],
        )
        for (title, text), (findings, num) in zip(titles, wanted, strict=True)
    ]


def _suspect_row(model: str, photos: Photos, suspect: Suspect) -> tuple[Any, ...]:
    own = "" if suspect.own_distance is None else round(suspect.own_distance, 4)
    pair = [each for index in (suspect.a, suspect.b) for each in (photos.names[index], photos.identities[index])]
    return (model, suspect.kind, *pair, round(suspect.distance, 4), own)


def _original_tables(measured: Sequence[Measured]) -> list[Table]:
    header = ["", *(each.name for each in measured)]
    text = "At the tolerance given, else the threshold that the model came with, else the best one."
    tables = [("The original's table", text, "")]
    if any(each.figures["original"] for each in measured):
        text = "Every two of the measured photos of a person, and for each a random photo of someone else."
        tables.append(("The original's table, by its own protocol", text, "original"))
    made = []
    for title, text, protocol in tables:
        columns = [
            (each.figures["original"] or {}).get("at_tolerance") if protocol else each.figures["original_table"]
            for each in measured
        ]
        names: Mapping[str, Any] = next((column for column in columns if column), {})
        rows = [[name.replace("_", " "), *(number((column or {}).get(name)) for column in columns)] for name in names]
        made.append(Table(title=title, text=text, header=header, rows=rows))
    return made


def _slice_tables(measured: Sequence[Measured]) -> list[Table]:
    text = "Pairs both of whose photos have the attribute. A gap between groups is a gap between the people in them."
    tables = []
    for each in measured:
        if each.figures["slices"]:
            header = [name.replace("_", " ") for name in each.figures["slices"][0]]
            rows = [
                [value if isinstance(value, str) else _count_or_share(value) for value in row.values()]
                for row in each.figures["slices"]
            ]
            tables.append(Table(title=f"By attribute: {each.name}", text=text, header=header, rows=rows))
    return tables


def _count_or_share(value: float | None) -> str:
    return number(value) if isinstance(value, int) else percent(value)


def _about(measured: Sequence[Measured], photos: Photos, metrics: Mapping[str, Any]) -> Table:
    """Return what was measured and on which data, so that a copied page still says so."""

    def row(label: str, values: Sequence[Any]) -> list[str]:
        return [label, *(DASH if value is None else str(value) for value in values)]

    made = [each.figures["fingerprint"] for each in measured]
    known = {identity for identity in photos.identities if identity is not None}
    sources = [("Photos" if isinstance(each.source, PhotosSource) else "Faces", each.source.url) for each in measured]
    rows = [
        row("Model", [each.figures["model"] for each in measured]),
        row("Digest of its weights and input", [each.figures["digest"] for each in measured]),
        row("Mirror images", ["added" if each.embedder.flip else "left out" for each in measured]),
        row("Numbers in an embedding", [each.embedder.embedding_dim for each in measured]),
        row(sources[0][0], [storage.redacted(url) for _, url in sources]),
        row("Detector", [content.get("detector") for content in made]),
        row("Alignment", [content.get("template", EYES) for content in made]),
        row("Fingerprint of the faces", [content.get("id") for content in made]),
        row("Pairs", [metrics["pairs"] or f"made, seed {metrics['seed']}"] * len(measured)),
        row("Photos, people", [f"{len(photos.names):,}, {len(known):,}"] * len(measured)),
        row("Measured", [metrics["measured_at"]] * len(measured)),
    ]
    return Table(title="What was measured", text="", header=["", *(each.name for each in measured)], rows=rows)


def _history_plots(measured: Measured) -> list[Plot]:
    """Return the training curves of a model in a run folder."""
    run, _, last = measured.embedder.url.rstrip("/").rpartition("/")
    url = storage.join(run, HISTORY_NAME)
    if last != "model" or not storage.exists(url):
        return []
    history = storage.read_parquet(url)
    if "epoch" not in history.column_names:
        return []
    made = []
    for title, (y_label, parts, is_logarithmic) in HISTORY_PLOTS.items():
        lines = {
            name: history[name].to_pylist()
            for name, kind in zip(history.column_names, history.schema.types, strict=True)
            if name not in ORIGINAL_COLUMNS
            and not name.endswith("_std")
            and any(part in name.lower() for part in parts)
            and (pa.types.is_floating(kind) or pa.types.is_integer(kind))
        }
        if lines:
            content = plots.history_plot(
                f"{title} ({measured.name})",
                y_label,
                history["epoch"].to_pylist(),
                lines,
                is_logarithmic=is_logarithmic,
            )
            made.append(Plot(name=title, content=content))
    return made
