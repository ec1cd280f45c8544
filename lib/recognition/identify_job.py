"""The identify job: says who is in photos, by a gallery of known people.

Shapes: B probes, G gallery faces, K matches.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import tyro

from lib import cluster, storage
from lib.config import absolute_url, default_data_url
from lib.errors import UserError
from lib.faces import table
from lib.faces.extraction import POLICIES
from lib.faces.photo_flags import PhotoFlags
from lib.layout import Layout
from lib.recognition.crops import read_crops
from lib.recognition.embed_job import embed_source, model_name
from lib.recognition.embedder import (
    Embedder,
    FlipFlag,
    chosen_flip,
    extraction_settings,
    find_model,
    load_embedder,
)
from lib.recognition.embeddings_table import Embeddings, read_embeddings
from lib.recognition.face_source import PhotosSource, check_source, faces_source, photos_source
from lib.recognition.gallery import Search, nearest
from lib.recognition.matches import UNKNOWN, Matches, matches_csv
from lib.recognition.onnx_model import OnnxInput

logger = logging.getLogger(__name__)

FOLDERS = "folders"

MATCHES_NAME, CSV_NAME, SHEET_NAME = "matches.parquet", "matches.csv", "matches.jpg"


@dataclass(frozen=True, kw_only=True)
class IdentifyConfig:
    """Find out who is in photos."""

    photos: str
    """Photos to identify: a folder of any depth, or any format that preprocess takes."""
    data: str = field(default_factory=default_data_url)
    """Folder or URL that holds everything, such as s3://bucket/folder. Default: $DATA_URL, else ./data."""
    model: str | None = None
    """Model folder, run folder, .onnx file or weights of iResNet. Default: the only run with a model below --data."""
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
    flip: FlipFlag = False
    """Add the embedding of the mirror image, even if the model does not. --gallery must be made in the same way."""
    no_flip: FlipFlag = False
    """Leave mirror images out, even if the model adds them. --gallery must be made in the same way."""
    strict: bool = False
    """Stop if the photos cannot be aligned as the model's training faces were. Without it the job warns."""
    dry_run: bool = False
    """Check model, gallery and photos, then stop."""
    reading: Annotated[PhotoFlags, tyro.conf.arg(name="")] = field(default_factory=PhotoFlags)
    onnx: Annotated[OnnxInput, tyro.conf.arg(name="")] = field(default_factory=OnnxInput)

    def __post_init__(self) -> None:
        if not 1 <= self.top <= 1000:
            raise UserError(f"--top is {self.top}: allowed are 1 to 1000")
        if self.faces_policy not in POLICIES:
            raise UserError(f"--faces-policy is {self.faces_policy!r}: allowed are {', '.join(POLICIES)}")
        if self.threshold is not None and not 0 <= self.threshold < np.inf:
            raise UserError(f"--threshold is {self.threshold}: a Euclidean distance, 0 or more")
        cluster.check_gpus(self.gpus)
        _ = chosen_flip(self.flip, self.no_flip)


def identify(config: IdentifyConfig) -> dict[str, Any]:
    """Find the nearest gallery faces of every face in the photos, and write the matches."""
    started = time.monotonic()
    layout = Layout(config.data)
    model_url = find_model(layout, config.model)
    embedder = load_embedder(model_url, config.onnx, flip=chosen_flip(config.flip, config.no_flip))
    threshold = _threshold(config, embedder)
    gallery = known_faces(layout.embeddings(model_name(model_url), config.gallery, "--gallery"), embedder)
    source = _probes(config, embedder)
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
    matches = Matches(probes, gallery, found, index_BK, distance_BK, threshold)
    rows = matches.table()
    storage.write_parquet(storage.join(output, MATCHES_NAME), rows)
    storage.write_bytes(storage.join(output, CSV_NAME), matches_csv(rows))
    measured = {}
    if config.identities is not None:
        measured = {"open_set": matches.open_set(several=config.faces_policy == "all" and not source.aligned)}
    probe_photos, gallery_photos = matches.shown()
    sheet = matches.sheet(read_crops(source, probe_photos), _gallery_crops(config, gallery_photos))
    storage.write_bytes(storage.join(output, SHEET_NAME), sheet)
    num_unknown = matches.decisions.count(UNKNOWN)
    return {
        **result,
        "csv": storage.join(output, CSV_NAME),
        "photos": len(source.manifest),
        "faces": len(found),
        "identified": len(found) - num_unknown,
        "unknown": num_unknown,
        "photos_without_face": int(probes.failed_N.sum()),
        **measured,
        "seconds": round(time.monotonic() - started, 1),
    }


def _probes(config: IdentifyConfig, embedder: Embedder) -> PhotosSource:
    """Return the photos to identify, with their true identities if the user gives them."""
    return photos_source(
        absolute_url(config.photos, "--photos"),
        None if config.identities in (None, FOLDERS) else absolute_url(str(config.identities), "--identities"),
        replace(extraction_settings(embedder, config.detector_weights), policy=config.faces_policy),
        with_identities=config.identities is not None,
        unnamed_too=True,
        reading=config.reading,
    )


def _threshold(config: IdentifyConfig, embedder: Embedder) -> float:
    threshold = embedder.threshold if config.threshold is None else config.threshold
    if threshold is None:
        mirrored = f" {'with' if embedder.flip else 'without'} mirror images" if config.flip or config.no_flip else ""
        raise UserError(
            f"{embedder.url} has no threshold{mirrored} yet: choose one with jobs/evaluate.py, or give --threshold"
        )
    return threshold


def known_faces(url: str, embedder: Embedder) -> Embeddings:
    """Return the faces of an embeddings table that have an embedding and an identity.

    Raises:
        UserError: the table does not exist, another model made it, or none of its faces has an identity.
    """
    made = read_embeddings(url)
    if bool(made.model.get("flip")) != embedder.flip:
        one, other = ("without", "with") if embedder.flip else ("with", "without")
        raise UserError(
            f"the gallery {url} was embedded {one} mirror images, and {embedder.url} embeds {other} them: embed it "
            f"again with jobs/embed.py, or give --{'no-' if embedder.flip else ''}flip"
        )
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


def _gallery_crops(config: IdentifyConfig, names: Sequence[str]) -> dict[str, bytes]:
    faces_url = Layout(config.data).faces(config.faces)
    if config.faces is None and not storage.exists(storage.join(faces_url, table.SUCCESS_NAME)):
        logger.info("the contact sheet has no gallery pictures: %s is no faces table (--faces)", faces_url)
        return {}
    return read_crops(faces_source(faces_url, table.SPLITS), names)
