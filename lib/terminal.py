"""What a user sees: our lines on the terminal. The lines of Ray and other libraries go to a log file of the job.

Ray's core writes to file descriptor 2 directly. So descriptor 2 becomes the log, and we write to a copy of it.
"""

import contextlib
import faulthandler
import logging
import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TextIO, cast

from lib.redaction import StreamWithoutSecrets

SAY_AGAIN_S = 60.0
"""Several workers log the same line within this time: it is shown once."""
KEPT_DAYS = 7
"""A log is removed this long after its last line."""
TAIL_LINES = 20
TAIL_BYTES = 128 * 1024
EXIT_FAILURE = 1

MARK = "conv-facenet| "
"""Begins each line that one of our workers logs; Ray brings it to the driver. `lib/__init__.py` repeats it."""

_TAIL_TITLE = "the last lines of Ray and other libraries, all of them are in"
_CLEAR = "\r\x1b[K"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_FRAME = re.compile(r"(\(.*?\bpid=.*?\) )?(\s|Traceback \(most recent)")
"""A line of a stack trace. The log has it; a failure shows the other lines."""
_IF_KILLED = f"""
while read -r line; do
    [ "$line" = ended ] && exit 0
    will=$line
done
if [ -s "$1" ]; then
    echo "{_TAIL_TITLE} $1:"
    grep -v -e '^ ' -e '\\[0x' "$1" | tail -n {TAIL_LINES} | sed 's/^/    /; s#://[^ ]*[@?][^ ]*#://***#g'
fi
echo "${{will:-failed: the process was killed, or a library has crashed}}"
"""
"""Run by a shell that outlives the job. A pipe that closes without `ended` means that the job was killed."""


class Terminal(StreamWithoutSecrets):
    """Prints our lines. On a real terminal, a status line stays below them and is updated in place.

    Attributes:
        log: the file with the lines of Ray and other libraries; None if they are shown.
        result: where the result of the job goes.
    """

    def __init__(self, stream: TextIO, given: Sequence[str] = (), log: Path | None = None) -> None:
        """Write to `stream`, without secrets. Those of the URLs in `given` are recognised outside of a URL too."""
        super().__init__(stream, given)
        self.log = log
        self.result: TextIO = sys.stdout
        self.is_a_tty = stream.isatty()
        self._lock = threading.RLock()
        self._status = ""
        self._is_drawn = False
        self._watcher: int | None = None

    def write(self, text: str) -> int:
        """Write above the status line."""
        with self._lock:
            if self._is_drawn:
                self._stream.write(_CLEAR)
                self._is_drawn = False
            self._stream.write(self._safe(text))
            if text.endswith("\n"):
                self._draw()
            self._stream.flush()
        return len(text)

    def show(self, status: str) -> None:
        """Update the status line; an empty string removes it."""
        if not self.is_a_tty or (status == self._status and self._is_drawn):
            return
        with self._lock:
            if self._is_drawn:
                self._stream.write(_CLEAR)
            self._status = status
            self._draw()
            self._stream.flush()

    def say(self, line: str) -> None:
        """Write a line."""
        self.write(f"{line}\n")

    def fail(self, text: str) -> None:
        """Print the last lines of Ray and other libraries, then why the job failed."""
        self.tell_others()
        self.say(text)

    def tell_others(self) -> None:
        """Print the last lines of Ray and other libraries."""
        tail = self._tail()
        if tail:
            self.say("\n".join([f"{_TAIL_TITLE} {self.log}:", *(f"    {line}" for line in tail)]))

    def mute_others(self) -> None:
        """Keep libraries from writing here: Ray's threads dump their stacks until the process ends."""
        if self.log is None:
            with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
                if self._stream.fileno() == 2:
                    self._stream = _copy(self._stream)
                os.dup2(nowhere.fileno(), 2)

    def abandon(self, line: str, status: int) -> NoReturn:
        """End this process with one line, without the exit handlers of Ray and without waiting for its threads."""
        self.show("")
        (self.fail if status == EXIT_FAILURE else self.say)(line)
        self.close()
        os._exit(status)

    def leave_word(self, line: str) -> None:
        """Have the watching shell print this line if a library ends this process before it can print one itself."""
        if self._watcher is not None:
            os.write(self._watcher, f"{self._safe(line)}\n".encode())

    def close(self) -> None:
        """Remove the status line and tell the watching shell that the job has ended."""
        self.show("")
        with contextlib.suppress(BrokenPipeError):  # the reader, such as head, has closed the pipe
            self.result.flush()
        if self._watcher is not None:
            os.write(self._watcher, b"ended\n")
            os.close(self._watcher)
            self._watcher = None
        if self.log is not None and not self.log.stat().st_size:
            self.log.unlink()

    def watch(self) -> None:
        """Start the shell that reports a death which this process cannot report: SIGKILL, or an abort in Ray's core."""
        assert self.log is not None
        faulthandler.enable(self._stream, all_threads=False)
        read_end, write_end = os.pipe()
        with contextlib.suppress(OSError):
            subprocess.Popen(
                ["/bin/sh", "-c", _IF_KILLED, "sh", str(self.log)],
                stdin=read_end,
                stdout=self._stream,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a signal to the job's process group does not reach it
            )
        os.close(read_end)
        self._watcher = write_end

    def _tail(self) -> list[str]:
        if self.log is None:
            return []
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
            lines = _COLOUR.sub("", file.read().decode(errors="replace")).splitlines()
            return [line for line in lines if line and not _FRAME.match(line)][-TAIL_LINES:]
        return []

    def _draw(self) -> None:
        if self._status:
            columns = os.get_terminal_size(self._stream.fileno()).columns or 80
            self._stream.write(self._safe(self._status)[: columns - 1])
            self._is_drawn = True
        else:
            self._is_drawn = False


