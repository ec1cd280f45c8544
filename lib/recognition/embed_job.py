"""The embed job: turns faces or photos into embeddings, part by part over Ray Data, resumable at any moment.

The parts are those of the faces table, or those that preprocess would make of the photos; see `lib.parts`.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import torch
import tyro

from lib import cluster, storage
from lib.config import absolute_url, default_data_url
from lib.errors import UserError
from lib.faces import table
from lib.faces.alignment import Alignment, realign
from lib.faces.extraction import ExtractionSettings, FaceExtractor, fingerprint, settings_from_fingerprint
from lib.faces.identities import ANY_LISTED
from lib.faces.manifest import Manifest, read_manifest
from lib.faces.part_plan import PartPlan, content_of, plan_parts
from lib.faces.photo_parts import PhotoReader, part_item
from lib.faces.sources.opening import open_source
from lib.faces.sources.source import Source as PhotoFiles
from lib.layout import Layout
from lib.part_workers import Processed, Share, run_parts, summary
from lib.parts import (
    KEEP_VERSIONS,
    begin,
    digest_of,
    finish_version,
    is_same_old_table,
    part_key,
    part_name,
    remove_unused,
    settle,
    split_in,
)
from lib.recognition import embeddings_table
from lib.recognition.embedder import (
    Embedder,
    check_fingerprint,
    chosen_gpus,
    extraction_settings,
    find_model,
    load_embedder,
)
from lib.recognition.onnx_model import ARCFACE_SIZE, OnnxInput
from lib.recognition.recognizer import decoded_crop

logger = logging.getLogger(__name__)

_READERS = 16

BATCH_SIZE = 64
"""Faces per forward pass. Not a flag, because the last digits of an embedding depend on it."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Turn faces into embeddings."""

    data: str = field(default_factory=default_data_url)
    """Folder or URL that holds everything, such as s3://bucket/folder. Default: $DATA_URL, else ./data."""
    model: str | None = None
    """Model folder, run folder or .onnx file. Default: the only run with a model below --data."""
    faces: str | None = None
    """Faces table. Default: faces/ below --data."""
    photos: str | None = None
    """Raw photos instead of a faces table. They are aligned as the model's training faces were."""
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
    strict: bool = False
    """Stop if the faces were made with other settings than the model's training faces. Without it the job warns."""
    keep_versions: int = KEEP_VERSIONS
    """Versions of the embeddings that stay readable, the newest among them."""
    overwrite: bool = False
    """Replace embeddings that were made with another model or other settings. They stay until the new ones are done."""
    dry_run: bool = False
    """Check the input and print the plan, then stop."""
    onnx: Annotated[OnnxInput, tyro.conf.arg(name="")] = field(default_factory=OnnxInput)

    def __post_init__(self) -> None:
        if self.faces is not None and self.photos is not None:
            raise UserError("--faces and --photos are both given: choose one")
        unknown = [split for split in self.splits if split not in table.SPLITS]
        if unknown or not self.splits:
            raise UserError(f"--splits is {' '.join(self.splits) or 'empty'}: allowed are {', '.join(table.SPLITS)}")
        if self.keep_versions < 1:
            raise UserError(f"--keep-versions is {self.keep_versions}: 1 or more")
        cluster.check_gpus(self.gpus)


@dataclass(frozen=True, kw_only=True)
class FacesSource:
    """A faces table to embed.

    Attributes:
        run_id: of the version of the table.
        file_names: of the parts below `url`.
        num_rows: of each of them.
    """

    url: str
    run_id: str
    fingerprint: dict[str, Any]
    file_names: list[str]
    num_rows: list[int]

    def origin(self) -> dict[str, Any]:
        """Return what embeddings say of where they are from."""
        return {"faces_run": self.run_id}

    def old_plan(self) -> dict[str, Any]:
        """Return what embeddings without versions say of their faces."""
        splits = sorted({split_in(name) for name in self.file_names})
        return {"faces_run": self.run_id, "files": len(self.file_names), "splits": splits}

    def items(self, model: str) -> list[tuple[dict[str, Any], list[str], int]]:
        """Return for each part the item for a worker, its files by a model of this digest, and its number of rows."""
        items = []
        for name, rows in zip(self.file_names, self.num_rows, strict=True):
            made_of = name if part_key(name) else f"{self.run_id}/{name}"
            output = _output_name(name, made_of, model)
            items.append(({"faces": storage.join(self.url, name), "name": output}, [output], rows))
        return items


