"""The embed job: turns faces or photos into embeddings, part by part over Ray Data, resumable at any moment.

The parts are those of the faces table, or those that preprocess would make of the photos; see `lib.parts`.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import tyro

from lib import cluster, storage
from lib.config import absolute_url, default_data_url
from lib.errors import UserError
from lib.faces import table
from lib.faces.photo_flags import PhotoFlags
from lib.faces.tombstones import read_tombstones
from lib.layout import Layout
from lib.part_workers import Processed, Share, run_parts
from lib.parts import (
    KEEP_VERSIONS,
    Found,
    begin,
    check_ours,
    finish_version,
    is_same_old_table,
    remove_unused,
    settle,
)
from lib.recognition.embed_worker import Computing, EmbedWorker
from lib.recognition.embedder import (
    Embedder,
    FlipFlag,
    chosen_flip,
    chosen_gpus,
    extraction_settings,
    find_model,
    load_embedder,
)
from lib.recognition.embeddings_table import counts_of
from lib.recognition.face_source import (
    FacesSource,
    PhotosSource,
    Source,
    check_source,
    faces_source,
    photos_source,
    shared_items,
)
from lib.recognition.onnx_model import OnnxInput
from lib.recognition.spec import WEIGHTS_SUFFIXES

logger = logging.getLogger(__name__)

CPU_PARTS, GPU_PARTS = 2, 3
"""Parts of a faces table, of up to 1,000 faces, that a worker reads, embeds and writes at once."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Turn faces into embeddings."""

    data: str = field(default_factory=default_data_url)
    """Folder or URL that holds everything, such as s3://bucket/folder. Default: $DATA_URL, else ./data."""
    model: str | None = None
    """Model folder, run folder, .onnx file or weights of iResNet. Default: the only run with a model below --data."""
    faces: str | None = None
    """Faces table. Default: faces/ below --data."""
    photos: str | None = None
    """Raw photos instead of a faces table, in any format that preprocess takes. They are aligned as the model's
    training faces were."""
    identities: str | None = None
    """File of lines "photo-name identity" for --photos. Default: identities.txt beside the photos, else their
    folders."""
    output: str | None = None
    """Folder for the embeddings. Default: embeddings/NAME OF THE RUN/ below --data."""
    splits: tuple[str, ...] = table.SPLITS
    """Splits to embed, out of train, val and test."""
    detector_weights: str | None = None
    """With --photos: weights file of the detector, if the model's faces were made with one."""
    split_seed: int = 0
    """With --photos: seed of the split of identities into train, val and test."""
    gpus: cluster.Gpus = "auto"
    """GPUs to embed on. auto: all of the cluster. 0: none."""
    precision: cluster.Precision = "auto"
    """Arithmetic of a model folder. auto: bf16 on GPUs that support it, fp32 elsewhere. An ONNX file has its own."""
    flip: FlipFlag = False
    """Add the embedding of the mirror image, although the model does not say so. It costs a second pass."""
    no_flip: FlipFlag = False
    """Leave mirror images out, although the model adds them."""
    strict: bool = False
    """Stop if the faces were made with other settings than the model's training faces. Without it the job warns."""
    keep_versions: int = KEEP_VERSIONS
    """Versions of the embeddings that stay readable, the newest among them."""
    overwrite: bool = False
    """Replace embeddings that were made with another model or other settings. They stay until the new ones are done."""
    dry_run: bool = False
    """Check the input and print the plan, then stop."""
    reading: Annotated[PhotoFlags, tyro.conf.arg(name="")] = field(default_factory=PhotoFlags)
    onnx: Annotated[OnnxInput, tyro.conf.arg(name="")] = field(default_factory=OnnxInput)

    def __post_init__(self) -> None:
        if self.faces is not None and self.photos is not None:
            raise UserError("--faces and --photos are both given: choose one")
        self.reading.check_used(has_photos=self.photos is not None)
        unknown = [split for split in self.splits if split not in table.SPLITS]
        if unknown or not self.splits:
            raise UserError(f"--splits is {' '.join(self.splits) or 'empty'}: allowed are {', '.join(table.SPLITS)}")
        if self.keep_versions < 1:
            raise UserError(f"--keep-versions is {self.keep_versions}: 1 or more")
        cluster.check_gpus(self.gpus)
        _ = chosen_flip(self.flip, self.no_flip)


def embed_job(config: EmbedConfig) -> dict[str, Any]:
    """Make or complete the embeddings table, and return its counts."""
    layout = Layout(config.data)
    model_url = find_model(layout, config.model)
    embedder = load_embedder(model_url, config.onnx, flip=chosen_flip(config.flip, config.no_flip))
    name = model_name(model_url)
    output = layout.embeddings(name, config.output)
    source: Source
    if config.photos is not None:
        source = photos_source(
            layout.photos(config.photos),
            config.identities and absolute_url(config.identities, "--identities"),
            extraction_settings(embedder, config.detector_weights),
            split_seed=config.split_seed,
            splits=config.splits,
            tombstones=read_tombstones(config.data),
            reading=config.reading,
        )
    else:
        source = faces_source(layout.faces(config.faces), config.splits)
    return embed_source(
        source,
        embedder,
        output,
        onnx=config.onnx,
        strict=config.strict,
        gpus=config.gpus,
        precision=config.precision,
        overwrite=config.overwrite,
        dry_run=config.dry_run,
        splits=config.splits,
        keep_versions=config.keep_versions,
    )


