"""Object stores: a real S3 server, its refusals, and its absence. Local disks are in test_storage.py."""

import json
import multiprocessing
import operator
import os
import pickle
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pytest
import s3fs

from lib import storage
from lib.errors import JobError, UserError
from tests.s3_server import S3Server

Result = TypeVar("Result")

STRANGE_NAMES = ["a b.jpg", "it's.jpg", '"quoted".jpg', "line\nbreak.jpg", "é “ü” 顔.jpg", "50%20.jpg", "a+b=c&d.jpg"]
STRANGE_NAMES += ["a?b#c.jpg", "[1]*.jpg", "a::b.jpg", "~.jpg", "me@home.jpg"]

READS = {
    "exists": storage.exists,
    "read_bytes": storage.read_bytes,
    "read_parquet": storage.read_parquet,
    "list_files": lambda url: list(storage.list_files(url)),
}
WRITES = {
    "write_bytes": lambda url: storage.write_bytes(url, b"new"),
    "remove": storage.remove,
    "check_writable": storage.check_writable,
}
ACTIONS = READS | WRITES

# No server listens here, ever: the port "discard", for which one has to be root.
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def change_environment(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str | None]], None]:
    """Return a function that changes environment variables (None takes one away) as a new process would find them."""

    def change(variables: dict[str, str | None]) -> None:
        for name, value in variables.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()

    return change


@pytest.fixture
def random_table() -> pa.Table:
    """A table of 4 MB that no compression makes smaller, in two columns."""
    rng = np.random.default_rng(0)
    return pa.table({name: rng.random(250_000) for name in ("left", "right")})


@contextmanager
def stopped(server: S3Server) -> Iterator[None]:
    server.stop()
    try:
        yield
    finally:
        server.start()


def begun_without(server: S3Server, action: Callable[[], Result], log: pytest.LogCaptureFixture) -> Result:
    """Stop the server, begin the action, start the server once the action waits for it, and return its result."""
    # It is the action that has a thread of its own: the server ends with the thread that started it.
    with ThreadPoolExecutor(1) as pool:
        with stopped(server):
            future = pool.submit(action)
            while "trying again in" not in log.text and not future.done():
                time.sleep(0.05)
        return future.result()


def paths(url: str, **options: object) -> list[str]:
    return [info.path for info in storage.list_files(url, **options)]


def assert_clear(error: BaseException) -> None:
    """Assert that a message is one line without key or secret."""
    assert "\n" not in str(error)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert os.environ.get(name, "no such key") not in str(error)


def test_any_name_can_be_written_found_read_and_removed(s3_bucket):
    folder = storage.join(s3_bucket, "a folder é")
    for name in STRANGE_NAMES:
        storage.write_bytes(storage.join(folder, name), name.encode())
    assert paths(folder, suffix=".jpg") == sorted(STRANGE_NAMES)
    assert paths(s3_bucket) == [f"a folder é/{name}" for name in sorted(STRANGE_NAMES)]
    for number, name in enumerate(sorted(STRANGE_NAMES), start=1):
        url = storage.join(folder, name)
        assert storage.exists(url)
        assert storage.read_bytes(url) == name.encode()
        storage.remove(url)
        assert not storage.exists(url)
        storage.remove(url)
        assert paths(folder) == sorted(STRANGE_NAMES)[number:]


def test_another_client_reads_what_was_written(s3_server, s3_bucket):
    storage.write_bytes(f"{s3_bucket}/a folder/顔.bin", b"content")
    variables = s3_server.environment()
    other_client = pyarrow.fs.S3FileSystem(
        access_key=variables["AWS_ACCESS_KEY_ID"],
        secret_key=variables["AWS_SECRET_ACCESS_KEY"],
        region=variables["AWS_REGION"],
        scheme="http",
        endpoint_override=s3_server.endpoint.removeprefix("http://"),
    )
    path = s3_bucket.removeprefix("s3://") + "/a folder/顔.bin"
    with other_client.open_input_stream(path) as stream:
        assert stream.read() == b"content"


