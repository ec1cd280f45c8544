"""Ray's private API that clusters need. `tests/test_ray_internals.py` fails when a new Ray has changed it.

The private API of Ray Train is in `lib/training/ray_train.py`.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NODE_LIMIT_S, LOOK_EVERY_S = 30.0, 0.02


@contextmanager
def lean_start() -> Iterator[None]:
    """Make `ray.init` listen on the loopback only, start no needless process, and notice at once that Ray is up.

    Ray has no settings for this: `include_dashboard=False` still starts the dashboard's process.
    """
    from ray._private import node, ray_constants, services, utils
    from ray._private.node import Node

    replacements: list[tuple[Any, str, Any]] = [
        # Ray listens on all networks unless clusters of several machines are disabled. Its daemons read the variable.
        (ray_constants, "ENABLE_RAY_CLUSTER", False),
        # Without a dashboard, Ray still starts its process, which asks the metadata hosts of clouds where it runs.
        (Node, "start_api_server", _start_nothing),
        # The autoscaler: this cluster never grows.
        (Node, "start_monitor", _start_nothing),
        # The raylet waits for its agent, which starts in half the time without the dashboard's packages.
        (utils, "get_dashboard_dependency_error", ImportError),
        (services, "get_node", _node_as_soon_as_it_is_there),
        (node, "wait_for_persisted_port", _port_without_the_lock),
    ]
    before = [getattr(owner, name) for owner, name, _ in replacements]
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    try:
        for owner, name, replacement in replacements:
            setattr(owner, name, replacement)
        yield
    finally:
        for (owner, name, _), original in zip(replacements, before, strict=True):
            setattr(owner, name, original)
        del os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR]


def _start_nothing(*_: object, **__: object) -> None:
    """Stand in for the start of one of Ray's processes."""


def _node_as_soon_as_it_is_there(gcs_address: str, node_id: str) -> Any:
    """Return the same as Ray's `get_node`, which looks only once a second."""
    from ray._private.services import _get_gcs_client_options
    from ray._private.state import GlobalState

    state = GlobalState()
    state._initialize_global_state(_get_gcs_client_options(gcs_address))
    give_up = time.monotonic() + NODE_LIMIT_S
    while all(node["NodeID"] != node_id for node in state.node_table()) and time.monotonic() < give_up:
        time.sleep(LOOK_EVERY_S)
    return state.get_node(node_id)


def _port_without_the_lock(folder: str, node_id: str, name: str, timeout_ms: int) -> int:
    """Return the port that a daemon has written into a file.

    Ray's own function holds Python's global lock while it waits. No thread could notice then that the daemon is dead.
    """
    from ray._raylet import wait_for_persisted_port  # type: ignore[attr-defined]

    give_up = time.monotonic() + timeout_ms / 1000
    while True:
        try:
            port: int = wait_for_persisted_port(folder, node_id, name, timeout_ms=0)
        except RuntimeError:  # it is not there yet
            if time.monotonic() > give_up:
                raise
            time.sleep(LOOK_EVERY_S)
        else:
            return port


def unreserved_by_node() -> dict[str, dict[str, float]]:
    """Return what is left of the resources of each live node of the connected cluster, by the node's id.

    Ray's public functions tell the sum over the nodes alone.
    """
    from ray._private.state import available_resources_per_node

    return dict(available_resources_per_node())


def read_token_settings() -> None:
    """Make Ray read the environment variables of its token again.

    Ray reads them when it is imported, which may be long before a job knows its cluster.
    """
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def check_token(address: str | None) -> None:
    """Ask the head at `address` once whether it accepts our token; without an address, only look for a token.

    With a wrong token `ray.init` would try for 20 s, and not give the token as the reason.

    Raises:
        AuthenticationError: there is no token, or the cluster wants another one.
    """
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    ensure_token_if_auth_enabled(create_token_if_missing=False)
    if address is not None:
        GcsClient(address=address)
