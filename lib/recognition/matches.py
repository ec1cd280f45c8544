"""The nearest gallery faces of each probe, as a table, CSV, contact sheet and figures of identification.

Shapes: B probes with a face, N rows of the probes, K matches of each.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from lib.csv_text import csv_bytes
from lib.errors import UserError
from lib.recognition.embeddings_table import Embeddings
from lib.recognition.match_sheet import BEYOND, PLAIN, WITHIN, contact_sheet
from lib.recognition.open_set import open_set_figures, open_set_line, probes_of

logger = logging.getLogger(__name__)

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

_SHEET_ROWS = 40


@dataclass(frozen=True)
class Matches:
    """The matches of all probes.

    Attributes:
        found: the rows of the probes that have a face [B].
        index_BK: the nearest faces of the gallery, nearest first.
        distance_BK: their Euclidean distances.
        threshold: the largest distance of the same person.
    """

    probes: Embeddings
    gallery: Embeddings
    found: np.ndarray
    index_BK: np.ndarray
    distance_BK: np.ndarray
    threshold: float

    @cached_property
    def decisions(self) -> list[str]:
        """The identity of each face's nearest match, or `unknown` if that is beyond the threshold."""
        return [
            str(self.gallery.identities[index_K[0]]) if distance_K[0] <= self.threshold else UNKNOWN
            for index_K, distance_K in zip(self.index_BK, self.distance_BK, strict=True)
        ]

    def table(self) -> pa.Table:
        """Return the matches as rows of `MATCHES_SCHEMA`."""
        probes, gallery = self.probes, self.gallery
        place_of = {int(n): place for place, n in enumerate(self.found)}
        rows: list[dict[str, Any]] = []
        for n, (photo, status) in enumerate(zip(probes.photos, probes.statuses, strict=True)):
            row: dict[str, Any] = {"photo": photo, "status": status}
            place = place_of.get(n)
            if place is None:
                rows.append(row)
                continue
            row |= dict(zip(("x0", "y0", "x1", "y1"), probes.boxes_N4[n].tolist(), strict=True))
            row["decision"] = self.decisions[place]
            for rank, (g, distance) in enumerate(zip(self.index_BK[place], self.distance_BK[place], strict=True), 1):
                match = {"identity": gallery.identities[g], "gallery_photo": gallery.photos[g]}
                rows.append({**row, "rank": rank, "distance": float(distance), **match})
        return pa.Table.from_pylist(rows, schema=MATCHES_SCHEMA)

    def shown(self) -> tuple[list[str], list[str]]:
        """Return the photos of the probes and of the gallery that the contact sheet shows."""
        probe_photos = [self.probes.photos[n] for n in self.found[:_SHEET_ROWS]]
        return probe_photos, [self.gallery.photos[g] for g in self.index_BK[:_SHEET_ROWS].ravel()]

    def sheet(self, probe_crops: Mapping[str, bytes], gallery_crops: Mapping[str, bytes]) -> bytes:
        """Return the contact sheet, a JPEG; the crops belong to the photos of `shown`."""
        rows = []
        for place, photo in enumerate(self.shown()[0]):
            tiles = [(probe_crops.get(photo), photo, self.decisions[place], PLAIN)]
            for g, distance in zip(self.index_BK[place], self.distance_BK[place], strict=True):
                name, color = self.gallery.photos[g], WITHIN if distance <= self.threshold else BEYOND
                tiles.append((gallery_crops.get(name), str(self.gallery.identities[g]), f"{distance:.3f}", color))
            rows.append(tiles)
        title = (
            f"Left: a face, and who it is. Then known faces and their distances: blue within {self.threshold:.3f}, "
            "else grey."
        )
        return contact_sheet(title, rows)

    def open_set(self, *, several: bool) -> dict[str, Any]:
        """Return the figures of open-set identification, by the identities of the probes.

        With `several`, each face of a photo is a probe. Photos with several faces are left out, because the list does
        not say which face the name belongs to.

        Raises:
            UserError: no photo with one face has a name.
        """
        probes = self.probes
        nearest_of = {
            int(n): (str(self.gallery.identities[index_K[0]]), float(distance_K[0]))
            for n, index_K, distance_K in zip(self.found, self.index_BK, self.distance_BK, strict=True)
        }
        # The names of a photo's faces end in #0, #1 and so on.
        photo_N = [
            name.rpartition("#")[0] if several and n in nearest_of else name for n, name in enumerate(probes.photos)
        ]
        num_faces = Counter(photo_N)
        named = [n for n, identity in enumerate(probes.identities) if identity is not None]
        kept = [n for n in named if num_faces[photo_N[n]] == 1]
        if not kept:
            raise UserError("--identities names no photo that has one face: correct the list, or leave the flag out")
        nearest_identity, distances = zip(*(nearest_of.get(n, (None, np.inf)) for n in kept), strict=True)
        known = {str(identity) for identity in self.gallery.identities}
        identities = [str(probes.identities[n]) for n in kept]
        figures = open_set_figures(probes_of(identities, nearest_identity, distances, known), self.threshold)
        figures |= {
            "photos_of_several_faces": len({photo_N[n] for n in named}) - len(kept),
            "photos_without_name": len(num_faces) - len({photo_N[n] for n in named}),
        }
        logger.info("open set: %s", open_set_line(figures))
        return figures


def matches_csv(matches: pa.Table) -> bytes:
    """Return the matches as a CSV file in UTF-8; no name in it is a formula."""
    return csv_bytes(matches.column_names, zip(*(column.to_pylist() for column in matches.columns), strict=True))
