"""The forget job: takes people and photos out of all outputs of jobs, and keeps them out.

It first writes a journal of the names, which only the user can read. Then it writes the keyed hashes that keep them
out, and changes tables, files and copies. It searches again until it finds nothing, so the same command continues
after a kill, and ends with the proof. Then it writes the receipt, and removes the journal last.
"""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from lib import parts, storage
from lib.config import absolute_url, default_data_url
from lib.errors import JobError, UserError
from lib.faces.photo_names import stored_name
from lib.faces.tombstones import Tombstones, make_key, read_tombstones, write_tombstones
from lib.forgetting import models, search, tables
from lib.forgetting.caches import caches_with, remove_cache
from lib.forgetting.leftovers import remove_leftovers
from lib.forgetting.receipt import Journal, open_journal
from lib.forgetting.targets import Targets, of_names
from lib.layout import Layout

logger = logging.getLogger(__name__)

ROUNDS = 3
"""Searches that may find something. If more do, another job keeps writing the names."""


@dataclass(frozen=True, kw_only=True)
class ForgetConfig:
    """Take people or photos out of everything that was made of them."""

    data: str = field(default_factory=default_data_url)
    """Folder or URL that holds everything, such as s3://bucket/folder. Default: $DATA_URL, else ./data."""
    identities: tuple[str, ...] = ()
    """People to forget, as the faces table names them, with all their photos."""
    photos: tuple[str, ...] = ()
    """Photos to forget, by their paths below the photo folder."""
    identities_from: str | None = None
    """File that names people to forget, one a line."""
    photos_from: str | None = None
    """File that names photos to forget, one a line."""
    also: tuple[str, ...] = ()
    """Tables, folders or lists outside of --data to take them out of, too."""
    cache_dir: str | None = None
    """Folder of copies on this node that trainings were given as --cache-dir. The usual one is always looked into."""
    names: bool = True
    """Write the names into the receipt. --no-names: their keyed hashes alone."""
    dry_run: bool = False
    """Say what would be changed, then stop."""


def forget(config: ForgetConfig) -> dict[str, Any]:
    """Take the people and photos out of everything below the data URL, and return what was done.

    Raises:
        UserError: nobody is named, or a name is found nowhere, or a file cannot be searched.
        JobError: the storage fails, or another job keeps writing the names.
    """
    started = time.monotonic()
    data_url = Layout(config.data).url
    given = _given(config)
    tombstones = read_tombstones(data_url)
    where = search.places(data_url, [absolute_url(url, "--also") for url in config.also])
    if config.dry_run:
        return _plan(config, where, given, tombstones)
    storage.check_writable(data_url)
    key = make_key(data_url)
    journal = open_journal(data_url, key, given)
    targets, is_there = _resolved(config, where, given, tombstones, journal)
    if not is_there and not journal.is_begun:
        remove_leftovers(where.listings, where.half_written)
        logger.info("they were forgotten before, and nothing of them is left")
        return {"job": "forget", "receipt": None, "rows": 0, "files_rewritten": 0, "files_removed": 0, "models": []}
    journal.begin(targets)
    write_tombstones(data_url, key, journal.op, targets.photos, targets.identities)
    for _ in range(ROUNDS):
        if not _take_out(config, where, targets, journal, tombstones):
            break
        where = search.places(data_url, [absolute_url(url, "--also") for url in config.also])
    else:
        raise JobError(
            "another job keeps writing the same people: wait until it has ended, then run the same command again"
        )
    left = search.texts_with(where, targets)
    for url in left:
        logger.warning("%s names them, and no job has made it: it is left as it is", storage.redacted(url))
    for url in where.exports:
        logger.warning("%s was exported, perhaps with them: remove it, and export again", storage.redacted(url))
    _mark_models(journal)
    receipt_url = journal.finish(targets, left, with_names=config.names)
    for line in _closing(data_url, journal):
        logger.info(line)
    return {
        "job": "forget",
        "receipt": receipt_url,
        **journal.counts(),
        "models": sorted(journal.content["models"]),
        "seconds": round(time.monotonic() - started, 1),
    }


def _given(config: ForgetConfig) -> Targets:
    identities, photos = (
        [*names, *(_lines(absolute_url(url, flag)) if url is not None else [])]
        for names, url, flag in (
            (config.identities, config.identities_from, "--identities-from"),
            (config.photos, config.photos_from, "--photos-from"),
        )
    )
    if not identities and not photos:
        raise UserError(
            "nobody is named: give --identities NAME, --photos NAME, or a file of names by --identities-from"
        )
    return of_names(map(stored_name, photos), map(stored_name, identities))


def _lines(url: str) -> list[str]:
    text = storage.read_bytes(url).decode("utf-8-sig", "surrogateescape")
    return [line.strip("\r") for line in text.split("\n") if line.strip()]