@dataclass(frozen=True, kw_only=True)
class PhotosSource:
    """Raw photos to embed; faces are detected on the way."""

    files: PhotoFiles
    manifest: Manifest
    settings: ExtractionSettings

    @property
    def url(self) -> str:
        """Where the photos are."""
        return self.files.url

    @property
    def fingerprint(self) -> dict[str, Any]:
        """That of the faces."""
        return fingerprint(self.settings)

    def origin(self) -> dict[str, Any]:
        """Return what embeddings say of where they are from."""
        return {"photos": storage.redacted(self.url)}

    def old_plan(self) -> dict[str, Any]:
        """Return what embeddings without versions say of their photos."""
        return {
            "photos": len(self.manifest),
            "photo_bytes": self.manifest.num_bytes,
            "manifest": self.manifest.old_digest(),
        }

    def parts(self) -> PartPlan:
        """Return the parts, which are those of a faces table of these photos."""
        return plan_parts(
            self.manifest, content_of(self.fingerprint, self.settings.max_megapixels, self.files.columns.image)
        )

    def items(self, model: str) -> list[tuple[dict[str, Any], list[str], int]]:
        """Return for each part the item for a worker, its files by a model of this digest, and its number of photos."""
        plan = self.parts()
        plan = plan.renamed({name: _output_name(name, name, model) for name in plan.file_names()})
        return [(part_item(plan, part), part.file_names(), part.stop - part.start) for part in plan.parts]


Source = FacesSource | PhotosSource


def _output_name(name: str, made_of: str, model: str) -> str:
    """Return the file that the faces of a part become by a model of this digest."""
    key = part_key(name) or name.rpartition("/part-")[2].removesuffix(".parquet")
    return part_name(split_in(name), key, digest_of([made_of, model]))


def embed_job(config: EmbedConfig) -> dict[str, Any]:
    """Make or complete the embeddings table, and return its counts."""
    layout = Layout(config.data)
    model_url = find_model(layout, config.model)
    embedder = load_embedder(model_url, config.onnx)
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
        overwrite=config.overwrite,
        dry_run=config.dry_run,
        splits=config.splits,
        keep_versions=config.keep_versions,
    )


def faces_source(faces_url: str, splits: Sequence[str]) -> FacesSource:
    """Return the parts of these splits of a faces table.

    Raises:
        UserError: the table does not exist or is not finished, or has no photo in these splits.
    """
    success = table.read_success(faces_url)
    names = table.part_names(success, splits)
    if not names:
        raise UserError(f"{faces_url} has no photo in split {', '.join(splits)}: name others by --splits")

    def num_rows_of(name: str) -> int:
        with storage.open_parquet(storage.join(faces_url, name), table.REQUIRED) as file:
            return int(file.metadata.num_rows)

    with ThreadPoolExecutor(_READERS) as pool:
        num_rows = list(pool.map(num_rows_of, names))
    return FacesSource(
        url=faces_url,
        run_id=success["run_id"],
        fingerprint=success["fingerprint"],
        file_names=names,
        num_rows=num_rows,
    )


def photos_source(
    photos_url: str,
    identities_url: str | None,
    settings: ExtractionSettings,
    *,
    split_seed: int = 0,
    splits: Sequence[str] = table.SPLITS,
    with_identities: bool = True,
) -> PhotosSource:
    """Return the photos of these splits, with identities from a file (identities.txt beside them), else their folders.

    Raises:
        UserError: as `read_manifest` does; or no photo is in these splits.
    """
    if identities_url is not None and not storage.exists(identities_url):
        raise UserError(f"--identities {identities_url} does not exist: correct the path, or leave the flag out")
    beside = storage.join(photos_url.rstrip("/").rpartition("/")[0], "identities.txt")
    files = open_source(photos_url)
    manifest = read_manifest(
        files,
        (identities_url or beside) if with_identities else None,
        split_seed=split_seed,
        identities_required=False,
        min_listed_share=ANY_LISTED,  # the list may cover more photos than these
    )
    in_splits = np.isin(manifest.photos["split"].to_numpy(), list(splits))
    if not in_splits.any():
        raise UserError(f"{photos_url} has no photo in split {', '.join(splits)}: name others by --splits")
    kept = Manifest(manifest.photos.filter(pa.array(in_splits)), manifest.num_bytes, manifest.num_passed_over)
    return PhotosSource(files=files, manifest=kept, settings=settings)


