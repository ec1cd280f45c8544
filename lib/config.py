"""How every job starts and ends: flags become a dataclass, the result one line of JSON, errors exit statuses."""

import contextlib
import difflib
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar, cast

import tyro
from tyro import _errors as refusals

from lib.errors import JobError, JobStopped, StopSignal, UserError
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
    # For as long as the process lives: threads and libraries print until its end.
    given = [*sys.argv[1:], os.environ.get("DATA_URL", "")]
    sys.stdout, sys.stderr = (cast(TextIO, StreamWithoutSecrets(each, given)) for each in (sys.stdout, sys.stderr))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    _signals_that_came.clear()
    heed_stop_signals()
    try:
        for flag in sys.argv[1:]:
            _check_utf8(flag, "an argument")
        if {"-h", "--help"} & set(sys.argv[1:]):
            # The help is wrapped at the terminal's width, which would cut a secret in two that no one then recognises.
            os.environ["DATA_URL"] = redacted(os.environ.get("DATA_URL", ""))
        with _one_line_refusals(config_type):
            if defaults is None:
                config = tyro.cli(config_type, description=description)
            else:
                config = tyro.cli(config_type, description=description, default=defaults(sys.argv[1:]))
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


@contextlib.contextmanager
def _one_line_refusals(config_type: type) -> Iterator[None]:
    """Raise UserError, which becomes one line, in the place of each box that tyro would draw."""
    flags = [f"--{name.replace('_', '-')}" for name in getattr(config_type, "__dataclass_fields__", ())]

    def refuse(event: refusals.ParseErrorEvent) -> None:
        raise UserError(f"{_refusal(event, flags)}: run {event.prog} --help for the flags and their values")

    with refusals.on_parse_error(refuse):
        yield


def _refusal(event: refusals.ParseErrorEvent, flags: Sequence[str]) -> str:
    if isinstance(event, refusals.UnrecognizedArgs):
        token = event.tokens[0]
        meant = difflib.get_close_matches(token.partition("=")[0], flags, 1, 0.75) if token.startswith("--") else ()
        return f"{token!r} is not understood" + "".join(f", is {flag} meant?" for flag in meant)
    if isinstance(event, refusals.InvalidChoice):
        return f"{event.argument.display_name()} is {event.value!r}: allowed is {', '.join(event.choices)}"
    if isinstance(event, refusals.BadValue):
        return f"{event.argument.display_name()} has no value"
    if isinstance(event, refusals.MissingArgs):
        return f"{event.missing_arguments[0].arg.display_name()} is missing"
    if isinstance(event, refusals.InstantiationFailure):
        argument = event.argument
        name = f"{argument.display_name()} takes {argument.lowered.metavar}: " if argument else ""
        return name + " ".join(str(event.message).split())
    return type(event).__name__


def _check_utf8(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} is not UTF-8: {os.fsencode(text)!r}: rename the file or folder") from None


def heed_stop_signals() -> None:
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


def _raise_stop(number: int, _: object) -> NoReturn:
    _signals_that_came.append(number)
    signal.signal(signal.SIGALRM, lambda *_: _raise_stop(number, None))
    signal.setitimer(signal.ITIMER_REAL, RAISE_EVERY_S)
    raise KeyboardInterrupt if number == signal.SIGINT else StopSignal