def embed_source(
    source: Source,
    embedder: Embedder,
    output: str,
    *,
    onnx: OnnxInput | None = None,
    strict: bool = False,
    gpus: cluster.Gpus = "auto",
    precision: cluster.Precision = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    splits: Sequence[str] = table.SPLITS,
    keep_versions: int = 1,
) -> dict[str, Any]:
    """Make or complete the embeddings of a source in the folder `output`, and return the counts.

    If the source has changed, only the changed parts are made.

    Raises:
        UserError: the folder has something else in it, or with `strict` the faces were made with other settings.
        JobError: the storage failed, or embeddings are not finite.
    """
    started = time.monotonic()
    plan = {"job": "embed", "model": embedder.digest, "fingerprint": source.fingerprint, "of_splits": sorted(splits)}
    differences = check_source(source, embedder, strict=strict)
    items = source.items(embedder.digest)
    num_all = sum(num_rows for _, _, num_rows in items)
    result: dict[str, Any] = {"job": "embed", "embeddings": output}
    if dry_run:
        logger.info("%d rows in %d parts would go to %s", num_all, len(items), output)
        return {**result, "dry_run": True, "rows": num_all, "parts": len(items), **plan}
    storage.check_writable(output)
    file_names = [name for _, names, _ in items for name in names]
    found = settle(output, plan, flag="--output", overwrite=overwrite)
    success = _finished(found, plan, source, file_names, keep_versions=keep_versions)
    if success is not None:
        logger.info("%s is complete: nothing to do", output)
        return {**result, **success["counts"], "rows_processed": 0}
    missing = found.missing(file_names)
    begun = begin(found, plan, file_names)
    todo = [(item, rows) for item, names, rows in items if missing & set(names)]
    processed = _embed_parts(todo, source, embedder, output, (onnx, gpus, precision), num_all=num_all, begun=begun)
    storage.remove_unfinished(output)
    counts = counts_of(output, file_names)
    about: dict[str, Any] = {"model": {"url": storage.redacted(embedder.url), **_model(embedder)}}
    about |= {"fingerprint": source.fingerprint, "fingerprint_differences": differences, "counts": counts}
    finish_version(output, begun, file_names, {**about, **source.origin()}, keep_versions=keep_versions)
    speed = {"faces_per_s": round(processed.per_s() or 0.0, 1), "seconds": round(time.monotonic() - started, 1)}
    return {**result, **counts, "rows_processed": processed.num, **speed}


def _finished(
    found: Found, plan: dict[str, Any], source: Source, file_names: list[str], *, keep_versions: int
) -> dict[str, Any] | None:
    """Return the content of `_SUCCESS` if the table is complete, after removing what no kept version needs."""
    if is_same_old_table(found, source.old_plan):
        return found.success
    if not found.is_finished(file_names):
        return None
    assert found.success is not None
    begin(found, plan, file_names)
    remove_unused(found.url, found.success, found.present, keep_versions=keep_versions)
    return found.success


def _embed_parts(
    todo: Sequence[tuple[Any, int]],
    source: Source,
    embedder: Embedder,
    output: str,
    options: tuple[OnnxInput | None, cluster.Gpus, cluster.Precision],
    *,
    num_all: int,
    begun: dict[str, Any],
) -> Processed:
    """Embed parts, each given as an item and its number of rows, on the workers that the cluster has room for."""
    num_done = num_all - sum(rows for _, rows in todo)
    if num_done:
        logger.info("resuming: %d of %d rows are done", num_done, num_all)
    if not todo:
        return Processed()
    onnx, gpus, precision = options
    with cluster.connected():
        chosen = chosen_gpus(embedder.url, gpus)
        share = Share.of_gpus(chosen, most_a_gpu=1)
        if isinstance(source, FacesSource):  # the detector of photos serves one thread
            share = replace(share, num_parts=GPU_PARTS if chosen else CPU_PARTS)
        how = Computing(
            use_gpu=chosen > 0,
            precision=precision,
            num_threads=share.num_cpus,
            num_faces=num_all // max(1, share.num_workers),
        )
        model = (embedder.url, onnx, embedder.flip)
        photos = source.how() if isinstance(source, PhotosSource) else None
        return run_parts(
            shared_items([item for item, _ in todo], output),
            EmbedWorker,
            (model, output, photos, source.fingerprint, _model(embedder), how),
            unit="face",
            num_done=num_done,
            num_all=num_all,
            share=share,
            look=partial(check_ours, output, begun),
        )


def _model(embedder: Embedder) -> dict[str, Any]:
    about = {"digest": embedder.digest, "embedding_dim": embedder.embedding_dim}
    return {**about, "template": embedder.template, "flip": embedder.flip}


def model_name(model_url: str) -> str:
    """Return the name of a model: that of its run, else of its own folder or file."""
    names = model_url.rstrip("/").split("/")
    if names[-1] in ("model", "model.onnx") and len(names) > 1:
        return names[-2]
    suffix = next((suffix for suffix in (".onnx", *WEIGHTS_SUFFIXES) if names[-1].endswith(suffix)), "")
    return names[-1].removesuffix(suffix)
