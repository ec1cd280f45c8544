"""Each cause of a storage's error has its own next step."""

import errno

import pytest
from botocore.exceptions import ClientError, ConnectTimeoutError, EndpointConnectionError, SSLError

from lib.errors import JobError, UserError
from lib.storage_errors import explained

URL = "s3://bucket/a folder/x"


def told(error: Exception, url: str = URL) -> UserError | JobError:
    """Return what a storage's error becomes."""
    with pytest.raises((UserError, JobError)) as raised, explained(url, "read"):
        raise error
    assert "\n" not in str(raised.value)
    return raised.value


def answer(code: str, status: int = 400, message: str = "Because.") -> OSError:
    """Return an S3 server's answer as s3fs raises it."""
    error = OSError(message)
    error.__cause__ = ClientError(
        {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject"
    )
    return error


@pytest.mark.parametrize(
    ("number", "kind", "step"),
    [
        (errno.ENOSPC, JobError, "free space in that folder, and run"),
        (errno.EDQUOT, JobError, "free space in your quota"),
        (errno.EFBIG, JobError, "ulimit -f"),
        (errno.EMFILE, JobError, "ulimit -n"),
        (errno.EIO, JobError, "check the disk"),
        (errno.ESTALE, JobError, "mount the network folder anew"),
        (errno.EACCES, UserError, "change its permissions"),
        (errno.EPERM, UserError, "run as its owner"),
        (errno.EROFS, UserError, "mount it writable"),
        (errno.ENOENT, UserError, "run first the job that makes it"),
        (errno.ENOTDIR, UserError, "the file that is where a folder should be"),
        (errno.EISDIR, UserError, "name a file in this folder"),
        (errno.EEXIST, UserError, "remove the file that is there"),
        (errno.ENAMETOOLONG, UserError, "shorter path"),
        (errno.ELOOP, UserError, "in a circle"),
    ],
)
def test_the_next_step_after_a_local_error_follows_from_its_number(
    number: int, kind: type[Exception], step: str
) -> None:
    error = told(OSError(number, "why", "x"), "/data/x")
    assert isinstance(error, kind)
    assert step in str(error)
    assert str(error).count(": ") == 2  # what, why, the next step


@pytest.mark.parametrize(
    ("code", "step"),
    [
        ("InvalidAccessKeyId", "correct AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", "correct AWS_SECRET_ACCESS_KEY"),
        ("ExpiredToken", "a new AWS_SESSION_TOKEN"),
        ("RequestTimeTooSkewed", "set the clock"),
        ("AccessDenied", "ask for this right"),
        ("PermanentRedirect", "AWS_DEFAULT_REGION"),
        ("InvalidObjectState", "restore it"),
        ("NoSuchBucket", "create it"),
    ],
)
def test_the_next_step_after_an_s3_mistake_follows_from_its_code(code: str, step: str) -> None:
    error = told(answer(code))
    assert isinstance(error, UserError)
    assert step in str(error)


def test_a_storage_that_is_overloaded_broken_or_silent_is_told_apart() -> None:
    wanted = {
        "use fewer workers": answer("SlowDown", 503),
        "has a fault of its own": answer("InternalError", 500),
        "the network and AWS_ENDPOINT_URL": EndpointConnectionError(endpoint_url="http://127.0.0.1:1"),
        "check that the storage runs": ConnectTimeoutError(endpoint_url="http://127.0.0.1:1"),
    }
    for step, cause in wanted.items():
        error = told(cause)
        assert isinstance(error, JobError)
        assert step in str(error)
        assert sum(each in str(error) for each in wanted) == (2 if "check that" in str(error) else 1)
        assert str(error).endswith("run the same command again")


def test_only_s3_is_told_of_its_variables() -> None:
    error = told(ConnectionError("connection reset"), "https://host/x")
    assert "the network and the URL" in str(error)
    assert "AWS" not in str(error)


def test_a_certificate_that_is_not_trusted_is_told_from_a_wrong_endpoint() -> None:
    wrong = SSLError(endpoint_url="https://127.0.0.1:1", error="self-signed certificate")
    assert "AWS_CA_BUNDLE" in str(told(wrong))
    assert str(told(ValueError("Invalid endpoint: x"))).endswith("correct AWS_ENDPOINT_URL")
