"""Joins a running Ray cluster, with one clear error for each way to fail."""

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.errors import JobError, UserError
from lib.ray_internals import check_token, read_token_settings

ANSWER_LIMIT_S = 10.0

_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"  # with no settings (RFC 9113, 3.4)
_HTTP2_SETTINGS = 4
_ADVICE = "name the port of the head such as host:6379, or unset it to run on this machine alone"


def join(address: str, runtime_env: Mapping[str, Any]) -> None:
    """Connect to the cluster at `$RAY_ADDRESS`.

    Raises:
        UserError: no cluster answers, or it wants another token or version. JobError: it answers, but joining fails.
    """
    import ray
    from ray.exceptions import AuthenticationError

    check_head_listens(address)
    _send_a_token_that_is_there()
    try:
        is_head = not address.startswith("ray://") and host_and_port(address)
        check_token(address if is_head else None)
        ray.init(address=address, runtime_env=dict(runtime_env))
    except AuthenticationError as error:
        ray.shutdown()
        raise UserError(
            f"RAY_ADDRESS is {address!r}, and this cluster wants another token: set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN to what `ray get-auth-token` prints on its head"
        ) from error
    except Exception as error:
        ray.shutdown()
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        if "Version mismatch" in reason:
            raise UserError(
                f"RAY_ADDRESS is {address!r}, a cluster of other versions: use the same Ray and Python here and "
                f"there ({reason})"
            ) from error
        if isinstance(error, ConnectionError | ValueError):
            raise UserError(f"RAY_ADDRESS is {address!r}, and Ray cannot use that ({reason}): {_ADVICE}") from error
        raise JobError(f"the Ray cluster at {address} does not let this job in: {reason}") from error


def check_head_listens(address: str) -> None:
    """Raise UserError if no head of a Ray cluster listens at the address. Ray itself would try for minutes."""
    place = host_and_port(address)
    if place is None:
        return
    try:
        with socket.create_connection(place, timeout=ANSWER_LIMIT_S) as connection:
            if address.startswith("ray://"):
                return
            connection.sendall(_HTTP2_HELLO)
            frame = connection.recv(9)
    except socket.gaierror as error:
        raise UserError(f"RAY_ADDRESS is {address!r}, and no host {place[0]!r} is known here: {_ADVICE}") from error
    except UnicodeError as error:
        raise UserError(f"RAY_ADDRESS is {address!r}, which is no name of a host: {_ADVICE}") from error
    except TimeoutError as error:
        raise UserError(
            f"RAY_ADDRESS is {address!r}, and nothing answers there in {ANSWER_LIMIT_S:g} s: {_ADVICE}"
        ) from error
    except ConnectionResetError:
        frame = b""
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS is {address!r}, but no Ray cluster answers there ({error.strerror or error}): start one with "
            f"`ray start --head`, {_ADVICE}"
        ) from error
    if frame[3:4] != bytes([_HTTP2_SETTINGS]):
        raise UserError(
            f"RAY_ADDRESS is {address!r}, and another server than a Ray head listens there (8265 is Ray's dashboard): "
            f"{_ADVICE}"
        )


def host_and_port(address: str) -> tuple[str, int] | None:
    """Return host and port of an address, or None for `auto`, which Ray looks up itself.

    Raises:
        UserError: it is no address.
    """
    if address in ("auto", "local"):
        return None
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"RAY_ADDRESS is {address!r}, which is no HOST:PORT: {_ADVICE}")
    return host.strip("[]"), int(port)


def _send_a_token_that_is_there() -> None:
    """Send the token of this machine's `ray start`. Ray itself does so only for the address `auto`."""
    if os.environ.get("RAY_AUTH_MODE"):
        return
    home = os.environ.get("HOME")
    given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if given or (home and (Path(home) / ".ray" / "auth_token").is_file()):
        os.environ["RAY_AUTH_MODE"] = "token"
        read_token_settings()