def embed_source(
    source: Source,
    embedder: Embedder,
    output: str,
    *,
    onnx: OnnxInput | None = None,
    strict: bool = False,
    gpus: cluster.Gpus = "auto",
    overwrite: bool = False,
    dry_run: bool = False,
    splits: Sequence[str] = table.SPLITS,
    keep_versions: int = 1,
) -> dict[str, Any]:
    """Make or complete the embeddings of a source in the folder `output`, and return the counts.

    Of a source that has changed, only the parts that changed are made.

    Raises:
        UserError: the folder holds something else; with `strict`, faces with other settings than the model's.
        JobError: a failure of the storage, or embeddings that are not finite.
    """
    started = time.monotonic()
    model = {"digest": embedder.digest, "embedding_dim": embedder.embedding_dim, "template": embedder.template}
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
    is_old = is_same_old_table(found, source.old_plan)
    if is_old or found.is_finished(file_names):
        assert found.success is not None
        logger.info("%s is complete: nothing to do", output)
        if not is_old:
            begin(found, plan, file_names)
            remove_unused(output, found.success, found.present, keep_versions=keep_versions)
        return {**result, **found.success["counts"], "rows_processed": 0}
    missing = found.missing(file_names)
    begun = begin(found, plan, file_names)
    todo = [(item, rows) for item, names, rows in items if missing & set(names)]
    num_todo = sum(rows for _, rows in todo)
    if num_todo < num_all:
        logger.info("resuming: %d of %d rows are done", num_all - num_todo, num_all)
    processed = Processed()
    if todo:
        with cluster.connected():
            chosen = chosen_gpus(embedder.url, gpus)
            processed = run_parts(
                [item for item, _ in todo],
                EmbedWorker,
                ((embedder.url, onnx), output, source_settings(source), plan["fingerprint"], model, chosen > 0),
                unit="face",
                num_done=num_all - num_todo,
                num_all=num_all,
                share=Share.of_gpus(chosen, most_a_gpu=1),
            )
    storage.remove_unfinished(output)
    counts = _counts(output, file_names)
    about: dict[str, Any] = {
        "model": {"url": storage.redacted(embedder.url), **model},
        "fingerprint": source.fingerprint,
    }
    about |= {"fingerprint_differences": differences, "counts": counts, **source.origin()}
    finish_version(output, begun, file_names, about, keep_versions=keep_versions)
    return {
        **result,
        **counts,
        "rows_processed": processed.num,
        "faces_per_s": round(processed.per_s() or 0.0, 1),
        "seconds": round(time.monotonic() - started, 1),
    }


def check_source(source: Source, embedder: Embedder, *, strict: bool) -> list[str]:
    """Return how the faces of a source differ from the model's training faces, see `check_fingerprint`."""
    next_step = "run jobs/preprocess.py with the model's settings (in its README.md), or give --photos"
    return check_fingerprint(source.fingerprint, embedder, strict=strict, next_step=next_step)


def source_settings(source: Source) -> tuple[PhotoFiles, ExtractionSettings] | None:
    """Return the photos and how to make their faces; None for a faces table."""
    return (source.files, source.settings) if isinstance(source, PhotosSource) else None


def model_name(model_url: str) -> str:
    """Return the name of a model: that of its run, else of its own folder or file."""
    names = model_url.rstrip("/").split("/")
    return names[-2] if names[-1] in ("model", "model.onnx") and len(names) > 1 else names[-1].removesuffix(".onnx")


