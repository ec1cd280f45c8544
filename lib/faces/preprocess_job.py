"""The preprocess job: turns photos into the faces table, part by part over Ray Data, resumable at any moment.

If the photos have changed, it makes the changed parts beside the finished ones: see `lib.parts`.
"""

import json
import logging
import time
from dataclasses import replace
from functools import partial
from typing import Any

from lib import cluster, storage
from lib.errors import JobError, UserError
from lib.faces import card
from lib.faces.aligned import COPIED_PARTS
from lib.faces.detection import load_detector
from lib.faces.growth import changes, names_to_retry, refuse_other_photos
from lib.faces.manifest import Manifest, read_manifest
from lib.faces.part_plan import earlier_files, plan_parts
from lib.faces.photo_parts import part_item
from lib.faces.plan_files import Part, PartPlan, stored_plan
from lib.faces.preprocess_config import PreprocessConfig
from lib.faces.preprocess_worker import PartWorker
from lib.faces.sources.source import Source
from lib.faces.splits import SHARES
from lib.faces.tombstones import read_tombstones, without_forgotten
from lib.part_workers import Processed, Share, run_parts
from lib.parts import (
    MANIFEST_FOLDER,
    SUCCESS_NAME,
    Found,
    begin,
    check_ours,
    digest_of,
    finished_run_id,
    is_same_old_table,
    next_version,
    read_plan,
    remove_unused,
    settle,
)
from lib.plans import differences
from lib.storage_errors import MissingFileError

logger = logging.getLogger(__name__)

WORKERS_A_GPU = 8
"""One worker decodes headers and encodes crops on CPUs while another uses the GPU."""
WAIT_EVERY_S = 5.0
WAIT_TOLD_EVERY_S = 300.0


def preprocess(config: PreprocessConfig) -> dict[str, Any]:
    """Make the faces table, continue it, or make a new version of it, and return its counts."""
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
        manifest, _ = _manifest(config, source)
        plan = plan_parts(manifest, config.content())
        logger.info("%d photos in %d parts would go to %s", len(manifest), len(plan.parts), config.faces_url)
        about = {"parts": len(plan.parts), "photos": len(manifest), "photo_bytes": manifest.num_bytes}
        return {"job": "preprocess", "dry_run": True, "faces": config.faces_url, **about, **settings}

    storage.check_writable(config.faces_url)
    found = settle(config.faces_url, settings, flag="--faces", overwrite=config.overwrite)
    kept_url = storage.join(config.faces_url, MANIFEST_FOLDER, "listing")
    planned = _begun_plan(config, found) or _planned(config, source, found, kept_url)
    result: dict[str, Any] = {"job": "preprocess", "faces": config.faces_url}
    if planned is None or found.is_finished(planned.file_names()):
        assert found.success is not None
        logger.info("%s is complete: nothing to do", config.faces_url)
        storage.remove_tree(kept_url)
        if planned is not None:
            begin(found, {**settings, **planned.layout}, planned.file_names())
            remove_unused(config.faces_url, found.success, found.present, keep_versions=config.keep_versions)
        return {**result, **found.success["counts"], "photos_processed": 0}
    return {**result, **_make(config, source, planned, found, settings, kept_url)}


def _begun_plan(config: PreprocessConfig, found: Found) -> PartPlan | None:
    """Return the parts of a version that was begun but not finished, to avoid listing the photos again."""
    if found.plan is None or found.plan.get("content") in (None, (found.success or {}).get("content")):
        return None
    plan = stored_plan(storage.join(config.faces_url, MANIFEST_FOLDER), _list_digest(config))
    if plan is None or digest_of(sorted(plan.file_names())) != found.plan["content"]:
        return None
    logger.info("going on with the list of %d photos made before: later ones are for the next run", plan.num_photos)
    return plan


def _list_digest(config: PreprocessConfig) -> str:
    """Return a digest of everything besides the photos that decides the parts."""
    names = ("photos_url", "identities_url", "min_listed_share", "exclude_identities", "exclude_pairs", "retry")
    values = {name: getattr(config, name) for name in names}
    columns = ("photos_format", "identity_column", "photo_column")
    values |= {name: getattr(config.reading, name) for name in columns}
    values |= {"photo_list": config.photo_list_url} if config.photo_list_url else {}
    given = filter(None, [config.photo_list_url, config.split_from_url])
    lists = [config.identities_url, *config.excluded_urls(), *given]
    marks = [storage.file_info(url)[1:] for url in lists if storage.exists(url)]
    tombstones = read_tombstones(config.data)
    forgotten = [tombstones.digest] if tombstones else []
    return digest_of(
        [json.dumps([_settings_plan(config), config.content(), values, marks, *forgotten], sort_keys=True)]
    )


def _planned(config: PreprocessConfig, source: Source, found: Found, kept_url: str | None = None) -> PartPlan | None:
    """Return the parts of the table; None if an old table is complete and made of these photos."""
    manifest, num_forgotten = _manifest(config, source, kept_url)
    if is_same_old_table(found, lambda: _old_plan(manifest)):
        return None
    plan = replace(plan_parts(manifest, config.content(), found.plan), num_forgotten=num_forgotten)
    names = plan.file_names()
    plan = plan.renamed(dict(zip(names, found.current(names), strict=True)))
    return plan.renamed(names_to_retry(found, plan.file_names(), config.retry)) if config.retry else plan


