"""The nearest gallery faces of each probe, as a table, CSV and contact sheet, a group of probes at a time.

Shapes: N rows of the probes of a group, B of them with a face, K matches of each, M rows of matches.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lib.csv_text import csv_bytes
from lib.recognition.embeddings_table import filled
from lib.recognition.match_sheet import BEYOND, PLAIN, WITHIN, contact_sheet

UNKNOWN = "unknown"

MATCHES_SCHEMA = pa.schema(
    [
        pa.field("photo", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("decision", pa.string()),
        pa.field("rank", pa.int32()),
        pa.field("identity", pa.string()),
        pa.field("distance", pa.float32()),
        pa.field("gallery_photo", pa.string()),
        *(pa.field(name, pa.float32()) for name in ("x0", "y0", "x1", "y1")),
    ]
)
"""One row per match of each face; a photo without a face has one row with its status. `decision` is the identity of the
face's nearest match, or `unknown` if that is beyond the threshold. The box is in pixels."""

SHEET_FACES = 40
"""Faces of the contact sheet: the first ones."""


@dataclass(frozen=True)
class Matches:
    """The matches of a group of probes.

    Attributes:
        probes: rows of an embeddings table.
        has_face_N: which of them have an embedding, and so matches.
        identity_BK: of the nearest faces of the gallery, the nearest first.
        photo_BK: of the same faces.
        distance_BK: their Euclidean distances.
        threshold: the largest distance of the same person.
    """

    probes: pa.Table
    has_face_N: NDArray[np.bool_]
    identity_BK: NDArray[np.object_]
    photo_BK: NDArray[np.object_]
    distance_BK: NDArray[np.floating]
    threshold: float

    @cached_property
    def is_unknown(self) -> NDArray[np.bool_]:
        """Whether even the nearest match [B] is beyond the threshold."""
        return np.asarray(self.distance_BK[:, 0] > self.threshold)

    def table(self) -> pa.Table:
        """Return the matches as rows of `MATCHES_SCHEMA`."""
        num = self.distance_BK.shape[1]
        row_M = np.repeat(np.arange(len(self.probes)), np.where(self.has_face_N, num, 1))
        is_match_M = self.has_face_N[row_M]
        match_M = np.full(len(row_M), -1)
        match_M[is_match_M] = np.arange(self.distance_BK.size)

        def taken(values: NDArray, kind: pa.DataType) -> pa.Array:
            """Return values of the matches, null in rows without a face."""
            return pa.array(values.ravel(), kind).take(pa.array(match_M, mask=~is_match_M))

        decision_B = np.where(self.is_unknown, UNKNOWN, self.identity_BK[:, 0])
        box_M4 = filled(self.probes["box"])[row_M]
        columns = {
            "photo": self.probes["photo"].take(row_M),
            "status": self.probes["status"].take(row_M),
            "decision": taken(np.repeat(decision_B, num), pa.string()),
            "rank": taken(np.tile(np.arange(1, num + 1), len(decision_B)), pa.int32()),
            "identity": taken(self.identity_BK, pa.string()),
            "distance": taken(self.distance_BK, pa.float32()),
            "gallery_photo": taken(self.photo_BK, pa.string()),
            **{name: pa.array(box_M4[:, n], mask=~is_match_M) for n, name in enumerate(("x0", "y0", "x1", "y1"))},
        }
        return pa.table(columns, schema=MATCHES_SCHEMA)


def matches_csv(matches: pa.Table) -> bytes:
    """Return the matches as a CSV file in UTF-8; no name in it is a formula."""
    return csv_bytes(matches.column_names, zip(*(column.to_pylist() for column in matches.columns), strict=True))


def first_faces(matches: pa.Table, num: int) -> pa.Table:
    """Return the matches of the first `num` faces."""
    with_face = matches.filter(matches["rank"].is_valid())
    number = np.cumsum(with_face["rank"].to_numpy() == 1)
    return with_face.slice(0, int(np.searchsorted(number, num, side="right")))


def sheet_of(
    matches: pa.Table, threshold: float, probe_crops: Mapping[str, bytes], gallery_crops: Mapping[str, bytes]
) -> bytes:
    """Return the contact sheet of faces, a JPEG. The crops are by `photo` and by `gallery_photo`."""
    rows: list[list[tuple[bytes | None, str, str, str]]] = []
    for match in matches.to_pylist():
        if match["rank"] == 1:
            rows.append([(probe_crops.get(match["photo"]), match["photo"], match["decision"], PLAIN)])
        color = WITHIN if match["distance"] <= threshold else BEYOND
        crop = gallery_crops.get(match["gallery_photo"])
        rows[-1].append((crop, match["identity"], f"{match['distance']:.3f}", color))
    title = (
        f"Left: a face, and who it is. Then known faces and their distances: blue within {threshold:.3f}, else grey."
    )
    return contact_sheet(title, rows)