class _Others(StreamWithoutSecrets):
    """Where libraries write. A line that our workers have logged goes to our log, once."""

    def __init__(self, stream: TextIO, given: Sequence[str]) -> None:
        super().__init__(stream, given)
        self._thread = threading.local()
        self._shown_at: dict[str, float] = {}

    def write(self, text: str) -> int:
        _, mark, line = text.partition(MARK)
        if mark:
            self._say_once(_COLOUR.sub("", line).rstrip("\n"))
        elif text != "\n" or not getattr(self._thread, "wrote_a_mark", False):
            with contextlib.suppress(OSError):  # a full disk: a library's line must not end the job
                self._stream.write(self._safe(text))
        self._thread.wrote_a_mark = bool(mark) and not text.endswith("\n")
        return len(text)

    def _say_once(self, line: str) -> None:
        now = time.monotonic()
        self._shown_at = {shown: at for shown, at in self._shown_at.items() if now - at < SAY_AGAIN_S}
        if line not in self._shown_at:
            self._shown_at[line] = now
            level, _, message = line.partition(" ")
            logging.getLogger("lib.workers").log(logging.getLevelNamesMapping().get(level, logging.INFO), message)


class _OursOrOthers(logging.Handler):
    """Sends the log of `lib` to the terminal, and the log of libraries to their file."""

    def emit(self, record: logging.LogRecord) -> None:
        is_ours = record.name.partition(".")[0] in ("lib", "__main__")
        try:
            (terminal() if is_ours else sys.stderr).write(f"{self.format(record)}\n")
        except Exception:  # noqa: BLE001 - as all handlers do
            self.handleError(record)


class _ToDriver(logging.Handler):
    """Marks what `lib` logs in a worker, so that `_Others` in the driver recognises it."""

    def emit(self, record: logging.LogRecord) -> None:
        # Not by print, which Ray Train replaces: it would log the line again.
        sys.stderr.write(f"{MARK}{record.levelname} {' '.join(record.getMessage().splitlines())}\n")
        sys.stderr.flush()


_taken_over: list[Terminal] = []


def terminal() -> Terminal:
    """Return where our lines go: standard error, which in a job is ours alone."""
    if _taken_over:
        return _taken_over[-1]
    return sys.stderr if isinstance(sys.stderr, Terminal) else Terminal(sys.stderr)


def take_over(job: str, given: Sequence[str], *, verbose: bool) -> Terminal:
    """Reserve the terminal for our lines until the process ends, because threads and libraries print until then.

    With `verbose` libraries write there too. Secrets in the URLs among the arguments `given` are never shown.
    """
    sys.stdout.flush()
    if not (_is_descriptor(sys.stderr, 2) and _is_descriptor(sys.stdout, 1)):  # the job runs inside another program
        ours = Terminal(sys.stderr, given)
        sys.stderr = cast(TextIO, ours)
    else:
        log = None if verbose else _open_log(job)
        ours = Terminal(_copy(sys.stderr), given, log[0] if log else None)
        ours.result = _copy(sys.stdout)
        if log:
            os.dup2(log[1], 2)
            os.close(log[1])
            ours.watch()
        os.dup2(2, 1)
        sys.stderr = cast(TextIO, _Others(sys.stderr, given))
        _taken_over.append(ours)
    ours.result = cast(TextIO, StreamWithoutSecrets(ours.result, given))
    handler = _OursOrOthers()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", handlers=[handler])
    return ours


def send_log_to_driver(level: int = logging.INFO) -> None:
    """Send what `lib` logs in this worker, from this level on, to the terminal of the job, by way of Ray."""
    ours = logging.getLogger("lib")
    if not _taken_over and not any(isinstance(handler, _ToDriver) for handler in ours.handlers):
        ours.addHandler(_ToDriver(level))
        ours.setLevel(logging.INFO)


def _is_descriptor(stream: TextIO, number: int) -> bool:
    try:
        return stream.fileno() == number
    except (OSError, ValueError):
        return False


def _copy(stream: TextIO) -> TextIO:
    return os.fdopen(os.dup(stream.fileno()), "w", encoding=stream.encoding, errors=stream.errors)


def _open_log(job: str) -> tuple[Path, int] | None:
    """Return a new file that only this user can read, and its descriptor; None if it cannot be made."""
    folder = Path(tempfile.gettempdir()) / f"conv-facenet-{os.geteuid()}" / "logs"
    path = folder / f"{job}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    try:
        for each in (folder.parent, folder):
            each.mkdir(mode=0o700, exist_ok=True)
            found = each.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                return None
        for old in folder.glob("*.log"):
            if time.time() - old.stat().st_mtime > KEPT_DAYS * 24 * 3600:
                old.unlink(missing_ok=True)
        return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    except OSError:
        return None
