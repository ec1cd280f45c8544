"""The identify job: says who is in photos, by a gallery of known people."""

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import tyro

from lib import cluster, storage
from lib.config import absolute_url, default_data_url
from lib.errors import UserError
from lib.faces import table
from lib.faces.extraction import POLICIES
from lib.faces.photo_flags import PhotoFlags
from lib.layout import Layout
from lib.part_workers import run_parts
from lib.parts import part_key, split_in
from lib.recognition.crops import crops_in_table, read_crops
from lib.recognition.embed_job import embed_source, model_name
from lib.recognition.embedder import (
    Embedder,
    FlipFlag,
    chosen_flip,
    extraction_settings,
    find_model,
    load_embedder,
)
from lib.recognition.face_source import PhotosSource, check_source, photos_source
from lib.recognition.gallery import Gallery, known_people
from lib.recognition.gallery_search import SEARCH_FOLDER, SearchWorker, left_to_search, planned_search
from lib.recognition.match_worker import MatchPlan, MatchWorker, left_to_write
from lib.recognition.matches import MATCHES_SCHEMA, SHEET_FACES, first_faces, sheet_of
from lib.recognition.onnx_model import OnnxInput
from lib.recognition.open_set import open_set_figures, open_set_line, probes_of

logger = logging.getLogger(__name__)

FOLDERS = "folders"

SHEET_NAME = "matches.jpg"


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
    gallery = known_people(layout.embeddings(model_name(model_url), config.gallery, "--gallery"), embedder)
    source = _probes(config, embedder)
    output = layout.output("matches", config.output)
    result = {"job": "identify", "gallery_faces": len(gallery), "gallery_identities": len(gallery.people)}
    result |= {"threshold": threshold}
    if config.dry_run:
        check_source(source, embedder, strict=config.strict)
        return {**result, "matches": output, "dry_run": True, "photos": len(source.manifest)}

    storage.check_writable(output)
    folder = storage.join(output, "embeddings")
    # These files are from earlier photos.
    embed_source(source, embedder, folder, onnx=config.onnx, strict=config.strict, gpus=config.gpus, overwrite=True)
    with_names, several = config.identities is not None, config.faces_policy == "all" and not source.aligned
    search = planned_search(gallery, folder, output, config.top, [str(threshold), str(with_names), str(several)])
    plan = MatchPlan(search=search, output=output, threshold=threshold, with_names=with_names, several=several)
    search_and_write(plan)
    done = [storage.read_json(plan.counts_url(group)) for group in range(len(search.groups))]
    counts = {name: sum(each[name] for each in done) for name in ("rows", "faces", "unknown")}
    measured = {"open_set": _open_set(plan, gallery, done)} if with_names else {}
    storage.write_bytes(storage.join(output, SHEET_NAME), _sheet(config, plan, source, done))
    storage.remove_tree(storage.join(output, SEARCH_FOLDER))
    return {
        **result,
        "matches": storage.join(output, plan.file_name(0, "parquet")),
        "csv": storage.join(output, plan.file_name(0, "csv")),
        "files": len(search.groups),
        "photos": len(source.manifest),
        "faces": counts["faces"],
        "identified": counts["faces"] - counts["unknown"],
        "unknown": counts["unknown"],
        "photos_without_face": counts["rows"] - counts["faces"],
        **measured,
        "seconds": round(time.monotonic() - started, 1),
    }


def search_and_write(plan: MatchPlan) -> None:
    """Do the pieces of a search that are left, then write the matches of the groups that are left.

    One piece is done here, several by workers.
    """
    search = plan.search
    pieces, groups = left_to_search(search), left_to_write(plan)
    pieces = [piece for piece in pieces if piece["group"] in groups]
    with ExitStack() as stack:
        if len(pieces) > 1 or len(groups) > 1:
            stack.enter_context(cluster.connected())
        if len(pieces) == 1:
            SearchWorker(search).search(pieces[0])
        elif pieces:
            num_all = sum(search.num_rows) * sum(search.num_faces)
            num_left = sum(search.num_rows[each["group"]] * search.num_faces[each["shard"]] for each in pieces)
            run_parts(pieces, SearchWorker, (search,), unit="comparison", num_done=num_all - num_left, num_all=num_all)
        if len(groups) == 1:
            MatchWorker(plan).write({"group": groups[0]})
        elif groups:
            num_all = sum(search.num_rows)
            num_done = num_all - sum(search.num_rows[group] for group in groups)
            items = [{"group": group} for group in groups]
            run_parts(items, MatchWorker, (plan,), unit="photo", num_done=num_done, num_all=num_all)
    storage.remove_unfinished(plan.output)


def _open_set(plan: MatchPlan, gallery: Gallery, counts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of open-set identification, by the identities of the probes.

    Raises:
        UserError: no photo with one face has a name.
    """
    named = pa.concat_tables([storage.read_parquet(plan.named_url(group)) for group in range(len(counts))])
    if not len(named):
        raise UserError("--identities names no photo that has one face: correct the list, or leave the flag out")
    person_B, nearest_B, distance_B = (named[name].to_numpy() for name in ("person", "nearest", "distance"))
    probes = probes_of(person_B, nearest_B, distance_B, gallery.people)
    figures = open_set_figures(probes, plan.threshold)
    figures |= {name: sum(each[name] for each in counts) for name in ("photos_of_several_faces", "photos_without_name")}
    logger.info("open set: %s", open_set_line(figures))
    return figures


def _sheet(config: IdentifyConfig, plan: MatchPlan, source: PhotosSource, counts: Sequence[dict[str, Any]]) -> bytes:
    """Return the contact sheet of the first faces."""
    shown, gallery_parts = [], list[str]()
    for group, each in enumerate(counts):
        shown.append(storage.read_parquet(storage.join(plan.output, plan.file_name(group, "parquet")), MATCHES_SCHEMA))
        gallery_parts += each["shown_parts"]
        if sum(counted["faces"] for counted in counts[: group + 1]) >= SHEET_FACES:
            break
    matches = first_faces(pa.concat_tables(shown), SHEET_FACES)
    probe_crops = read_crops(source, matches["photo"].unique().to_pylist())
    gallery_crops = _gallery_crops(config, gallery_parts, matches["gallery_photo"].unique().to_pylist())
    return sheet_of(matches, plan.threshold, probe_crops, gallery_crops)


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


def _gallery_crops(config: IdentifyConfig, parts: Sequence[str], names: Sequence[str]) -> dict[str, bytes]:
    """Return the crops of known faces in these parts of the gallery, from the same parts of the faces table."""
    faces_url = Layout(config.data).faces(config.faces)
    if config.faces is None and not storage.exists(storage.join(faces_url, table.SUCCESS_NAME)):
        logger.info("the contact sheet has no gallery pictures: %s is no faces table (--faces)", faces_url)
        return {}
    keys = {(split_in(name), part_key(name)) for name in parts}
    file_names = table.part_names(table.read_success(faces_url), table.SPLITS)
    # A table from before there were versions has other names.
    same = [name for name in file_names if (split_in(name), part_key(name)) in keys or part_key(name) is None]
    return dict(crops_in_table(faces_url, same, names))
