"""A Ray cluster for one job on this machine: on the loopback, with its own token and its own folder."""

import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lib import ray_watch
from lib.errors import JobError, UserError
from lib.ray_internals import lean_start, read_token_settings
from lib.scratch import scratch_folder
from lib.terminal import terminal

logger = logging.getLogger(__name__)

FOLDER_PREFIX = "cf-ray-"
LONGEST_SOCKET_NAME = len("/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store")
LONGEST_SOCKET_PATH = 107
"""Limit of Linux in bytes, without the final zero."""
_RAY_PREFIX = re.compile(r"\[.*?\] \(\w+\) \S+: ")
"""Time, process and place of the code, before what a daemon logs."""
_OWN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@contextmanager
def started(python: Mapping[str, str]) -> Iterator[None]:
    """Run a cluster for the duration. `python` is the part of a runtime environment that names the interpreter.

    Raises:
        UserError: its folder cannot be made. JobError: Ray does not start.
    """
    import ray

    with private_folder() as folder:
        before = {name: os.environ.get(name) for name in _OWN_VARIABLES}
        _give_token()
        os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")
        terminal().leave_word("failed: a process of Ray died while it started: killed, or out of memory; run it again")
        try:
            with ray_watch.watched_start(daemons, lambda: _explained(folder)), lean_start():
                # A folder inside ours, because Ray opens its own folder to everybody.
                ray.init(address="local", include_dashboard=False, _temp_dir=f"{folder}/r", runtime_env=dict(python))
        except Exception as error:
            ray.shutdown()
            raise JobError(_explained(folder, " ".join(str(error).split())[:300] or type(error).__name__)) from error
        finally:
            terminal().leave_word("")
        try:
            yield
        finally:
            ray.shutdown()
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _explained(folder: Path, otherwise: str = "") -> str:
    """Return why Ray does not start and what to do: what a daemon said at its death, or `otherwise`; "" for neither."""
    reason = _last_words(folder / "r") or otherwise
    return reason and (
        f"Ray does not start on this machine: {reason}: free space in {folder.parent} and /dev/shm, or set RAY_TMPDIR "
        "to a folder on another disk, and run the same command again; --verbose shows what Ray says"
    )


def _last_words(folder: Path) -> str:
    """Return what a daemon of Ray said when it died at the start; Ray itself reports only that it waited in vain."""
    for daemon in ("gcs_server", "raylet"):
        with suppress(OSError):
            for line in (folder / "session_latest" / "logs" / f"{daemon}.err").read_text(errors="replace").splitlines():
                return f"its {daemon} died: {_RAY_PREFIX.sub('', line)[:300]}"
    return ""


def daemons(*, alive: bool = True) -> dict[str, int]:
    """Return the process ids of the daemons that our own cluster cannot lose, by name: those alive, or those dead."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # the process has ended meanwhile
            pid_and_name, _, rest = status.read_text().rpartition(")")
            pid, _, name = pid_and_name.partition(" (")
            state, parent = rest.split()[:2]
            if name in ("gcs_server", "raylet") and int(parent) == os.getpid() and (state != "Z") == alive:
                found[name] = int(pid)
    return found


def _give_token() -> None:
    """Give this process and its children a token. Ray itself would write one to the home folder, readable by all."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return  # switched off by the user
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    read_token_settings()


@contextmanager
def private_folder() -> Iterator[Path]:
    """Make a folder that only this user can enter, with a path short enough for sockets; remove it at the end."""
    parent = _parent()
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch_folder(parent, FOLDER_PREFIX))
        except OSError as error:
            raise UserError(
                f"Ray's files cannot lie in {parent} ({error.strerror}): set TMPDIR, or RAY_TMPDIR for Ray alone, to a "
                f"folder that can be written, with a path of up to {_longest_parent()} bytes"
            ) from error
        yield folder


def _longest_parent() -> int:
    """Return how many bytes the path of the folder's parent may have."""
    return LONGEST_SOCKET_PATH - LONGEST_SOCKET_NAME - len(f"/{FOLDER_PREFIX}12345678/r")


def _parent() -> Path:
    """Return the folder for temporary files, or /tmp if the paths of sockets in it would be too long.

    Raises:
        UserError: `$RAY_TMPDIR`, which the user has set for Ray, is too long or no absolute path.
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