def test_only_the_first_bytes_are_read_when_asked(s3_bucket):
    storage.write_bytes(f"{s3_bucket}/x", b"0123456789")
    storage.write_bytes(f"{s3_bucket}/empty", b"")
    assert storage.read_bytes(f"{s3_bucket}/x", 4) == b"0123"
    assert storage.read_bytes(f"{s3_bucket}/x", 100) == b"0123456789"
    assert storage.read_bytes(f"{s3_bucket}/empty", 100) == storage.read_bytes(f"{s3_bucket}/empty") == b""


def test_files_are_listed_as_on_a_local_disk(s3_bucket, tmp_path):
    names = ["b/2.jpg", "b/10.jpg", "b-c/1.jpg", "a.jpg", "b!/1.jpg", "é/1.JPG", "B/x/y/z.png", "b0.jpg"]
    names += ["_SUCCESS", ".hidden", "_tmp/x.jpg", "a/.git/y.jpg"]
    for folder in (str(tmp_path), f"{s3_bucket}/photos"):
        for name in names:
            storage.write_bytes(storage.join(folder, name), name.encode())
    storage.write_bytes(f"{s3_bucket}/photos-of-others/x.jpg", b"")
    for options in ({}, {"suffix": ".jpg"}, {"suffix": (".png", ".jpg"), "skip_prefixes": ()}):
        found = [info[:2] for info in storage.list_files(f"{s3_bucket}/photos", **options)]
        assert found == [info[:2] for info in storage.list_files(str(tmp_path), **options)]
        assert len(found) > 4
    assert paths(f"{s3_bucket}/photos/b") == ["10.jpg", "2.jpg"]
    assert paths(f"{s3_bucket}/nothing") == []


def test_what_consoles_put_in_the_place_of_a_folder_is_no_file(s3_bucket):
    files, bucket = storage.filesystem(s3_bucket)
    for key in ("photos/", "photos/ann/"):
        files.call_s3("put_object", Bucket=bucket, Key=key, Body=b"")
    storage.write_bytes(f"{s3_bucket}/photos/ann/1.jpg", b"1")
    assert paths(s3_bucket) == ["photos/ann/1.jpg"]
    assert paths(f"{s3_bucket}/photos") == ["ann/1.jpg"]


def test_more_files_than_one_answer_of_the_server_holds_are_listed(s3_bucket):
    files, bucket = storage.filesystem(s3_bucket)
    names = [f"{number % 7}/{number}.jpg" for number in range(1010)]
    files.pipe({f"{bucket}/photos/{name}": b"1" for name in names})
    assert paths(f"{s3_bucket}/photos") == sorted(names)


def test_a_listing_shows_what_another_process_just_wrote(s3_bucket, s3_server):
    assert paths(s3_bucket) == []
    program = f"from lib import storage; storage.write_bytes('{s3_bucket}/x', b'1')"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], check=True)
    assert paths(s3_bucket) == ["x"]


def test_the_storage_can_be_used_after_a_fork(s3_bucket):
    storage.write_bytes(f"{s3_bucket}/x", b"1")
    child = multiprocessing.get_context("fork").Process(target=storage.write_bytes, args=(f"{s3_bucket}/y", b"2"))
    child.start()
    child.join(timeout=60)
    assert child.exitcode == 0
    assert paths(s3_bucket) == ["x", "y"]


