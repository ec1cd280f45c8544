"""How every job starts and ends: flags become a dataclass, the result one line of JSON, an error an exit status."""

import atexit
import contextlib
import gc
import json
import os
import signal
import string
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lib.errors import JobError, JobStopped, StopSignal, UserError
from lib.flags import parsed
from lib.redaction import redacted
from lib.terminal import EXIT_FAILURE, Terminal, take_over

Config = TypeVar("Config")

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: a launcher then queues the same command again."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
RAISE_EVERY_S = 1.0

VERBOSE = "--verbose"
_VERBOSE_HELP = f"Every job takes {VERBOSE}, too: it shows the lines of Ray and other libraries."

_STOPPED = ("stopped: asked by a signal; what is done stays, and the same command goes on from here", EXIT_STOPPED)
_INTERRUPTED = ("interrupted: the same command goes on from here", EXIT_FAILURE)
_signals_that_came: list[int] = []


def default_data_url() -> str:
    """Return `$DATA_URL`, or `./data` if it is not set."""
    return os.environ.get("DATA_URL") or "./data"


def in_submitted_job() -> bool:
    """Return whether this process runs in the temporary working directory of a `ray job submit`."""
    return "_ray_pkg_" in str(Path.cwd())


def absolute_url(url: str, flag: str) -> str:
    """Return `url` as an absolute local path, or unchanged when it names a storage scheme.

    Raises:
        UserError: a relative path inside a submitted Ray job, whose working directory vanishes with the job; or a name
            that is not UTF-8, which neither a table nor a message between machines can hold.
    """
    _check_utf8(url if "://" in url else os.path.abspath(url), flag)  # noqa: PTH100
    if "://" in url:
        return url
    path = os.path.expanduser(url)  # noqa: PTH111 - pathlib would not fold `..` away
    if not os.path.isabs(path) and in_submitted_job():  # noqa: PTH117
        raise UserError(
            f"{flag} is the relative path {url!r}, which would vanish with the job's temporary working directory: "
            "set DATA_URL (or the flag) to an absolute path or to a URL such as s3://bucket/folder"
        )
    return os.path.abspath(path)  # noqa: PTH100


def run_job(
    config_type: type[Config],
    job: Callable[[Config], Mapping[str, Any]],
    *,
    description: str,
    defaults: Callable[[Sequence[str]], Config] | None = None,
    look_at: str = "",
) -> NoReturn:
    """Parse the flags, run the job, print its result as one line of JSON and exit.

    `defaults` takes the flags and returns the configuration that they change. `look_at` is the file that the user opens
    next; braces name entries of the result: "{faces}/card.json".

    Exit status: 0 done, 2 the user's mistake (one line, no traceback), 1 a failure, 75 stopped from outside with
    everything saved.
    """
    atexit.register(gc.freeze)  # otherwise Python searches all modules for garbage before it ends: 1.5 s with torch
    given, name = [*sys.argv[1:], os.environ.get("DATA_URL", "")], Path(sys.argv[0]).stem
    ours = take_over(name if name.isidentifier() else "job", given, verbose=VERBOSE in given)
    _signals_that_came.clear()
    raise_on_stop_signals()
    try:
        config = _parsed(config_type, description, defaults, ours)
        # Only the result goes to standard output. Ray would print the lines of its nodes there.
        with contextlib.redirect_stdout(sys.stderr):
            result = job(config)
    except UserError as error:
        status = EXIT_USER_ERROR
        ours.say("error: " + " ".join(str(error).splitlines()))
    except JobError as error:
        status = EXIT_FAILURE
        ours.fail("failed: " + " ".join(str(error).splitlines()))
    except JobStopped as stop:
        status = EXIT_STOPPED
        ours.say(f"stopped: {stop}")
    except (StopSignal, KeyboardInterrupt) as signalled:
        signal_noticed()
        line, status = _STOPPED if isinstance(signalled, StopSignal) else _INTERRUPTED
        ours.say(line)
    except Exception:  # noqa: BLE001 - the last resort: a traceback and exit status 1
        status = EXIT_FAILURE
        ours.fail(traceback.format_exc().rstrip())
    else:
        status = 0
        if file := _next_file(look_at, result):
            ours.say(f"look at {file}")
        print(json.dumps(result), file=ours.result, flush=True)
    finally:
        ours.close()
    sys.exit(status)


def _parsed(
    config_type: type[Config], description: str, defaults: Callable[[Sequence[str]], Config] | None, ours: Terminal
) -> Config:
    """Return the configuration that the flags make, or print the help and exit."""
    for flag in sys.argv[1:]:
        _check_utf8(flag, "an argument")
    flags = [flag for flag in sys.argv[1:] if flag != VERBOSE]
    if {"-h", "--help"} & set(flags):
        # The help is wrapped at the terminal's width. A secret that is cut in two would not be recognised.
        os.environ["DATA_URL"] = redacted(os.environ.get("DATA_URL", ""))
    description = f"{description}\n\n{_VERBOSE_HELP}"
    with contextlib.redirect_stdout(ours.result):
        return parsed(config_type, flags, description=description, defaults=defaults)


def _next_file(look_at: str, result: Mapping[str, Any]) -> str:
    """Return the file to open next; an empty string after a dry run, or if the job made none."""
    names = [name for _, name, _, _ in string.Formatter().parse(look_at) if name]
    is_there = not result.get("dry_run") and all(result.get(name) for name in names)
    return look_at.format_map(result) if is_there else ""


def _check_utf8(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} is not UTF-8: {os.fsencode(text)!r}: rename the file or folder") from None


def raise_on_stop_signals() -> None:
    """Raise `StopSignal` at SIGTERM and SIGUSR1, as Slurm, Kubernetes and `ray job stop` send before they end a job.

    SIGINT raises KeyboardInterrupt, as usual. Both are raised again every second until `signal_noticed` is called,
    because an exception is lost if it is raised in a destructor or in a callback of a library.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (*STOP_SIGNALS, signal.SIGINT):
            signal.signal(number, _raise_stop)


def signal_noticed() -> None:
    """Stop raising for the signal that came."""
    if threading.current_thread() is threading.main_thread():
        signal.setitimer(signal.ITIMER_REAL, 0)


def end_of_a_signal() -> tuple[str, int] | None:
    """Return the last line and the exit status of a process that a signal stops; None if no signal came."""
    if not _signals_that_came:
        return None
    return _INTERRUPTED if _signals_that_came[-1] == signal.SIGINT else _STOPPED


def note_signal(number: int) -> None:
    """Record that this signal came: whatever ends the process now, it counts as stopped."""
    _signals_that_came.append(number)


def _raise_stop(number: int, _: object) -> NoReturn:
    note_signal(number)
    signal.signal(signal.SIGALRM, lambda *_: _raise_stop(number, None))
    signal.setitimer(signal.ITIMER_REAL, RAISE_EVERY_S)
    raise KeyboardInterrupt if number == signal.SIGINT else StopSignal
