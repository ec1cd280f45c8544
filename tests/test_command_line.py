"""What every job says of wrong flags and of URLs with secrets; no job gets as far as to need Ray."""

import json
import logging
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import s3fs

from lib import storage
from lib.config import run_job
from tests.job_runner import ROOT, environment, run_here
from tests.test_config import Config

SECRETS = ("sec-ret", "sign-ature")
WITH_SECRETS = (
    "s3://user:sec-ret@host/folder",
    "https://user:sec-ret@127.0.0.1:9/folder?token=sign-ature",
    "ftp2://user:sec-ret@host/folder?a=sign-ature&b=1",
)
URL_FLAGS = {
    "preprocess.py": ("--data", "--photos", "--photo-list", "--identities", "--faces", "--detector-weights"),
    "train.py": ("--data", "--faces", "--init", "--from-sweep", "--cache-dir"),
    "embed.py": (
        "--data",
        "--model",
        "--faces",
        "--photos",
        "--photo-list",
        "--identities",
        "--output",
        "--detector-weights",
    ),
    "evaluate.py": (
        "--data",
        "--model",
        "--faces",
        "--photos",
        "--identities",
        "--pairs",
        "--ijb",
        "--slices",
        "--output",
    ),
    "export.py": ("--data", "--model", "--faces", "--output"),
    "identify.py": ("--data", "--model", "--gallery", "--faces", "--output", "--detector-weights"),
    "curate.py": ("--data", "--model", "--faces", "--embeddings", "--against", "--output", "--apply"),
    "forget.py": ("--data", "--photos-from", "--identities-from", "--also", "--cache-dir"),
    "compare.py": ("--data", "--output", "stray"),
    "sweep.py": ("--data",),
    "pipeline.py": ("--data",),
    "sample.py": ("--output",),
}


@pytest.mark.parametrize("url", WITH_SECRETS, ids=["s3", "https", "unknown"])
@pytest.mark.parametrize(
    ("script", "flag"), [(script, flag) for script, flags in URL_FLAGS.items() for flag in (*flags, "--no-such-flag")]
)
def test_no_secret_of_a_url_is_shown(script, flag, url, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(storage, "CHECK_RETRY_SECONDS", 0.0)
    flags = [url] if flag == "stray" else [flag, url]
    ended = run_here(script, *flags, "--dry-run", extra={"DATA_URL": str(tmp_path)})
    assert ended.errors or ended.output
    assert not [secret for secret in SECRETS if secret in ended.errors + ended.output], ended


@pytest.fixture(scope="module")
def repeating_server():
    """Return the address of a server that refuses each request and repeats it in its answer, as some storages do."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"<Error><Code>AccessDenied</Code><Message>{self.path} {self.headers}</Message></Error>".encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_PUT = do_HEAD = do_POST = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            """Keep the output of the tests clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("endpoint", ["silent", "refusing", "secret in the data URL"])
@pytest.mark.parametrize("script", URL_FLAGS)
def test_no_secret_is_shown_when_the_storage_fails(script, endpoint, repeating_server, monkeypatch):
    """Not a dry run: each job goes as far as its storage lets it."""
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(storage, "CHECK_RETRY_SECONDS", 0.0)
    address = "127.0.0.1:9" if endpoint == "silent" else repeating_server
    login = "" if endpoint.startswith("secret") else "user:sec-ret@"
    variables = {
        "AWS_ENDPOINT_URL": f"http://{login}{address}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "sign-ature",
        "DATA_URL": WITH_SECRETS[0] if endpoint.startswith("secret") else "s3://bucket/folder",
    }
    name = {"sweep.py": ["--name", "x", "--backbones", "test_resnet"]}.get(script, [])
    s3fs.S3FileSystem.clear_instance_cache()
    ended = run_here(script, *name, extra=variables)
    s3fs.S3FileSystem.clear_instance_cache()
    assert ended.status in (1, 2), ended
    assert ended.last_error.startswith(("error: ", "failed: ")), ended
    assert not [secret for secret in SECRETS if secret in ended.errors + ended.output], ended


@pytest.mark.parametrize("columns", ["40", "200"])
def test_the_help_shows_no_secret_of_the_data_url(columns):
    told = run_here("train.py", "--help", extra={"DATA_URL": WITH_SECRETS[1], "COLUMNS": columns})
    assert "***@127.0.0.1" in "".join(told.output.replace("│", "").split())
    assert "ret@" not in told.output
    assert "sign-" not in told.output


def test_tracebacks_logs_and_results_show_no_secret_either(monkeypatch, capsys):
    def leaking(config):
        logging.getLogger().warning("reading %s", config.photos)
        print("Invalid bucket name", config.photos.removeprefix("s3://"))
        if config.dry_run:
            raise ZeroDivisionError(config.photos)
        return {"photos": config.photos, "query": 'http://host/x?a=sign-ature"\\', "rows": 1}

    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    for flags in ([], ["--dry-run"]):
        monkeypatch.setattr(sys, "argv", ["job.py", "--photos", WITH_SECRETS[0], *flags])
        with pytest.raises(SystemExit):
            run_job(Config, leaking, description="")
        shown = capsys.readouterr()
        assert "Invalid bucket name ***host/folder" in shown.err
        assert not [secret for secret in SECRETS if secret in shown.out + shown.err]
        if not flags:
            result = json.loads(shown.out)
            assert result["photos"] == "s3://***@host/folder"
            assert result["rows"] == 1


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--fotos", "x"], "error: '--fotos' is not understood, is --photos meant?: run jobs/job.py --help"),
        (["stray"], "error: 'stray' is not understood: run jobs/job.py --help"),
        (["--photos"], "error: --photos has no value: run jobs/job.py --help"),
        (["--image-size", "large"], "error: --image-size takes INT: invalid literal for int() with base 10: 'large'"),
        (["--photos", "a\udcff"], "error: an argument is not UTF-8: b'a\\xff': rename the file or folder"),
        (["--photos", "a\nb", "--image-size", "1"], "error: --image-size is 1: allowed is 16 or more"),
    ],
)
def test_a_refusal_is_one_line(flags, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jobs/job.py", *flags])
    with pytest.raises(SystemExit) as ended:
        run_job(Config, lambda _: {}, description="")
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith(line)
    assert errors.count("\n") == 1


def test_a_value_that_is_none_of_a_few_is_told_with_those():
    refused = run_here("train.py", "--batch", "nope")
    assert refused.status == 2
    assert refused.errors.startswith("error: --batch is 'nope': allowed is triplets, identities, photos: run ")
    assert refused.errors.count("\n") == 1


RUN_JOB = "import runpy, sys; sys.argv = [{job!r}, {flag!r}]; runpy.run_path({job!r}, run_name='__main__')"


@pytest.mark.parametrize(
    "code",
    [
        *(RUN_JOB.format(job=str(ROOT / "jobs" / "train.py"), flag=flag) for flag in ("--help", "--no-such-flag")),
        "import lib.training.ray_train",  # what Ray Train's controller imports
    ],
    ids=["help", "refusal", "controller"],
)
def test_training_does_not_import_torch_where_nothing_is_computed(code: str) -> None:
    """It takes seconds, and a job is several processes."""
    say = r"os.write(ours, b'%r\n' % ('torch' in sys.modules))"  # what is printed is no result of a job
    watched = f"import atexit, os, sys; ours = os.dup(1); atexit.register(lambda: {say}); {code}"
    done = subprocess.run(
        [sys.executable, "-c", watched], env=environment(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == "False", done.stderr
