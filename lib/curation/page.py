"""The page of the curate job: proposals with their crops side by side, and boxes to tick. One file, no network."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lib.curation.proposals import KINDS, MEANINGS
from lib.evaluation.report import render

_TEMPLATE = Path(__file__).parent / "curation.html.j2"
FACES_SHOWN = 4
"""Faces of each side of a proposal on the page."""
TICKED_FROM = 0.5
"""Boxes of at least this certainty are ticked at first."""

Row = Mapping[str, Any]


def shown_rows(changes: pa.Table, num_of_kind: int) -> list[Row]:
    """Return the first proposals of each kind."""
    kinds = changes["kind"].to_numpy()
    rows = [row for kind in KINDS for row in np.flatnonzero(kinds == kind)[:num_of_kind].tolist()]
    shown: list[Row] = changes.take(pa.array(rows, pa.int64())).to_pylist()
    return shown


def photos_shown(rows: Iterable[Row], *, against: bool = False) -> set[str]:
    """Return the photos whose crops the page shows, of the faces or of the test set."""
    photos: set[str] = set()
    for row in rows:
        if not against:
            photos.update(row["photos"][:FACES_SHOWN])
        if row["in_test_set"] == against:
            photos.update(row["evidence"][:FACES_SHOWN])
    return photos


def html(
    title: str, changes: pa.Table, rows: Sequence[Row], crops: Mapping[str, bytes], crops_against: Mapping[str, bytes]
) -> bytes:
    """Return the page."""
    kinds = changes["kind"].to_pylist()
    sections = []
    for kind in KINDS:
        of_kind = [
            _shown(row, crops, crops_against if row["in_test_set"] else crops) for row in rows if row["kind"] == kind
        ]
        if of_kind:
            sections.append({"kind": kind, "meaning": MEANINGS[kind], "num": kinds.count(kind), "proposals": of_kind})
    return render(_TEMPLATE, title=title, sections=sections, num=len(kinds))


def _shown(row: Row, crops: Mapping[str, bytes], evidence_crops: Mapping[str, bytes]) -> dict[str, Any]:
    def faces(photos: Sequence[str], pictures: Mapping[str, bytes]) -> list[dict[str, Any]]:
        return [{"photo": photo, "crop": pictures.get(photo)} for photo in photos[:FACES_SHOWN]]

    return {
        **row,
        "faces": faces(row["photos"], crops),
        "others": faces(row["evidence"], evidence_crops),
        "num_photos": len(row["photos"]),
        "num_evidence": len(row["evidence"]),
        "is_ticked": row["certainty"] >= TICKED_FROM,
    }
