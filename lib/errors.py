"""The errors that end a job with one clear line instead of a traceback."""


class UserError(Exception):
    """The user's mistake: says what is wrong, the value, what is allowed and the next step. Exit status 2."""


class JobError(Exception):
    """The job failed for a reason outside the program (disk full, storage gone): one line, exit status 1."""


class StopSignal(KeyboardInterrupt):
    """SIGTERM or SIGUSR1 came. No `Exception`, so that no library handles it as an error of its own. Status 75."""


class JobStopped(Exception):  # noqa: N818 - nothing went wrong
    """A signal (SIGTERM, SIGUSR1) stopped the job, and all is saved: the same command continues. Exit status 75."""
