"""The curate job: embeds faces, clusters them, and proposes changes of identities for people to review and apply.

Shapes: N faces, D dimension.
"""

import logging
import math
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import tyro

from lib import cluster, storage
from lib.config import absolute_url, default_data_url
from lib.curation import page
from lib.curation.apply import apply_decisions, list_at
from lib.curation.changes import (
    CURATION_NAME,
    IDENTITIES_DIGEST,
    PAGE_NAME,
    changes_table,
    digest_of_list,
    digest_of_table,
    write_about,
)
from lib.curation.duplicates import NEAR_SHARE, duplicates, near_pairs
from lib.curation.linkage import average_linkage
from lib.curation.neighbour_graph import Pairs, near_faces
from lib.curation.proposals import NOBODY, Proposal, best_threshold, proposals, surest_first
from lib.errors import UserError
from lib.faces import table
from lib.layout import Layout
from lib.recognition.crops import crops_of, read_crops
from lib.recognition.embed_job import embed_source
from lib.recognition.embedder import Embedder, find_model, load_embedder
from lib.recognition.embeddings_table import Embeddings, read_embeddings
from lib.recognition.face_source import FacesSource, faces_source
from lib.recognition.onnx_model import OnnxInput

logger = logging.getLogger(__name__)

_THRESHOLDS = np.linspace(0.6, 1.2, 13)
"""Thresholds to try, as shares of the model's threshold."""
_MIN_PAIRABLE = 20
"""Labels choose the threshold only if this many identities have two faces or more."""


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """Find wrong labels, split and mixed identities, duplicates, and people without labels."""

    data: str = field(default_factory=default_data_url)
    """Folder or URL that holds everything, such as s3://bucket/folder. Default: $DATA_URL, else ./data."""
    model: str | None = None
    """Model folder, run folder, .onnx file or weights of iResNet. Default: the only run with a model below --data."""
    faces: str | None = None
    """Faces table. Default: faces/ below --data."""
    embeddings: str | None = None
    """Embeddings of that table, made by jobs/embed.py. Default: the job embeds the faces itself."""
    against: str | None = None
    """Faces table of a test set. Photos that it holds too are reported as duplicates."""
    output: str | None = None
    """Folder for the proposals. Default: curation/ below --data."""
    threshold: float | None = None
    """Mean distance up to which groups of faces are one person. Default: the one whose groups agree most with the
    labels, or without labels the model's threshold."""
    shown: int = 200
    """Proposals of each kind on the page."""
    apply: str | None = None
    """Apply the changes of this file instead of looking for new ones: the CSV file that the page saves."""
    apply_over: float | None = None
    """Apply all changes of at least this certainty, 0 to 1, without a review."""
    gpus: cluster.Gpus = "auto"
    """GPUs to embed on. auto: all of the cluster. 0: none."""
    dry_run: bool = False
    """Check model and faces, then stop."""
    onnx: Annotated[OnnxInput, tyro.conf.arg(name="")] = field(default_factory=OnnxInput)

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 < self.threshold < math.inf:
            raise UserError(f"--threshold is {self.threshold}: a Euclidean distance over 0")
        if not 1 <= self.shown <= 10_000:
            raise UserError(f"--shown is {self.shown}: allowed are 1 to 10000")
        if self.apply is not None and self.apply_over is not None:
            raise UserError("--apply and --apply-over are both given: choose one")
        if self.apply_over is not None and not 0 <= self.apply_over <= 1:
            raise UserError(f"--apply-over is {self.apply_over}: allowed are 0 to 1")
        cluster.check_gpus(self.gpus)


def curate(config: CurateConfig) -> dict[str, Any]:
    """Write proposals and their page, or apply those that were accepted."""
    started = time.monotonic()
    layout = Layout(config.data)
    output, faces_url = layout.output("curation", config.output), layout.faces(config.faces)
    if config.apply is not None or config.apply_over is not None:
        return _applied(config, output, faces_url, layout.identities())

    success, listed_digest = table.read_success(faces_url), digest_of_list(list_at(layout.identities()))
    source = faces_source(faces_url, table.SPLITS)
    model_url = find_model(layout, config.model)
    embedder = load_embedder(model_url, config.onnx)
    against = config.against and faces_source(absolute_url(config.against, "--against"), table.SPLITS)
    result: dict[str, Any] = {"job": "curate", "curation": storage.join(output, CURATION_NAME)}
    if config.dry_run:
        return {**result, "dry_run": True, "rows": sum(source.num_rows)}
    storage.check_writable(output)
    given = config.embeddings and absolute_url(config.embeddings, "--embeddings")
    faces = _embedded(config, source, embedder, given or storage.join(output, "embeddings"), is_given=bool(given))
    theirs = _embedded(config, against, embedder, storage.join(output, "against")) if against else None

    usable = np.flatnonzero(~faces.failed_N)
    names = sorted({str(faces.identities[n]) for n in usable if faces.identities[n] is not None})
    number_of = {name: number for number, name in enumerate(names)}
    identity_N = np.array([number_of.get(faces.identities[n] or "", NOBODY) for n in usable], np.int64)
    photos, splits = [faces.photos[n] for n in usable], [faces.splits[n] for n in usable]
    vectors_ND = faces.embeddings_ND[usable]
    threshold, found, near = _proposals(config, embedder, vectors_ND, identity_N)

    logger.info("comparing pictures that may be the same")
    pairs_P2, distances_P = near.within(NEAR_SHARE * threshold)
    crops = crops_of(source, {photos[n] for n in np.unique(pairs_P2)})
    found = surest_first([*found, *duplicates(pairs_P2, distances_P, photos, identity_N, crops)])
    leaked = _leaked(source, against, photos, vectors_ND, identity_N, theirs, threshold) if against and theirs else []
    changes = changes_table(found, leaked, photos, splits, names, theirs.photos if theirs else [])
    storage.write_parquet(storage.join(output, CURATION_NAME), changes)
    about = {IDENTITIES_DIGEST: listed_digest, "threshold": threshold, "model": embedder.digest}
    write_about(output, faces_url, digest_of_table(success), **about)
    page_url = storage.join(output, PAGE_NAME)
    _write_page(page_url, changes, source, against or None, num_shown=config.shown)
    counts = Counter(changes["kind"].to_pylist())
    return {
        **result,
        "page": page_url,
        "faces": len(usable),
        "identities": len(names),
        "threshold": round(threshold, 4),
        "proposals": dict(sorted(counts.items())),
        "seconds": round(time.monotonic() - started, 1),
    }


