"""Which faults of an object store are tried again: an endpoint that gives these on demand, for no real server does."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import s3fs

from lib import storage
from lib.errors import UserError

ACTIONS = [storage.read_bytes, lambda url: storage.write_bytes(url, b"content"), lambda url: storage.read_bytes(url, 3)]


@contextmanager
def endpoint_that_answers(faults: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Give the faults (HTTP status, S3 code), one a request, and then what was asked for; yield the requests' list."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self, content: bytes = b"content") -> None:
            status, code = faults[len(requests)] if len(requests) < len(faults) else (200, "")
            requests.append(self.path)
            body = f"<Error><Code>{code}</Code><Message>Why not</Message></Error>".encode() if code else content
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET(b"")

        def log_message(self, *_: object) -> None:
            """Keep the output of the tests clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        s3fs.S3FileSystem.clear_instance_cache()
        yield requests
        s3fs.S3FileSystem.clear_instance_cache()
        server.shutdown()


@pytest.mark.parametrize("fault", [(503, "SlowDown"), (500, "InternalError"), (502, "")])
@pytest.mark.parametrize("action", ACTIONS[:2])
def test_a_passing_fault_is_tried_again_with_a_warning(monkeypatch, caplog, fault, action):
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.01)
    # botocore sends each request twice before it tells us.
    with endpoint_that_answers([fault] * 2, monkeypatch) as requests:
        action("s3://bucket/x")
    assert len(requests) == 3
    warnings = [record.getMessage() for record in caplog.records if record.name == "lib.storage"]
    assert len(warnings) == 1
    assert "'s3://bucket/x'" in warnings[0]
    assert "trying again in" in warnings[0]


@pytest.mark.parametrize("fault", [(403, "AccessDenied"), (403, "SignatureDoesNotMatch"), (404, "NoSuchBucket")])
@pytest.mark.parametrize("action", ACTIONS)
def test_a_refusal_is_told_at_once(monkeypatch, fault, action):
    with endpoint_that_answers([fault], monkeypatch) as requests, pytest.raises(UserError):
        action("s3://bucket/x")
    assert len(requests) == 1


def test_a_small_file_takes_one_request(monkeypatch):
    with endpoint_that_answers([], monkeypatch) as requests:
        assert storage.read_bytes("s3://bucket/photos/1.jpg") == b"content"
    assert requests == ["/bucket/photos/1.jpg"]
