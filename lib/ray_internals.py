"""What Ray keeps private and clusters need. `tests/test_ray_internals.py` tells when a new Ray has changed it.

What training needs of Ray Train's is in `lib/training/ray_train.py`.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NODE_LIMIT_S, LOOK_EVERY_S = 30.0, 0.02


@contextmanager
def lean_start() -> Iterator[None]:
    """Have `ray.init` listen on the loopback alone, start no process in vain, and see at once that the rest is there.

    Ray has settings for none of it: `include_dashboard=False` still starts the dashboard's process.
    """
    from ray._private import ray_constants, services, utils
    from ray._private.node import Node

    replacements: list[tuple[Any, str, Any]] = [
        # Ray listens on every network unless it knows no clusters of several machines. Its daemons read the variable.
        (ray_constants, "ENABLE_RAY_CLUSTER", False),
        # Ray starts its dashboard even where none is wanted, to ask the metadata hosts of clouds where it runs.
        (Node, "start_api_server", _start_nothing),
        # The autoscaler: this cluster never grows.
        (Node, "start_monitor", _start_nothing),
        # Ray's raylet waits for its agent, which without the dashboard's packages takes half the time to start.
        (utils, "get_dashboard_dependency_error", ImportError),
        (services, "get_node", _node_as_soon_as_it_is_there),
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
    """Return what Ray's `get_node` does, which looks once a second."""
    from ray._private.services import _get_gcs_client_options
    from ray._private.state import GlobalState

    state = GlobalState()
    state._initialize_global_state(_get_gcs_client_options(gcs_address))
    give_up = time.monotonic() + NODE_LIMIT_S
    while all(node["NodeID"] != node_id for node in state.node_table()) and time.monotonic() < give_up:
        time.sleep(LOOK_EVERY_S)
    return state.get_node(node_id)


def read_token_settings() -> None:
    """Let Ray read the variables of its token again.

    Ray reads them when it is imported, which may be long before a job knows its cluster, and has no public way to
    repeat that.
    """
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def check_token(address: str | None) -> None:
    """Ask the head at `address` once whether it accepts our token; without an address, only look for a token.

    `ray.init` would ask for 20 s with a wrong one, and then not say that the token was the reason.

    Raises:
        AuthenticationError: there is no token, or the cluster wants another one.
    """
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    ensure_token_if_auth_enabled(create_token_if_missing=False)
    if address is not None:
        GcsClient(address=address)
