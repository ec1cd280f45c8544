"""The errors that end a job with one clear line instead of a traceback."""


class UserError(Exception):
    """The user's mistake: says what is wrong, the value, what is allowed and the next step. Exit status 2."""


class JobError(Exception):
    """The job failed for a reason outside the program (disk full, storage gone): one line, exit status 1."""


class StopSignal(KeyboardInterrupt):
    """SIGTERM or SIGUSR1 came; no library takes it for an error of its own, as it would an `Exception`. Status 75."""


class JobStopped(Exception):  # noqa: N818 - nothing went wrong
    """Somebody asked the job to stop (SIGTERM, SIGUSR1) and all is saved: the same command goes on. Exit status 75."""
