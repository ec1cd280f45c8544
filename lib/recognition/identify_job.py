"""The identify job: says who is in photos, by a gallery of known people.

Shapes: B probes, G gallery faces, K matches.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import tyro

from lib import cluster, storage
from lib.config import absolute_url, default_data_url
from lib.csv_text import csv_bytes
from lib.errors import UserError
from lib.faces import table
from lib.faces.extraction import POLICIES
from lib.layout import Layout
from lib.recognition.crops import read_crops
from lib.recognition.embed_job import embed_source, model_name
from lib.recognition.embedder import Embedder, extraction_settings, find_model, load_embedder
from lib.recognition.embeddings_table import Embeddings, read_embeddings
from lib.recognition.face_source import check_source, faces_source, photos_source
from lib.recognition.gallery import Search, nearest
from lib.recognition.match_sheet import BEYOND, PLAIN, WITHIN, contact_sheet
from lib.recognition.onnx_model import OnnxInput
from lib.recognition.open_set import open_set_figures, open_set_line, probes_of

logger = logging.getLogger(__name__)

UNKNOWN, FOLDERS = "unknown", "folders"

MATCHES_NAME, CSV_NAME, SHEET_NAME = "matches.parquet", "matches.csv", "matches.jpg"

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


@dataclass(frozen=True, kw_only=True)
class IdentifyConfig:
    """Find out who is in photos."""

    photos: str
    """Photos to identify: a folder of any depth, or Parquet files with image bytes."""
    data: str = field(default_factory=default_data_url)
    """Folder or URL that holds everything, such as s3://bucket/folder. Default: $DATA_URL, else ./data."""
    model: str | None = None
    """Model folder, run folder or .onnx file. Default: the only run with a model below --data."""
    gallery: str | None = None
    """Embeddings of known people, made by jobs/embed.py with the same model. Default: embeddings/NAME OF THE RUN/ below
    --data."""
    faces: str | None = None
    """Faces table of the gallery, for pictures in the contact sheet. Default: faces/ below --data, if it exists."""
    identities: str | None = None
    """Who the probes really are, to measure TPIR and FPIR: a list of photos and names, as preprocess reads it, or
    "folders" where each person has a folder. A name that the gallery does not hold is a stranger."""
    output: str | None = None
    """Folder for the matches. Default: matches/ below --data."""
    top: int = 5
    """Number of nearest gallery faces to list for each face."""
    threshold: float | None = None
    """Largest Euclidean distance of a match; farther faces are unknown. Default: the model's threshold."""
    search: Search = "auto"
    """exact: compare each face with the whole gallery. approximate: search a graph, for very large galleries. auto:
    choose by size."""
    faces_policy: str = "all"
    """all: every face of a photo. prominent: the main face only."""
    detector_weights: str | None = None
    """Weights file of the detector, if the model's faces were made with one."""
    gpus: cluster.Gpus = "auto"
    """GPUs to embed on. auto: all of the cluster. 0: none."""
    strict: bool = False
    """Stop if the photos cannot be aligned as the model's training faces were. Without it the job warns."""
    dry_run: bool = False
    """Check model, gallery and photos, then stop."""
    onnx: Annotated[OnnxInput, tyro.conf.arg(name="")] = field(default_factory=OnnxInput)

    def __post_init__(self) -> None:
        if not 1 <= self.top <= 1000:
            raise UserError(f"--top is {self.top}: allowed are 1 to 1000")
        if self.faces_policy not in POLICIES:
            raise UserError(f"--faces-policy is {self.faces_policy!r}: allowed are {', '.join(POLICIES)}")
        if self.threshold is not None and not 0 <= self.threshold < np.inf:
            raise UserError(f"--threshold is {self.threshold}: a Euclidean distance, 0 or more")
        cluster.check_gpus(self.gpus)


