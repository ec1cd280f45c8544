"""What the errors of a storage mean: which ones are worth a retry, and one clear line for the others."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from lib.errors import JobError, UserError
from lib.redaction import redacted, shown

PASSING_S3_CODES = ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException")

_AGAIN = ", and run the same command again"
_LOCAL_FAILURES = {
    errno.ENOSPC: "free space in that folder" + _AGAIN,
    errno.EDQUOT: "free space in your quota, or ask for more" + _AGAIN,
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or choose a file system without one" + _AGAIN,
    errno.EMFILE: "raise the limit on open files (ulimit -n)" + _AGAIN,
    errno.ENFILE: "close other programs, or raise fs.file-max" + _AGAIN,
    errno.ENOMEM: "free memory" + _AGAIN,
    errno.EIO: "check the disk" + _AGAIN,
    errno.ESTALE: "mount the network folder anew" + _AGAIN,
    errno.ENOTCONN: "mount the network folder anew" + _AGAIN,
}
"""What to do about failures outside the program, by error number."""
_LOCAL_MISTAKES = {
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "run as its owner, or choose another place",
    errno.EROFS: "mount it writable, or choose another place",
    errno.ENOTDIR: "remove the file that is where a folder should be, or choose another place",
    errno.EISDIR: "name a file in this folder, or choose another place",
    errno.EEXIST: "remove the file that is there, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "correct the path, or its links, which lead in a circle",
}
_S3_MISTAKES = {
    "InvalidAccessKeyId": "correct AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "correct AWS_SECRET_ACCESS_KEY, which does not belong to the access key",
    "ExpiredToken": "the session has expired: get new keys and a new AWS_SESSION_TOKEN",
    "InvalidToken": "the session token does not belong to the access key: correct or unset AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "set the clock of this machine",
    "AccessDenied": "ask for this right for the user of AWS_ACCESS_KEY_ID, or use another key",
    "InvalidBucketName": "no bucket can have this name: correct the URL",
    "AuthorizationHeaderMalformed": "set AWS_DEFAULT_REGION to the region of the bucket",
    "PermanentRedirect": "set AWS_DEFAULT_REGION to the region of the bucket",
    "InvalidObjectState": "it is archived: restore it first",
    "EntityTooLarge": "the storage takes no file of this size: choose another storage",
}
"""What to do about the user's mistakes, by the code of the S3 answer."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or its bucket does not exist. Ends a job as `UserError` does, unless caught as `FileNotFoundError`."""


def reason_for(error: BaseException) -> str:
    """Return the text of an error on one line, without its number and without secrets."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(redacted(text).split()).rstrip(".") or type(error).__name__


@contextmanager
def explained(url: str, doing: str) -> Iterator[None]:
    """Turn a storage's error into one line: what could not be done, why, and the next step.

    Raises:
        MissingFileError: the file or its bucket does not exist.
        UserError: the user's mistake, such as a wrong secret or a read-only folder.
        JobError: a failure outside the program, such as a full disk or an endpoint that is gone.
    """
    try:
        yield
    except (UserError, JobError):
        raise
    except Exception as error:
        explanation = _explanation(error, url, f"cannot {doing} {shown(url)}")
        if explanation is None:
            raise
        raise explanation from error


def is_passing(error: BaseException) -> bool:
    """Return whether the same request may succeed later: connection lost, timeout, status 5xx, slow down."""
    import aiohttp
    from botocore import exceptions as s3

    connection_faults = (ConnectionError, TimeoutError, aiohttp.ClientConnectionError, aiohttp.ClientPayloadError)
    if isinstance(error, (*connection_faults, s3.ConnectionError, s3.HTTPClientError)):
        return not isinstance(error, s3.SSLError)
    status = (_s3_answer(error) or {}).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status >= 500 or s3_code(error) in PASSING_S3_CODES


def s3_code(error: BaseException | None) -> str:
    """Return the code of the S3 answer behind an error, such as `NoSuchBucket`, or an empty string."""
    return (_s3_answer(error) or {}).get("Error", {}).get("Code", "")


def _s3_answer(error: BaseException | None) -> dict | None:
    # s3fs turns botocore's ClientError into an OSError, and leaves it as the cause.
    while error is not None and not hasattr(error, "response"):
        error = error.__cause__
    return getattr(error, "response", None)


def _explanation(error: Exception, url: str, what: str) -> UserError | JobError | None:
    """Return the error to raise instead, or None if the error does not come from a storage."""
    if isinstance(error, OSError) and error.errno and _s3_answer(error) is None:
        return _local_explanation(error, f"{what}: {os.strerror(error.errno)}")
    return _remote_explanation(error, url, what)


def _local_explanation(error: OSError, what: str) -> UserError | JobError:
    if isinstance(error, FileNotFoundError):
        return MissingFileError(f"{what}: correct the path, or run first the job that makes it")
    if error.errno in _LOCAL_MISTAKES:
        return UserError(f"{what}: {_LOCAL_MISTAKES[error.errno]}")
    return JobError(f"{what}: {_LOCAL_FAILURES[error.errno]}" if error.errno in _LOCAL_FAILURES else what)


def _remote_explanation(error: Exception, url: str, what: str) -> UserError | JobError | None:
    from botocore import exceptions as s3

    code = s3_code(error)
    because = f"{what}: {reason_for(error)}"
    if code == "NoSuchBucket":
        bucket = urlsplit(redacted(url)).netloc
        return MissingFileError(f"{what}: there is no bucket {bucket!r}: create it, or correct the URL")
    if isinstance(error, FileNotFoundError):
        return MissingFileError(f"{what}: it is not there: correct the URL, or run first the job that makes it")
    if code in _S3_MISTAKES:
        return UserError(f"{because}: {_S3_MISTAKES[code]}")
    if isinstance(error, s3.NoCredentialsError | s3.PartialCredentialsError):
        return UserError(f"{because}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if isinstance(error, s3.ParamValidationError):
        # Its reason repeats the bucket's name, with the secret of a URL that has one.
        return UserError(
            f"{what}: no bucket or file can have this name: correct the URL, and keep credentials out of it"
        )
    if isinstance(error, PermissionError):
        return UserError(
            f"{because}: ask for this right, or correct AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or the bucket"
        )
    setting = "AWS_ENDPOINT_URL" if url.startswith(("s3://", "s3a://")) else "the URL"
    if isinstance(error, s3.SSLError):
        return UserError(f"{because}: trust the certificate by AWS_CA_BUNDLE, or correct http or https in {setting}")
    if is_passing(error):
        return JobError(f"{because}: {_passing_remedy(error, setting)}{_AGAIN}")
    if isinstance(error, ValueError):
        return UserError(f"{because}: correct {setting}")
    return JobError(because) if isinstance(error, OSError | s3.BotoCoreError) else None


def _passing_remedy(error: Exception, setting: str) -> str:
    """Return what to do about an error that repeated until the time limit."""
    status = (_s3_answer(error) or {}).get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if s3_code(error) in PASSING_S3_CODES:
        return "the storage is overloaded: use fewer workers"
    if status >= 500:
        return "the storage has a fault of its own: wait until it is well"
    return f"nobody answers: check that the storage runs, the network and {setting}"
