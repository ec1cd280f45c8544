"""Local files: written whole or not at all, and never a pipe or a device."""

import logging
import os
import re
import stat
import uuid
from contextlib import suppress
from pathlib import Path

from lib.errors import UserError
from lib.listing import local_files
from lib.redaction import shown
from lib.storage_errors import explained

logger = logging.getLogger(__name__)

TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{32}\.tmp")


def local_path(url: str) -> Path:
    """Return the absolute path of a local URL."""
    return Path(url.removeprefix("file://")).absolute()


def has_entries(folder: Path) -> bool:
    """Return whether a folder exists, can be read and is not empty."""
    try:
        with os.scandir(folder) as entries:
            return any(True for _ in entries)
    except OSError:
        return False


def refuse_special(url: str) -> None:
    """Raise UserError for a pipe or a device, since opening one may block for ever."""
    with explained(url, "read"):
        mode = local_path(url).stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(f"{shown(url)} is a pipe or a device: write its content into a file, and name that")


def write_whole(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file under a temporary name and rename it; parent folders are made. `mode` is before the umask."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic only on one disk. Hidden, so that listings skip it.
    temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_temporary_files(folder: Path) -> None:
    """Remove what killed processes of this user have left below a folder in `write_whole`."""
    for info in local_files(str(folder)):
        path = folder / info.path
        if TEMPORARY_NAME.fullmatch(path.name):
            with explained(str(path), "remove"), suppress(FileNotFoundError):
                if path.lstat().st_uid == os.geteuid():
                    logger.info("removing %s, left by a killed process", path)
                    path.unlink()
