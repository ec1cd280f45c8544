"""What killed jobs have left that may name somebody: kept listings, and half-written files. No later job needs them."""

import logging
import re
import time
from collections.abc import Sequence

from lib import storage
from lib.local_files import TEMPORARY_NAME, local_path
from lib.parts import MANIFEST_FOLDER

logger = logging.getLogger(__name__)

ABANDONED_AFTER_S = 60.0
"""A temporary file that nobody has written to for so long is a killed job's."""

_LISTING = re.compile(rf"(.*/)?{MANIFEST_FOLDER}/listing(?=/)")


def listing_in(path: str) -> str | None:
    """Return the folder of a kept listing that a file is in; None if it is in none."""
    match = _LISTING.match(path)
    return match and match[0]


def is_half_written(path: str) -> bool:
    """Return whether a file has a temporary name."""
    return TEMPORARY_NAME.fullmatch(path.rpartition("/")[2]) is not None


def remove_leftovers(listings: Sequence[str], half_written: Sequence[str]) -> None:
    """Remove kept listings, whomever they name, and temporary files of killed jobs.

    Raises:
        JobError: the storage fails.
    """
    for url in listings:
        logger.info("%s is removed: the next job lists the photos again", storage.redacted(url))
        storage.remove_tree(url)
    for url in half_written:
        if storage.is_local(url) and _age_s(url) > ABANDONED_AFTER_S:
            logger.info("removing %s, left by a killed process", url)
            storage.remove(url)


def _age_s(url: str) -> float:
    try:
        return time.time() - local_path(url).stat().st_mtime
    except FileNotFoundError:  # its job has finished it
        return 0.0
