"""A Ray cluster of one job on this machine alone: on the loopback, with a token and a folder of its own."""

import fcntl
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib.errors import JobError, UserError

logger = logging.getLogger(__name__)

FOLDER_PREFIX = "cf-ray-"
LONGEST_SOCKET_NAME = len("/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store")
LONGEST_SOCKET_PATH = 107
"""Of Linux, in bytes, without the zero that ends it."""
SURELY_LOCKED_S = 60.0
NODE_LIMIT_S, LOOK_EVERY_S = 30.0, 0.02
_OWN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@contextmanager
def started(python: Mapping[str, str]) -> Iterator[None]:
    """Run a cluster for the duration. `python` is the part of a runtime environment that names the interpreter.

    Raises:
        UserError: no folder can be made for it; JobError: Ray does not start.
    """
    import ray
    from ray._private import ray_constants

    with private_folder() as folder:
        before = {name: os.environ.get(name) for name in _OWN_VARIABLES}
        _give_token()
        os.environ.update(GLOO_SOCKET_IFNAME="lo", NCCL_SOCKET_IFNAME="lo")
        # Off, Ray listens on the loopback alone, as it does where it knows no clusters of several machines. Its daemons
        # read the variable; Ray here may have been imported already.
        os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
        clusters, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
        try:
            with _lean_start():
                # One below ours: Ray opens its own to everybody.
                ray.init(address="local", include_dashboard=False, _temp_dir=f"{folder}/r", runtime_env=dict(python))
        except Exception as error:
            ray.shutdown()
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise JobError(
                f"Ray does not start on this machine: {reason} (it needs room in {folder.parent} and /dev/shm; "
                "RAY_TMPDIR names another folder)"
            ) from error
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = clusters
            del os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR]
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
    """Return the process ids of those parts of the cluster without which it is lost, by name."""
    from ray._private import worker

    node = worker._global_node
    processes = {} if node is None else node.all_processes
    return {name: processes[name][0].process.pid for name in ("gcs_server", "raylet") if name in processes}


@contextmanager
def _lean_start() -> Iterator[None]:
    """Leave out what Ray starts in vain on one machine, and see at once that the rest has started."""
    from ray._private import services, utils
    from ray._private.node import Node

    replacements: list[tuple[Any, str, Callable[..., Any]]] = [
        # Ray starts its dashboard even where none is wanted, to ask the metadata hosts of clouds where it runs.
        (Node, "start_api_server", _start_nothing),
        # The autoscaler: this cluster never grows.
        (Node, "start_monitor", _start_nothing),
        # Ray's raylet waits for its agent, which without the dashboard's packages takes half the time to start.
        (utils, "get_dashboard_dependency_error", ImportError),
        (services, "get_node", _node_as_soon_as_it_is_there),
    ]
    before = [getattr(owner, name) for owner, name, _ in replacements]
    try:
        for owner, name, replacement in replacements:
            setattr(owner, name, replacement)
        yield
    finally:
        for (owner, name, _), original in zip(replacements, before, strict=True):
            setattr(owner, name, original)


def _start_nothing(*_: object, **__: object) -> None:
    """Stand in for the start of one of Ray's processes."""


def _node_as_soon_as_it_is_there(gcs_address: str, node_id: str) -> Any:
    """Return what Ray's `get_node` does, which looks once a second."""
    from ray._private.services import _get_gcs_client_options
    from ray._private.state import GlobalState

    state = GlobalState()
    state._initialize_global_state(_get_gcs_client_options(gcs_address))
    give_up = time.monotonic() + NODE_LIMIT_S
    while all(node["NodeID"] != node_id for node in state.node_table()) and time.monotonic() < give_up:
        time.sleep(LOOK_EVERY_S)
    return state.get_node(node_id)


def _give_token() -> None:
    """Let this process and its children know a token, which Ray would else write to the user's home for all to read."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return  # switched off by the user
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    read_token_settings()


def read_token_settings() -> None:
    """Let Ray read the variables of its token again: it has read them when it was imported."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


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