class EmbedWorker:
    """Ray Data's worker: turns a part of a faces table, or of a manifest, into a part of the embeddings table."""

    def __init__(
        self,
        model_source: tuple[str, OnnxInput | None],
        output: str,
        photos: tuple[PhotoFiles, ExtractionSettings] | None,
        fingerprint: dict[str, Any],
        model: dict[str, Any],
        use_gpu: bool,
    ) -> None:
        torch.set_num_threads(1)  # a worker has one CPU, and the number of threads changes the last digits
        self._embedder = load_embedder(*model_source, device="cuda" if use_gpu else "cpu")
        if self._embedder.digest != model["digest"]:
            raise UserError(
                f"the model {storage.redacted(self._embedder.url)} changed since this job began: run it again when the "
                "training of that model has ended"
            )
        self._output = output
        self._schema = embeddings_table.schema(model["embedding_dim"], json.dumps(fingerprint), json.dumps(model))
        self._made = settings_from_fingerprint(fingerprint).alignment
        self._reader = None
        if photos is not None:
            files, settings = photos
            self._reader = PhotoReader(files, FaceExtractor(settings))

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Process one item of a source, and return its summary."""
        return summary(self._process, item)

    def _process(self, item: dict[str, Any]) -> tuple[int, int]:
        num_rows = 0
        for name, rows, num_photos in self._rows(item):
            faces = [row for row in rows if row.get("crop")]
            embeddings = iter(embed_faces(self._embedder, faces, self._made))
            for row in rows:
                row["embedding"] = next(embeddings) if row.get("crop") else None
            part = pa.Table.from_pylist(rows, schema=self._schema)
            storage.write_parquet(storage.join(self._output, name), part, compression="zstd")
            num_rows += num_photos
        return num_rows, 0

    def _rows(self, item: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]], int]]:
        """Yield each file, its rows of a faces table, and their number of photos."""
        if self._reader is None:
            rows = storage.read_parquet(item["faces"], table.REQUIRED).to_pylist()
            yield item["name"], rows, len(rows)
            return
        names = json.loads(item["names"])
        for split, made in self._reader.rows(item).items():
            yield names[split], made.rows, made.num_photos


def embed_faces(embedder: Embedder, faces: Sequence[Mapping[str, Any]], made: Alignment) -> np.ndarray:
    """Return embeddings_ND, float32, of aligned rows of a faces table with the fingerprint `made`, batch by batch.

    Raises:
        UserError: a crop cannot be decoded; an embedding is not finite.
    """
    embeddings_ND = np.empty((len(faces), embedder.embedding_dim), np.float32)
    for start in range(0, len(faces), BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        embeddings_ND[batch] = embedder.embed(np.stack([_wanted_crop(embedder, face, made) for face in faces[batch]]))
    num_broken = int(np.count_nonzero(~np.isfinite(embeddings_ND).all(axis=1)))
    if num_broken:
        raise UserError(
            f"the model {embedder.url!r} gives NaN or infinity for {num_broken} of {len(faces)} faces: it is broken; "
            "take an earlier checkpoint, or train again with a lower learning rate"
        )
    return embeddings_ND


def _wanted_crop(embedder: Embedder, face: Mapping[str, Any], made: Alignment) -> np.ndarray:
    crop_HWC = decoded_crop(face["crop"])
    if embedder.template == made.template:
        return crop_HWC
    landmarks_52 = np.asarray(face["landmarks"]).reshape(5, 2)
    wanted = Alignment(template=embedder.template, image_size=ARCFACE_SIZE)
    return realign(crop_HWC, np.asarray(face["box"]), landmarks_52, made=made, wanted=wanted)


def _counts(output: str, file_names: Sequence[str]) -> dict[str, Any]:
    statuses, identities = Counter[str](), set[str]()
    columns = table.columns("identity", "status")
    with ThreadPoolExecutor(_READERS) as pool:
        for rows in pool.map(lambda name: storage.read_parquet(storage.join(output, name), columns), file_names):
            statuses.update(rows["status"].to_pylist())
            identities.update(identity for identity in rows["identity"].to_pylist() if identity is not None)
    return {
        "rows": statuses.total(),
        **{status: statuses[status] for status in table.STATUSES},
        "identities": len(identities),
    }