def test_a_process_killed_while_it_uploads_leaves_what_was_there(s3_bucket):
    url = f"{s3_bucket}/model.bin"
    storage.write_bytes(url, b"old content")
    # The first part has arrived, the second is on its way for as long as the process lives.
    program = f"""
        import asyncio, s3fs
        from lib import storage
        upload = s3fs.S3FileSystem._call_s3
        async def upload_first_part(files, method, *args, **options):
            if method == "upload_part" and options["PartNumber"] == 2:
                print("writing", flush=True)
                await asyncio.sleep(600)
            return await upload(files, method, *args, **options)
        s3fs.S3FileSystem._call_s3 = upload_first_part
        storage.write_bytes({url!r}, bytes(2 * s3fs.S3FileSystem.default_block_size))
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    ) as process:
        assert process.stdout.readline() == b"writing\n"
        process.kill()
    assert storage.read_bytes(url) == b"old content"
    assert [info[:2] for info in storage.list_files(s3_bucket)] == [("model.bin", 11)]
    storage.write_bytes(url, b"newest")
    assert storage.read_bytes(url) == b"newest"


def test_json_comes_back(s3_bucket):
    storage.write_json(f"{s3_bucket}/model.json", {"name": "Zoë", "threshold": 0.5})
    assert storage.read_json(f"{s3_bucket}/model.json") == {"name": "Zoë", "threshold": 0.5}
    assert json.loads(storage.read_bytes(f"{s3_bucket}/model.json")) == {"name": "Zoë", "threshold": 0.5}


def test_of_a_parquet_file_only_what_is_asked_for_is_fetched(s3_bucket, random_table, monkeypatch):
    url = f"{s3_bucket}/split=train/part 0.parquet"
    storage.write_parquet(url, random_table, row_group_size=25_000)
    num_bytes_fetched = []
    fetch = s3fs.S3FileSystem._cat_file

    async def counted(*args: object, **options: object) -> bytes:
        data = await fetch(*args, **options)
        num_bytes_fetched.append(len(data))
        return data

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", counted)
    s3fs.S3FileSystem.clear_instance_cache()
    with storage.open_parquet(url) as file:
        part = file.read_row_group(3, columns=["right"])
    assert part.equals(random_table.select(["right"]).slice(75_000, 25_000))
    assert 200_000 <= sum(num_bytes_fetched) < random_table.nbytes / 10
    assert storage.read_parquet(url).equals(random_table)


def test_a_parquet_file_cut_short_is_named(s3_bucket, random_table):
    storage.write_parquet(f"{s3_bucket}/x.parquet", random_table)
    storage.write_bytes(f"{s3_bucket}/x.parquet", storage.read_bytes(f"{s3_bucket}/x.parquet", 10_000))
    with pytest.raises(UserError, match=r"x\.parquet") as raised:
        storage.read_parquet(f"{s3_bucket}/x.parquet")
    assert_clear(raised.value)


def test_a_missing_file_can_be_told_from_other_mistakes(s3_bucket):
    for read in (storage.read_bytes, storage.read_parquet):
        with pytest.raises(FileNotFoundError) as raised:
            read(f"{s3_bucket}/a folder/nothing")
        assert_clear(raised.value)
    assert not storage.exists(f"{s3_bucket}/a folder/nothing")


@pytest.mark.usefixtures("s3_bucket")
def test_a_missing_bucket_is_named():
    for name in ("read_bytes", "read_parquet", "list_files", "write_bytes", "check_writable"):
        with pytest.raises(UserError, match="no bucket 'nobody-made-this'") as raised:
            ACTIONS[name]("s3://nobody-made-this/folder/x")
        assert_clear(raised.value)
    assert not storage.exists("s3://nobody-made-this")


def test_a_user_who_may_only_read_can_read_and_is_told_when_writing(s3_bucket, s3_server, change_environment):
    storage.write_bytes(f"{s3_bucket}/x", b"1")
    change_environment(s3_server.environment("ro"))
    for write in WRITES.values():
        with pytest.raises(UserError, match=r"Access Denied.*AWS_ACCESS_KEY_ID") as raised:
            write(f"{s3_bucket}/x")
        assert_clear(raised.value)
    assert storage.read_bytes(f"{s3_bucket}/x") == b"1"
    assert paths(s3_bucket) == ["x"]


@pytest.mark.parametrize(
    "credentials",
    [
        {"AWS_SECRET_ACCESS_KEY": "wrong-secret"},
        {"AWS_ACCESS_KEY_ID": "unknown-key"},
        {"AWS_SECRET_ACCESS_KEY": None},
        {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
    ],
    ids=["wrong secret", "unknown key", "half", "none"],
)
def test_wrong_credentials_are_the_users_mistake(s3_bucket, change_environment, credentials):
    change_environment(credentials)
    for action in ACTIONS.values():
        with pytest.raises(UserError, match=r"AWS_(ACCESS_KEY_ID|SECRET_ACCESS_KEY)") as raised:
            action(f"{s3_bucket}/x")
        assert_clear(raised.value)


@pytest.mark.usefixtures("s3_bucket")
def test_a_url_without_a_possible_bucket_is_the_users_mistake_and_its_secret_is_not_shown():
    for url in ("s3://No Bucket!/x", "s3://my-key:sec/ret@bucket/x", "s3://my-key:sec-ret@bucket/x"):
        for action in ACTIONS.values():
            with pytest.raises(UserError, match="correct the URL") as raised:
                action(url)
            assert_clear(raised.value)
            assert "sec" not in str(raised.value)
            assert "my-key" not in str(raised.value)


def test_a_write_waits_for_a_server_that_comes_back(s3_bucket, s3_server, caplog):
    storage.write_bytes(f"{s3_bucket}/before", b"1")
    begun_without(s3_server, lambda: storage.write_bytes(f"{s3_bucket}/after", b"2"), caplog)
    assert storage.read_bytes(f"{s3_bucket}/before") == b"1"
    assert storage.read_bytes(f"{s3_bucket}/after") == b"2"
    assert "trying again in" in caplog.text
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in caplog.text


def test_a_parquet_file_is_read_on_when_the_server_comes_back(s3_bucket, s3_server, random_table, caplog):
    storage.write_parquet(f"{s3_bucket}/x.parquet", random_table, row_group_size=125_000)
    with storage.open_parquet(f"{s3_bucket}/x.parquet") as file:
        assert file.read_row_group(0).equals(random_table.slice(0, 125_000))
        rest = begun_without(s3_server, lambda: file.read_row_group(1), caplog)
    assert rest.equals(random_table.slice(125_000))
    assert "trying again in" in caplog.text


def test_a_server_that_stays_away_fails_the_job_in_one_line(s3_bucket, s3_server, monkeypatch):
    storage.write_bytes(f"{s3_bucket}/x", b"1")
    with monkeypatch.context() as impatient, stopped(s3_server):
        impatient.setattr(storage, "RETRY_SECONDS", 0.3)
        with pytest.raises(JobError, match=r"connect.*AWS_ENDPOINT_URL.*again") as raised:
            storage.read_bytes(f"{s3_bucket}/x")
    assert_clear(raised.value)
    assert storage.read_bytes(f"{s3_bucket}/x") == b"1"


@pytest.mark.timeout(60)
def test_an_endpoint_that_is_not_there_ends_each_action(s3_bucket, change_environment, monkeypatch):
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.3)
    monkeypatch.setattr(storage, "CHECK_RETRY_SECONDS", 0.3)
    change_environment({"AWS_ENDPOINT_URL": NOWHERE})
    for name, action in ACTIONS.items():
        error_type = UserError if name == "check_writable" else JobError
        with pytest.raises(error_type, match=rf"{NOWHERE}.*AWS_ENDPOINT_URL") as raised:
            action(f"{s3_bucket}/x")
        assert_clear(raised.value)


@pytest.mark.timeout(60)
def test_an_endpoint_that_never_answers_ends_the_action(s3_bucket, change_environment, monkeypatch):
    monkeypatch.setattr(storage, "RETRY_SECONDS", 0.3)
    monkeypatch.setitem(storage.S3_OPTIONS["config_kwargs"], "read_timeout", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        change_environment({"AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"})
        with pytest.raises(JobError, match=r"imeout.*AWS_ENDPOINT_URL") as raised:
            storage.read_bytes(f"{s3_bucket}/x")
    assert_clear(raised.value)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:8333", "not a url"])
def test_an_endpoint_that_is_no_url_is_the_users_mistake(s3_bucket, change_environment, endpoint):
    change_environment({"AWS_ENDPOINT_URL": endpoint})
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL") as raised:
        storage.read_bytes(f"{s3_bucket}/x")
    assert_clear(raised.value)


def test_a_tree_is_removed_and_the_bucket_stays(s3_bucket):
    for name in ("faces/_SUCCESS", "faces/split=train/*.parquet", "faces-of-others/x"):
        storage.write_bytes(f"{s3_bucket}/{name}", b"1")
    storage.remove_tree(f"{s3_bucket}/faces")
    assert paths(s3_bucket, skip_prefixes=()) == ["faces-of-others/x"]
    storage.remove_tree(f"{s3_bucket}/faces")
    storage.remove_tree(s3_bucket)
    assert storage.exists(s3_bucket)
    assert paths(s3_bucket, skip_prefixes=()) == []


def test_a_file_system_can_be_sent_to_another_process_without_its_secret(s3_bucket):
    storage.write_bytes(f"{s3_bucket}/x", b"1")
    files, path = storage.filesystem(f"{s3_bucket}/x")
    sent = pickle.dumps(files)
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in sent
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(operator.methodcaller("cat_file", path), (files,)) == b"1"