def identify(config: IdentifyConfig) -> dict[str, Any]:
    """Find the nearest gallery faces of every face in the photos, and write the matches."""
    started = time.monotonic()
    layout = Layout(config.data)
    model_url = find_model(layout, config.model)
    embedder = load_embedder(model_url, config.onnx)
    threshold = embedder.threshold if config.threshold is None else config.threshold
    if threshold is None:
        raise UserError(f"{model_url} has no threshold yet: choose one with jobs/evaluate.py, or give --threshold")
    gallery = known_faces(layout.embeddings(model_name(model_url), config.gallery, "--gallery"), embedder)
    settings = replace(extraction_settings(embedder, config.detector_weights), policy=config.faces_policy)
    source = photos_source(
        absolute_url(config.photos, "--photos"),
        None if config.identities in (None, FOLDERS) else absolute_url(str(config.identities), "--identities"),
        settings,
        with_identities=config.identities is not None,
        unnamed_too=True,
    )
    output = layout.output("matches", config.output)
    num_people = len(set(gallery.identities))
    result = {"job": "identify", "matches": storage.join(output, MATCHES_NAME), "gallery_faces": len(gallery)}
    result |= {"gallery_identities": num_people, "threshold": threshold}
    if config.dry_run:
        check_source(source, embedder, strict=config.strict)
        return {**result, "dry_run": True, "photos": len(source.manifest)}

    storage.check_writable(output)
    folder = storage.join(output, "embeddings")
    # These files are from earlier photos.
    embed_source(source, embedder, folder, onnx=config.onnx, strict=config.strict, gpus=config.gpus, overwrite=True)
    probes = read_embeddings(folder)
    found = np.flatnonzero(~probes.failed_N)
    index_BK, distance_BK = nearest(probes.embeddings_ND[found], gallery.embeddings_ND, config.top, config.search)
    decisions = [
        str(gallery.identities[index_K[0]]) if distance_K[0] <= threshold else UNKNOWN
        for index_K, distance_K in zip(index_BK, distance_BK, strict=True)
    ]
    matches = _matches(probes, gallery, found, index_BK, distance_BK, decisions)
    storage.write_parquet(storage.join(output, MATCHES_NAME), matches)
    storage.write_bytes(storage.join(output, CSV_NAME), matches_csv(matches))

    measured = {}
    if config.identities is not None:
        nearest_of = {
            int(n): (str(gallery.identities[index_K[0]]), float(distance_K[0]))
            for n, index_K, distance_K in zip(found, index_BK, distance_BK, strict=True)
        }
        known = {str(identity) for identity in gallery.identities}
        measured = _measured(probes, nearest_of, known, threshold, several=config.faces_policy == "all")
    shown = found[:_SHEET_ROWS]
    probe_crops = read_crops(source, [probes.photos[n] for n in shown])
    gallery_crops = _gallery_crops(config, [gallery.photos[g] for g in index_BK[:_SHEET_ROWS].ravel()])
    rows = []
    for place, n in enumerate(shown):
        tiles = [(probe_crops.get(probes.photos[n]), probes.photos[n], decisions[place], PLAIN)]
        for g, distance in zip(index_BK[place], distance_BK[place], strict=True):
            name, color = gallery.photos[g], WITHIN if distance <= threshold else BEYOND
            tiles.append((gallery_crops.get(name), str(gallery.identities[g]), f"{distance:.3f}", color))
        rows.append(tiles)
    title = (
        f"Left: a face, and who it is. Then known faces and their distances: blue within {threshold:.3f}, else grey."
    )
    storage.write_bytes(storage.join(output, SHEET_NAME), contact_sheet(title, rows))
    counts = Counter(decision == UNKNOWN for decision in decisions)
    return {
        **result,
        "csv": storage.join(output, CSV_NAME),
        "photos": len(source.manifest),
        "faces": len(found),
        "identified": counts[False],
        "unknown": counts[True],
        "photos_without_face": int(probes.failed_N.sum()),
        **measured,
        "seconds": round(time.monotonic() - started, 1),
    }


