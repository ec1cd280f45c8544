"""Ends a job whose Ray has died, at once and with one line. Ray itself tries for a minute and dumps its stacks."""

import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from lib.config import end_of_a_signal
from lib.errors import JobError, StopSignal, UserError
from lib.remote_ray import host_and_port
from lib.terminal import EXIT_FAILURE, terminal

CHECK_EVERY_S = 2.0
ABSENT_LIMIT_S = 10.0
"""How long a head may be silent. A slow one, or one that was restarted with its state, answers again."""
SIGNAL_GRACE_S = 1.5
"""A signal to the whole process group ends Ray's daemons before this process handles it."""
REPORT_LIMIT_S = 1.0
"""How long Ray's start may take to report that a daemon is dead."""
LEAVE_LIMIT_S = 45.0
SIGNALLED_LEAVE_LIMIT_S = 5.0

_GUARD = """
while [ "$(cut -d ' ' -f 3 "/proc/$1/stat" 2> /dev/null || echo Z)" != Z ]; do sleep 0.3; done
kill -9 "$2" 2> /dev/null
"""
"""Ends the raylet when the head service dies.

A driver that is just starting waits for the raylet, and none of its threads runs meanwhile. The raylet itself would
wait for the head for a minute.
"""

_GOES_ON = "what is done stays, and the same command goes on from here"
_NAMES = {"gcs_server": "Ray's head service (gcs_server)", "raylet": "Ray's raylet on this machine"}


@contextmanager
def watched(daemons: Mapping[str, int], address: str | None = None) -> Iterator[None]:
    """End this process with one line if a daemon dies during the block, or the head no longer answers.

    Ray's threads in this process cannot be stopped then. `daemons` maps names to process ids.
    """
    leaving = threading.Event()
    place = host_and_port(address) if address else None
    thread = threading.Thread(target=_watch, args=(dict(daemons), place, leaving), daemon=True, name="ray-watch")
    thread.start()
    try:
        yield
    finally:
        leaving.set()
        thread.join()


@contextmanager
def watched_start(daemons: Callable[..., Mapping[str, int]], explained: Callable[[], str]) -> Iterator[None]:
    """End this process with one line if a daemon dies while Ray starts, which would hang for a minute and abort.

    `daemons` maps the names of daemons to process ids, of those that are `alive` or of those that are not. If a daemon
    dies of an error of its own, `explained` returns the line for the user. If it is killed, that is empty.
    """
    started = threading.Event()
    guards: list[subprocess.Popen[bytes]] = []

    def watch() -> None:
        seen: dict[str, int] = {}
        while not started.wait(0.1):
            now = daemons(alive=True)
            # Ray asks for the status of some of them only, so the others stay as zombies.
            dead = [*daemons(alive=False), *(name for name, pid in seen.items() if now.get(name) != pid)]
            seen.update(now)
            if not guards and now.keys() >= _NAMES.keys():
                guards.append(subprocess.Popen(["/bin/sh", "-c", _GUARD, "sh", *(str(now[name]) for name in _NAMES)]))
            if dead and not started.wait(REPORT_LIMIT_S):
                _end(explained() or f"{_NAMES[dead[0]]} has died: killed, or out of memory; {_GOES_ON}")

    thread = threading.Thread(target=watch, daemon=True, name="ray-start-watch")
    thread.start()
    try:
        yield
    finally:
        started.set()
        thread.join()
        for guard in guards:
            guard.kill()
            guard.wait()


@contextmanager
def limited_leave() -> Iterator[None]:
    """End this process with one line if the block, which shuts Ray down, takes too long or is interrupted by a signal.

    Ray's exit handlers would repeat what the signal interrupted, and wait for daemons that died of the same signal.
    """
    done = threading.Event()
    error = sys.exception()
    reason = f"{error}; then Ray did not let go" if isinstance(error, UserError | JobError) else "Ray does not let go"

    def wait() -> None:
        started = time.monotonic()
        while not done.wait(0.2):
            limit_s = SIGNALLED_LEAVE_LIMIT_S if end_of_a_signal() else LEAVE_LIMIT_S
            if time.monotonic() - started > limit_s:
                _end(f"{reason}; {_GOES_ON}")

    threading.Thread(target=wait, daemon=True, name="ray-leave").start()
    try:
        yield
    except (StopSignal, KeyboardInterrupt):
        _end(f"{reason}; {_GOES_ON}")
    finally:
        done.set()


def raylet_of_this_driver() -> dict[str, int]:
    """Return the process id of the raylet that this process is connected to, if it runs on this machine."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    path = next((node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == own), "")
    if not path or not Path(path).exists():
        return {}
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(CHECK_EVERY_S)
        try:
            probe.connect(path)
        except OSError:
            return {}
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid: int = struct.unpack("3i", credentials)[0]
    return {"raylet": pid} if pid > 0 else {}


def _watch(daemons: dict[str, int], place: tuple[str, int] | None, leaving: threading.Event) -> None:
    dead = select.poll()
    names = {}
    for name, pid in daemons.items():
        with suppress(OSError):  # such as a process in another namespace
            descriptor = os.pidfd_open(pid)
            names[descriptor] = name
            dead.register(descriptor, select.POLLIN)
    seen = time.monotonic()
    next_check = seen + CHECK_EVERY_S
    try:
        while True:
            # Checked before `leaving`: a dead daemon also raises an error in the main thread, which then leaves Ray.
            for descriptor, _ in dead.poll(200):
                _end(f"{_NAMES[names[descriptor]]} has died: killed, or out of memory; {_GOES_ON}")
            if leaving.is_set():
                return
            if place is not None and time.monotonic() >= next_check:
                if _answers(place):
                    seen = time.monotonic()
                elif time.monotonic() - seen > ABSENT_LIMIT_S and not leaving.is_set():
                    _end(f"the Ray cluster at {place[0]}:{place[1]} no longer answers; {_GOES_ON}")
                next_check = time.monotonic() + CHECK_EVERY_S
    finally:
        for descriptor in names:
            os.close(descriptor)


def _answers(place: tuple[str, int]) -> bool:
    try:
        socket.create_connection(place, timeout=CHECK_EVERY_S).close()
    except OSError:
        return False
    return True


def _end(reason: str) -> NoReturn:
    """Print the reason in one line and end, without Ray's exit handlers. Ray's own daemons end with this process."""
    ours = terminal()
    ours.mute_others()
    failed = f"failed: {reason}"
    ours.leave_word(failed)  # Ray may end this process meanwhile
    deadline = time.monotonic() + SIGNAL_GRACE_S
    while end_of_a_signal() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    line, status = end_of_a_signal() or (failed, EXIT_FAILURE)
    ours.abandon(line, status)
