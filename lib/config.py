"""How every job starts and ends: flags become a dataclass, the result one line of JSON, errors exit statuses."""

import atexit
import contextlib
import gc
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar, cast

from lib.errors import JobError, JobStopped, StopSignal, UserError
from lib.flags import parsed
from lib.redaction import StreamWithoutSecrets, redacted

Config = TypeVar("Config")

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: a launcher that sees it queues the same command again."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
RAISE_EVERY_S = 1.0

_STOPPED = ("stopped: asked by a signal; what is done stays, and the same command goes on from here", EXIT_STOPPED)
_INTERRUPTED = ("interrupted: the same command goes on from here", EXIT_FAILURE)
_signals_that_came: list[int] = []


def default_data_url() -> str:
    """Return `$DATA_URL`, or `./data` where it is not set."""
    return os.environ.get("DATA_URL") or "./data"


def in_submitted_job() -> bool:
    """Return whether this process runs in the temporary working directory of a `ray job submit`."""
    return "_ray_pkg_" in str(Path.cwd())


def absolute_url(url: str, flag: str) -> str:
    """Return `url` as an absolute local path, or unchanged when it names a storage scheme.

    Raises:
        UserError: a relative path inside a submitted Ray job, whose working directory vanishes with the job; a name
            that is not UTF-8, which no table and no message between machines can hold.
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
) -> NoReturn:
    """Parse the flags, run the job, print its result as one line of JSON and exit.

    `defaults` may look at the flags and return the configuration whose values hold where no flag says otherwise.

    Exit status 0 when done, 2 for the user's mistake (one line, no traceback), 1 for a failure, 75 when it was stopped
    from outside and has saved everything.
    """
    atexit.register(gc.freeze)  # else Python looks through all modules for garbage before it ends: 1.5 s with torch
    # For as long as the process lives: threads and libraries print until its end.
    given = [*sys.argv[1:], os.environ.get("DATA_URL", "")]
    sys.stdout, sys.stderr = (cast(TextIO, StreamWithoutSecrets(each, given)) for each in (sys.stdout, sys.stderr))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    _signals_that_came.clear()
    raise_on_stop_signals()
    try:
        for flag in sys.argv[1:]:
            _check_utf8(flag, "an argument")
        if {"-h", "--help"} & set(sys.argv[1:]):
            # The help is wrapped at the terminal's width, which would cut a secret in two that no one then recognises.
            os.environ["DATA_URL"] = redacted(os.environ.get("DATA_URL", ""))
        config = parsed(config_type, sys.argv[1:], description=description, defaults=defaults)
        # The result alone goes to standard output; Ray would print there what its nodes say.
        with contextlib.redirect_stdout(sys.stderr):
            result = job(config)
    except UserError as error:
        print("error:", *str(error).splitlines(), file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except JobError as error:
        print("failed:", *str(error).splitlines(), file=sys.stderr)
        sys.exit(EXIT_FAILURE)
    except JobStopped as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except (StopSignal, KeyboardInterrupt) as signalled:
        signal_noticed()
        line, status = _STOPPED if isinstance(signalled, StopSignal) else _INTERRUPTED
        print(line, file=sys.stderr)
        sys.exit(status)
    except Exception:  # noqa: BLE001 - the last resort: a traceback and exit status 1
        traceback.print_exc()
        sys.exit(EXIT_FAILURE)
    print(json.dumps(result), flush=True)
    sys.exit(0)


def _check_utf8(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} is not UTF-8: {os.fsencode(text)!r}: rename the file or folder") from None


def raise_on_stop_signals() -> None:
    """Raise `StopSignal` at SIGTERM and SIGUSR1, as Slurm, Kubernetes and `ray job stop` send before they end a job.

    SIGINT raises KeyboardInterrupt, as ever. Either comes again every second until `signal_noticed` is called, for
    where Python calls a destructor or a callback of a library an exception is lost.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (*STOP_SIGNALS, signal.SIGINT):
            signal.signal(number, _raise_stop)


def signal_noticed() -> None:
    """Raise no more for the signal that came."""
    if threading.current_thread() is threading.main_thread():
        signal.setitimer(signal.ITIMER_REAL, 0)


def end_of_a_signal() -> tuple[str, int] | None:
    """Return the last line and the exit status of a process that was sent a signal to stop, or None where none came."""
    if not _signals_that_came:
        return None
    return _INTERRUPTED if _signals_that_came[-1] == signal.SIGINT else _STOPPED


def note_signal(number: int) -> None:
    """Keep in mind that this signal came: whatever ends the process now, it was stopped."""
    _signals_that_came.append(number)


def _raise_stop(number: int, _: object) -> NoReturn:
    note_signal(number)
    signal.signal(signal.SIGALRM, lambda *_: _raise_stop(number, None))
    signal.setitimer(signal.ITIMER_REAL, RAISE_EVERY_S)
    raise KeyboardInterrupt if number == signal.SIGINT else StopSignal