def _measured(
    probes: Embeddings, nearest_of: dict[int, tuple[str, float]], known: set[str], threshold: float, *, several: bool
) -> dict[str, Any]:
    """Return the figures of open-set identification; `nearest_of` holds identity and distance for rows with a face.

    A photo with several faces is left out, because nobody says which of them is the person.

    Raises:
        UserError: no photo with one face has a name.
    """
    # With --faces-policy all, the names of a photo's faces end in #0, #1 and so on.
    photo_N = [name.rpartition("#")[0] if several and n in nearest_of else name for n, name in enumerate(probes.photos)]
    num_faces = Counter(photo_N)
    named = [n for n, identity in enumerate(probes.identities) if identity is not None]
    kept = [n for n in named if num_faces[photo_N[n]] == 1]
    if not kept:
        raise UserError("--identities names no photo that has one face: correct the list, or leave the flag out")
    nearest_identity, distances = zip(*(nearest_of.get(n, (None, np.inf)) for n in kept), strict=True)
    figures = open_set_figures(
        probes_of([str(probes.identities[n]) for n in kept], nearest_identity, distances, known), threshold
    )
    figures |= {
        "photos_of_several_faces": len({photo_N[n] for n in named}) - len(kept),
        "photos_without_name": len(num_faces) - len({photo_N[n] for n in named}),
    }
    logger.info("open set: %s", open_set_line(figures))
    return {"open_set": figures}


def known_faces(url: str, embedder: Embedder) -> Embeddings:
    """Return the faces of an embeddings table that have an embedding and an identity.

    Raises:
        UserError: the table does not exist, another model made it, or none of its faces has an identity.
    """
    made = read_embeddings(url)
    if made.model["digest"] != embedder.digest:
        raise UserError(
            f"the gallery {url} was made by another model than {embedder.url}: embed it again with jobs/embed.py "
            "--model, or name the model that made it"
        )
    kept = [n for n, identity in enumerate(made.identities) if identity is not None and not made.failed_N[n]]
    if not kept:
        raise UserError(
            f"the gallery {url} is empty: none of its {len(made)} rows has both a face and an identity; "
            "embed photos in a folder per person, or with identities.txt beside them"
        )
    return replace(
        made,
        photos=[made.photos[n] for n in kept],
        identities=[made.identities[n] for n in kept],
        statuses=[made.statuses[n] for n in kept],
        splits=[made.splits[n] for n in kept],
        boxes_N4=made.boxes_N4[kept],
        embeddings_ND=made.embeddings_ND[kept],
        failed_N=made.failed_N[kept],
    )


def matches_csv(matches: pa.Table) -> bytes:
    """Return the matches as a CSV file in UTF-8; no name in it is a formula."""
    return csv_bytes(matches.column_names, zip(*(column.to_pylist() for column in matches.columns), strict=True))


def _matches(
    probes: Embeddings,
    gallery: Embeddings,
    found: np.ndarray,
    index_BK: np.ndarray,
    distance_BK: np.ndarray,
    decisions: Sequence[str],
) -> pa.Table:
    place_of = {int(n): place for place, n in enumerate(found)}
    rows: list[dict[str, Any]] = []
    for n, (photo, status) in enumerate(zip(probes.photos, probes.statuses, strict=True)):
        row: dict[str, Any] = {"photo": photo, "status": status}
        place = place_of.get(n)
        if place is None:
            rows.append(row)
            continue
        row |= dict(zip(("x0", "y0", "x1", "y1"), probes.boxes_N4[n].tolist(), strict=True))
        for rank, (g, distance) in enumerate(zip(index_BK[place], distance_BK[place], strict=True), 1):
            match = {"identity": gallery.identities[g], "gallery_photo": gallery.photos[g], "distance": float(distance)}
            rows.append({**row, "decision": decisions[place], "rank": rank, **match})
    return pa.Table.from_pylist(rows, schema=MATCHES_SCHEMA)


def _gallery_crops(config: IdentifyConfig, names: Sequence[str]) -> dict[str, bytes]:
    faces_url = Layout(config.data).faces(config.faces)
    if config.faces is None and not storage.exists(storage.join(faces_url, table.SUCCESS_NAME)):
        logger.info("the contact sheet has no gallery pictures: %s is no faces table (--faces)", faces_url)
        return {}
    return read_crops(faces_source(faces_url, table.SPLITS), names)
