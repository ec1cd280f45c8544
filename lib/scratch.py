"""Folders on this node's own disk: for temporary files of a job, and for what the next job uses again."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SURELY_LOCKED_S = 60.0


def node_scratch() -> Path:
    """Return the folder of this node for what outlives a job.

    That is $NODE_SCRATCH, and without it the temporary folder. In a Slurm job that is /tmp, because TMPDIR goes with
    the job, and a job that is queued again would find nothing.
    """
    if named := os.environ.get("NODE_SCRATCH"):
        return Path(named)
    return Path("/tmp") if "SLURM_JOB_ID" in os.environ else Path(tempfile.gettempdir())  # noqa: S108 - see above


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Make a folder, and remove it at the end. What killed jobs of this user have left beside it goes too.

    Raises:
        OSError: it cannot be made.
    """
    _remove_leftovers(parent, prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # held until this process ends, even by SIGKILL
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_leftovers(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{prefix}*"):
        try:
            status = folder.lstat()
            if status.st_uid != os.geteuid() or time.time() - status.st_mtime < SURELY_LOCKED_S:
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # its job is still alive
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