def _make(
    config: PreprocessConfig,
    source: Source,
    plan: PartPlan,
    found: Found,
    settings: dict[str, Any],
    kept_url: str,
) -> dict[str, Any]:
    """Make the missing parts of the table, then its version, and return its counts."""
    started = time.monotonic()
    if config.reading.aligned is None:
        load_detector(config.detector, config.settings().detector_weights)  # logged here once, not by each worker
    names = plan.file_names()
    missing = found.missing(names)
    todo = [part for part in plan.parts if missing & set(part.file_names())]
    _tell_what_changed(config, found, plan, len(todo))
    begun = begin(found, {**settings, **plan.layout}, names)
    if todo and plan.owner is not None:
        owner, plan = plan.owner, plan.stored(storage.join(config.faces_url, MANIFEST_FOLDER), _list_digest(config))
        owner.close()  # frees its memory: the workers may need it
        storage.remove_tree(kept_url)
    processed = _process(config, source, plan, todo, found, settings["fingerprint"], begun)
    storage.remove_unfinished(config.faces_url)
    counts = card.finish(
        config.faces_url,
        plan,
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
    """Log in one line what there is to do, and refuse photos that differ too much from the table's."""
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
    """Return the settings that decide the table besides the photos."""
    return {
        "fingerprint": config.fingerprint(),
        "split_seed": config.split_seed,
        **({"split_shares": [*config.split_shares]} if config.split_shares != SHARES else {}),
        **({"split_from": config.split_from} if config.split_from is not None else {}),
        "max_megapixels": config.max_megapixels,
        **({"verify": True} if config.reading.verify else {}),
        "image_column": config.reading.image_column,
    }


def _manifest(config: PreprocessConfig, source: Source, kept_url: str | None = None) -> tuple[Manifest, int]:
    """Return the photos, and how many were left out because they were forgotten."""
    tombstones = read_tombstones(config.data)
    logger.info("listing %s: %s", storage.redacted(source.list_url or source.url), source.what)
    manifest = read_manifest(
        source,
        config.identities_url,
        splits=config.splits(),
        exclude=config.excluded_urls(),
        identities_required=config.faces_policy != "all",
        min_listed_share=config.min_listed_share,
        kept_url=kept_url,
    )
    return without_forgotten(manifest, tombstones)


def _old_plan(manifest: Manifest) -> dict[str, Any]:
    """Return the entries about photos in the plans of tables without versions."""
    return {"photos": len(manifest), "photo_bytes": manifest.num_bytes, "manifest": manifest.old_digest()}


def _wait_until_done(config: PreprocessConfig) -> dict[str, Any]:
    """Return the counts of the table once it is finished, with the present photos and settings.

    A finished table of other photos does not count: it is about to be replaced. The photos are listed only when there
    is a new table.
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
        except (JobError, MissingFileError) as error:  # The storage does not answer, or the table is being replaced.
            logger.warning("still waiting: %s", error)
        if time.monotonic() - told > WAIT_TOLD_EVERY_S:
            told = time.monotonic()
            logger.info("still waiting")
        time.sleep(WAIT_EVERY_S)


def _finished(config: PreprocessConfig) -> tuple[dict[str, Any] | None, str]:
    """Return the content of `_SUCCESS` if the table has these photos and settings, else the difference."""
    different = differences(_settings_plan(config), read_plan(config.faces_url))
    if different:
        return None, "; ".join(different)
    found = settle(config.faces_url, _settings_plan(config), flag="--faces", overwrite=False)
    plan = _planned(replace(config, retry=()), config.source(), found)
    if plan is None or found.is_finished(plan.file_names()):
        return found.success, ""
    return None, "other photos or identities"


def _process(
    config: PreprocessConfig,
    source: Source,
    plan: PartPlan,
    todo: list[Part],
    found: Found,
    faces_fingerprint: dict[str, Any],
    begun: dict[str, Any],
) -> Processed:
    """Run the parts on the cluster."""
    if not todo:
        return Processed()
    num_all = plan.num_photos
    num_done = num_all - sum(map(len, todo))
    if num_done:
        logger.info("going on: %d of %d photos are done", num_done, num_all)
    earlier = earlier_files(todo, plan.layout, found.success)
    with cluster.connected():
        if config.gpus != "auto":
            cluster.wait_for("GPU", config.gpus, limit_s=60 * config.wait_minutes)
        on_cpus = config.detector == "batch-face" or config.reading.aligned is not None
        gpus = 0 if on_cpus else cluster.chosen_gpus(config.gpus)
        share = Share.of_gpus(gpus, most_a_gpu=WORKERS_A_GPU)
        if config.reading.aligned is not None:
            share = replace(share, num_parts=COPIED_PARTS)
        return run_parts(
            [part_item(plan, part, files) for part, files in zip(todo, earlier, strict=True)],
            PartWorker,
            (config, source, faces_fingerprint, share.num_cpus, bool(gpus)),
            share=share,
            look=partial(check_ours, config.faces_url, begun),
            unit="photo",
            num_done=num_done,
            num_all=num_all,
        )
