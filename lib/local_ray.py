"""A Ray cluster of one job on this machine alone: on the loopback, with a token and a folder of its own."""

import fcntl
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lib.errors import JobError, UserError
from lib.ray_internals import lean_start, read_token_settings

logger = logging.getLogger(__name__)

FOLDER_PREFIX = "cf-ray-"
LONGEST_SOCKET_NAME = len("/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store")
LONGEST_SOCKET_PATH = 107
"""Of Linux, in bytes, without the zero that ends it."""
SURELY_LOCKED_S = 60.0
_OWN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@contextmanager
def started(python: Mapping[str, str]) -> Iterator[None]:
    """Run a cluster for the duration. `python` is the part of a runtime environment that names the interpreter.

    Raises:
        UserError: no folder can be made for it; JobError: Ray does not start.
    """
    import ray

    with private_folder() as folder:
        before = {name: os.environ.get(name) for name in _OWN_VARIABLES}
        _give_token()
        os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")
        try:
            with lean_start():
                # One below ours: Ray opens its own to everybody.
                ray.init(address="local", include_dashboard=False, _temp_dir=f"{folder}/r", runtime_env=dict(python))
        except Exception as error:
            ray.shutdown()
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise JobError(
                f"Ray does not start on this machine: {reason} (it needs room in {folder.parent} and /dev/shm; "
                "RAY_TMPDIR names another folder)"
            ) from error
        try:
            yield
        finally:
            ray.shutdown()
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def daemons() -> dict[str, int]:
    """Return the process ids of those processes of our own cluster without which it is lost, by name."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            pid_and_name, _, rest = status.read_text().rpartition(")")
            pid, _, name = pid_and_name.partition(" (")
            if name in ("gcs_server", "raylet") and int(rest.split()[1]) == os.getpid():
                found[name] = int(pid)
    return found


def _give_token() -> None:
    """Let this process and its children know a token, which Ray would else write to the user's home for all to read."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return  # switched off by the user
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    read_token_settings()


@contextmanager
def private_folder() -> Iterator[Path]:
    """Make a folder that only this user can enter, with a path short enough for sockets, and remove it at the end."""
    parent = _parent()
    _remove_leftovers(parent)
    try:
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=parent))
    except OSError as error:
        raise UserError(
            f"Ray's files cannot lie in {parent} ({error.strerror}): set TMPDIR, or RAY_TMPDIR for Ray alone, to a "
            f"folder that can be written, with a path of up to {_longest_parent()} bytes"
        ) from error
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # until this process ends, however it ends
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _longest_parent() -> int:
    """Return how many bytes the path of the folder's parent may have."""
    return LONGEST_SOCKET_PATH - LONGEST_SOCKET_NAME - len(f"/{FOLDER_PREFIX}12345678/r")


def _parent() -> Path:
    """Return the folder for temporary files, or /tmp where sockets in it would have too long a name.

    Raises:
        UserError: `$RAY_TMPDIR`, which nobody has set but for Ray, is too long or no absolute path.
    """
    wanted = os.environ.get("RAY_TMPDIR")
    longest = _longest_parent()
    if wanted:
        if not os.path.isabs(wanted) or len(os.fsencode(wanted)) > longest:  # noqa: PTH117
            raise UserError(
                f"RAY_TMPDIR is {wanted!r}: allowed is an absolute path of up to {longest} bytes, as sockets need"
            )
        return Path(wanted)
    usual = Path(os.environ.get("TMPDIR") or "/tmp").absolute()  # noqa: S108
    if len(os.fsencode(usual)) <= longest:
        return usual
    logger.info("TMPDIR is too long for the names of Ray's sockets: its files lie in /tmp, or where RAY_TMPDIR says")
    return Path("/tmp")  # noqa: S108


def _remove_leftovers(parent: Path) -> None:
    """Remove what runs of this user have left that were killed."""
    for folder in parent.glob(f"{FOLDER_PREFIX}*"):
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
            continue  # its run goes on
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