def _resolved(
    config: ForgetConfig, where: search.Places, given: Targets, tombstones: Tombstones | None, journal: Journal
) -> tuple[Targets, bool]:
    """Return all photos and people to forget, and whether anything names them.

    Raises:
        UserError: a name is found nowhere, and was not forgotten before.
    """
    known = journal.targets()
    targets, there = search.resolved(where, of_names(given.photos | known.photos, given.identities | known.identities))
    absent = of_names(
        given.photos - there.photos - known.photos, given.identities - there.identities - known.identities
    )
    if tombstones is not None:
        absent = of_names(
            (name for name in absent.photos if not tombstones.holds_photo(name)),
            (name for name in absent.identities if not tombstones.holds_identity(name)),
        )
    if (absent.photos or absent.identities) and not _found(config, where, absent, None):
        name = min(absent.identities or absent.photos)
        more = len(absent.photos) + len(absent.identities) - 1
        raise UserError(
            f"{name!r}{f' and {more} more are' if more else ' is'} nowhere below {storage.redacted(config.data)}: "
            "write names as the column photo or identity of the faces table has them; nothing was changed"
        )
    return targets, bool(there.photos or there.identities) or bool(_found(config, where, targets, tombstones))


def _found(config: ForgetConfig, where: search.Places, targets: Targets, tombstones: Tombstones | None) -> int:
    hits = search.tables_with(where, targets)
    caches = caches_with(targets, config.cache_dir, tombstones)
    return len(hits) + len(search.files_with(where, targets, hits)) + len(caches)


def _plan(config: ForgetConfig, where: search.Places, given: Targets, tombstones: Tombstones | None) -> dict[str, Any]:
    journal = Journal(Layout(config.data).url, "", {})
    targets, _ = _resolved(config, where, given, tombstones, journal)
    hits = search.tables_with(where, targets)
    files = search.files_with(where, targets, hits)
    caches = caches_with(targets, config.cache_dir, tombstones)
    for table in hits:
        logger.info("%d rows would go from %s", sum(table.rows.values()), storage.redacted(table.url))
    for file in files:
        what = "be removed" if file.kind.is_removed else f"lose {file.num} entries"
        logger.info("%s would %s", storage.redacted(file.url), what)
    for path in caches:
        logger.info("%s would be removed", path)
    return {
        "job": "forget",
        "dry_run": True,
        "identities": len(targets.identities),
        "photos": len(targets.photos),
        "rows": sum(sum(table.rows.values()) for table in hits),
        "files": len(files),
        "caches": len(caches),
    }


def _take_out(
    config: ForgetConfig, where: search.Places, targets: Targets, journal: Journal, tombstones: Tombstones | None
) -> int:
    """Take the targets out of all places once; return how many. The journal names a place before it changes."""
    hits = search.tables_with(where, targets)
    files = search.files_with(where, targets, hits)
    caches = caches_with(targets, config.cache_dir, tombstones)
    journal.note_versions(hits, [run_id for url in where.tables for run_id in _run_ids(url)], where.runs)
    for table in hits:
        logger.info("%s: %d rows in %d files", storage.redacted(table.url), sum(table.rows.values()), len(table.rows))
        rewritten = tables.take_out(table, where.targets_in(table.url, targets), journal.op)
        journal.note_table(table, rewritten)
        tables.swap(table.url, rewritten, sorted(table.rows), journal.op)
    journal.note_files(files, caches)
    remove_leftovers(where.listings, where.half_written)
    for file in files:
        if file.kind.is_removed:
            logger.info("%s is removed: %s makes it again", storage.redacted(file.url), file.kind.again)
            storage.remove(file.url)
        else:
            content, num = file.kind.without(storage.read_bytes(file.url), where.targets_in(file.url, targets))
            logger.info("%s: %d entries", storage.redacted(file.url), num)
            storage.write_bytes(file.url, content)
            journal.note_written(file.url, content)
    for path in caches:
        remove_cache(path)
    return len(hits) + len(files) + len(caches)


def _run_ids(table_url: str) -> list[str]:
    found = parts.found_at(table_url)
    versions = [*([found.success] if found.success else []), *parts.kept_successes(table_url)]
    return [str(version["run_id"]) for version in versions]


def _mark_models(journal: Journal) -> None:
    content = journal.content
    named = [url for url, entry in content["files"].items() if entry["kind"] == "rows"]
    found = models.models_with(content["run_folders"], content["versions"], content["kept_versions"], named)
    counts = {"identities": len(content["identities"]), "photos": len(content["photos"])}
    for url, why in sorted(found.items()):
        models.mark(url, why, journal.receipt_name, counts)
        journal.note_model(url, why, models.checkpoints_and_exports(url))
        logger.warning("%s: %s", storage.redacted(url), why)


def _closing(data_url: str, journal: Journal) -> list[str]:
    counts = journal.counts()
    photos_url = storage.redacted(storage.join(data_url, search.PHOTOS_FOLDER))
    return [
        f"{counts['rows']} rows of {counts['photos']} photos are gone, and a search finds none of them any more",
        "trainings on other nodes left copies there: run the same command on each of them",
        f"the photos themselves, such as those in {photos_url}, are yours and were not touched: remove them yourself",
    ]