def _write_page(
    page_url: str, changes: pa.Table, source: FacesSource, against: FacesSource | None, *, num_shown: int
) -> None:
    shown = page.shown_rows(changes, num_shown)
    crops = read_crops(source, page.photos_shown(shown))
    crops_against = read_crops(against, page.photos_shown(shown, against=True)) if against else {}
    storage.write_bytes(page_url, page.html(storage.redacted(source.url), changes, shown, crops, crops_against))


def _embedded(
    config: CurateConfig, source: FacesSource, embedder: Embedder, url: str, *, is_given: bool = False
) -> Embeddings:
    """Return the embeddings of a faces table. They are made first unless they are given."""
    if not is_given:
        embed_source(source, embedder, url, onnx=config.onnx, gpus=config.gpus, overwrite=True)
    faces = read_embeddings(url)
    if faces.fingerprint != source.fingerprint:
        raise UserError(
            f"--embeddings {storage.redacted(url)} are of other faces than {storage.redacted(source.url)}: embed these "
            "with jobs/embed.py, or leave the flag out"
        )
    return faces


def _proposals(
    config: CurateConfig, embedder: Embedder, vectors_ND: np.ndarray, identity_N: np.ndarray
) -> tuple[float, list[Proposal], Pairs]:
    """Return the threshold, the proposals of the clusters at it, and pairs of near faces."""
    if len(vectors_ND) < 2:
        raise UserError("fewer than two faces have an embedding: there is nothing to compare")
    sizes = np.bincount(identity_N[identity_N != NOBODY])
    by_labels = config.threshold is None and int((sizes > 1).sum()) >= _MIN_PAIRABLE
    base = config.threshold or embedder.threshold
    if base is None:
        raise UserError("the model has no threshold: choose one with jobs/evaluate.py, or give --threshold")
    logger.info("clustering %d faces", len(vectors_ND))
    limit = base * (_THRESHOLDS[-1] if by_labels else 1.0)
    near = near_faces(vectors_ND, limit)
    tree = average_linkage(vectors_ND, limit, near)
    threshold = base
    if by_labels:
        threshold = best_threshold({base * share: tree.clusters(base * share) for share in _THRESHOLDS}, identity_N)
    logger.info("groups of faces up to %.3f apart are one person", threshold)
    return threshold, proposals(vectors_ND, identity_N, tree.clusters(threshold), threshold), near


def _leaked(
    source: FacesSource,
    against: FacesSource,
    photos: list[str],
    vectors_ND: np.ndarray,
    identity_N: np.ndarray,
    theirs: Embeddings,
    threshold: float,
) -> list[Proposal]:
    """Return proposals for photos that are in the test set, too. Their evidence is rows of the test set."""
    rows = np.flatnonzero(~theirs.failed_N)
    pairs_P2, distances_P = near_pairs(vectors_ND, theirs.embeddings_ND[rows], NEAR_SHARE * threshold)
    ours_in, theirs_in = np.unique(pairs_P2[:, 0]), rows[np.unique(pairs_P2[:, 1])]
    ours = ((f"ours/{name}", crop) for name, crop in crops_of(source, {photos[n] for n in ours_in}))
    others = ((f"theirs/{name}", crop) for name, crop in crops_of(against, {theirs.photos[n] for n in theirs_in}))
    # One list of both sets, the test set first, so that a pair is two indices into it.
    names = [f"theirs/{name}" for name in theirs.photos] + [f"ours/{name}" for name in photos]
    people = np.concatenate([np.full(len(theirs.photos), NOBODY), identity_N])
    both_P2 = np.stack([rows[pairs_P2[:, 1]], pairs_P2[:, 0] + len(theirs.photos)], axis=1)
    found = duplicates(both_P2, distances_P, names, people, chain(ours, others))
    return [
        Proposal(
            kind=each.kind,
            certainty=each.certainty,
            faces=each.faces - len(theirs.photos),
            identity=each.identity,
            to=each.to,
            evidence=each.evidence,
            distance=each.distance,
        )
        for each in found
    ]


def _applied(config: CurateConfig, output: str, faces_url: str, identities_url: str) -> dict[str, Any]:
    """Write the accepted changes into the identities file, and return the result of the job."""
    decisions = config.apply and absolute_url(config.apply, "--apply")
    applied = apply_decisions(
        output, faces_url, identities_url, decisions, over=config.apply_over, dry_run=config.dry_run
    )
    return {
        "job": "curate",
        "identities_file": applied.identities_url,
        "earlier_identities": applied.earlier_url,
        "changes": applied.num_changes,
        "photos_changed": applied.num_photos,
        **({"dry_run": True} if applied.dry_run else {}),
        "next": "jobs/preprocess.py makes the table of these identities",
    }
