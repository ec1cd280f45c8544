"""Local disks; object stores are in test_storage_s3.py."""

import errno
import json
import multiprocessing
import os
import pickle
import resource
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import storage
from lib.errors import JobError, UserError
from lib.faces.manifest import read_manifest
from lib.faces.sources.opening import open_source

NOBODY = 65534
STRANGE_NAMES = [
    "a b.jpg",
    "it's.jpg",
    '"quoted".jpg',
    "line\nbreak.jpg",
    "tab\t.jpg",
    "é “ü” 顔.jpg",
    "50%.jpg",
    "a?b=c#d.jpg",
]
STRANGE_NAMES += ["[1]*.jpg", "a::b.jpg", "~.jpg", "back\\slash.jpg", os.fsdecode(b"latin-\xe9.jpg")]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 256 KiB."""
    folder = tmp_path / "a tiny disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount a disk; the test with a limit on file sizes stands for it")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def paths(url: object, **options: object) -> list[str]:
    return [info.path for info in storage.list_files(str(url), **options)]


def error_as_nobody(action: Callable[[], object]) -> str:
    """Run the action in a process without root's rights, and return the type and text of what it raised."""

    def run() -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        try:
            action()
        except (UserError, JobError) as error:
            sender.send(f"{type(error).__name__}: {error}")

    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(timeout=30)
    return receiver.recv() if receiver.poll() else "no error"


@pytest.mark.parametrize("name", STRANGE_NAMES)
def test_any_name_can_be_written_found_read_and_removed(tmp_path, name):
    url = storage.join(str(tmp_path), "folder", name)
    storage.write_bytes(url, b"content")
    assert storage.exists(url)
    assert storage.read_bytes(url) == b"content"
    assert [info[:2] for info in storage.list_files(str(tmp_path))] == [(f"folder/{name}", 7)]
    assert paths(tmp_path / "folder", suffix=".jpg") == [name]
    files, path = storage.filesystem(url)
    assert files.cat_file(path) == b"content"
    storage.remove(url)
    assert not storage.exists(url)
    storage.remove(url)


def test_a_file_url_is_a_local_path(tmp_path):
    storage.write_bytes(f"file://{tmp_path}/folder/x", b"1")
    assert storage.is_local(f"file://{tmp_path}")
    assert (tmp_path / "folder" / "x").read_bytes() == b"1"
    assert paths(f"file://{tmp_path}") == ["folder/x"]


@pytest.mark.parametrize(
    ("url", "names", "joined"),
    [
        ("/data", ("photos", "a b.jpg"), "/data/photos/a b.jpg"),
        ("/data/", ("photos/x",), "/data/photos/x"),
        ("/", ("data",), "/data"),
        ("s3://bucket", ("x",), "s3://bucket/x"),
        ("s3://bucket/folder/", ("x", "y"), "s3://bucket/folder/x/y"),
    ],
)
def test_join(url, names, joined):
    assert storage.join(url, *names) == joined


def test_only_the_first_bytes_are_read_when_asked(tmp_path):
    url = str(tmp_path / "x")
    storage.write_bytes(url, b"0123456789")
    assert storage.read_bytes(url, 4) == b"0123"
    assert storage.read_bytes(url, 100) == b"0123456789"


def test_a_written_file_has_the_rights_of_any_new_file(tmp_path):
    storage.write_bytes(str(tmp_path / "ours"), b"")
    (tmp_path / "any").touch()
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "any").stat().st_mode)


def test_a_name_of_the_greatest_length_can_be_written(tmp_path):
    storage.write_bytes(str(tmp_path / ("x" * 255)), b"1")
    assert paths(tmp_path) == ["x" * 255]


@pytest.mark.parametrize("old", [None, b"old content"])
def test_a_process_killed_while_it_writes_leaves_what_was_there(tmp_path, old):
    path = tmp_path / "model.bin"
    if old is not None:
        path.write_bytes(old)
    # The bytes are on their way to the disk for as long as the process lives.
    program = f"""
        import os, time
        from lib import storage
        def flush_forever(_):
            print("writing", flush=True)
            time.sleep(600)
        os.fsync = flush_forever
        storage.write_bytes({str(path)!r}, b"new content" * 100_000)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    ) as process:
        assert process.stdout.readline() == b"writing\n"
        assert len(list(tmp_path.iterdir())) == (1 if old is None else 2)
        process.send_signal(signal.SIGKILL)
    assert (path.read_bytes() if path.exists() else None) == old
    assert paths(tmp_path) == ([] if old is None else ["model.bin"])
    (tmp_path / ".theirs.tmp").write_bytes(b"not ours")
    storage.remove_unfinished(str(tmp_path))
    assert paths(tmp_path, skip_prefixes=()) == [".theirs.tmp"] + ([] if old is None else ["model.bin"])
    storage.write_bytes(str(path), b"newest")
    assert path.read_bytes() == b"newest"


def test_a_full_disk_is_one_clear_line_and_the_old_file_stays(tiny_disk):
    url = str(tiny_disk / "faces" / "part-0.parquet")
    storage.write_bytes(url, b"old")
    with pytest.raises(JobError, match=r"a tiny disk/faces/part-0.parquet.*No space left.*free space") as raised:
        storage.write_bytes(url, bytes(1_000_000))
    assert "\n" not in str(raised.value)
    assert storage.read_bytes(url) == b"old"
    assert [path.name for path in (tiny_disk / "faces").iterdir()] == ["part-0.parquet"]


def test_a_limit_on_file_sizes_is_told_from_a_full_disk(tmp_path):
    _, hard = soft_hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(JobError, match=r"File too large: raise the limit on file sizes \(ulimit -f\)"):
            storage.write_bytes(str(tmp_path / "x"), bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_hard)
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_disk_is_the_users_mistake(tiny_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    for action in (storage.check_writable, lambda url: storage.write_bytes(f"{url}/x", b"")):
        with pytest.raises(UserError, match="Read-only file system: mount it writable, or choose another place"):
            action(str(tiny_disk))


def test_a_folder_that_may_not_be_written_is_the_users_mistake(tmp_path):
    folder = tmp_path / "not yours"
    folder.mkdir(mode=0o555)
    for action in (storage.check_writable, lambda url: storage.write_bytes(f"{url}/x", b"")):
        error = error_as_nobody(lambda action=action: action(str(folder)))
        assert error.startswith("UserError: cannot write")
        assert "not yours" in error
        assert error.endswith("Permission denied: change its permissions, or choose another place")
    assert list(folder.iterdir()) == []


def test_a_file_that_may_not_be_read_is_the_users_mistake(tmp_path):
    path = tmp_path / "secret.jpg"
    path.write_bytes(b"1")
    path.chmod(0)
    error = error_as_nobody(lambda: storage.read_bytes(str(path)))
    assert error.startswith("UserError: cannot read")
    assert "Permission denied" in error


def test_checking_a_folder_makes_and_leaves_nothing(tmp_path):
    storage.check_writable(str(tmp_path / "not" / "yet" / "there"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("action", [storage.check_writable, lambda url: storage.write_bytes(f"{url}/x", b"")])
def test_a_file_in_the_place_of_a_folder_is_the_users_mistake(tmp_path, action):
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(UserError, match=r"file.*choose another place"):
        action(str(tmp_path / "file"))


def test_a_missing_file_can_be_told_from_other_mistakes(tmp_path):
    for read in (storage.read_bytes, storage.read_json, storage.read_parquet, storage.parquet_schema):
        with pytest.raises(FileNotFoundError) as raised:
            read(str(tmp_path / "nothing"))
        assert isinstance(raised.value, UserError)
        assert "No such file" in str(raised.value)
        assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)  # noqa: S301


@pytest.mark.parametrize(
    ("url", "reason"),
    [("s4://bucket/x", "'s4'.*Protocol not known"), ("gs://bucket/x", "'gs'.*gcsfs"), ("hdfs2://x", "'hdfs2'")],
)
@pytest.mark.parametrize("action", [storage.exists, storage.read_bytes, storage.check_writable, storage.filesystem])
def test_a_scheme_that_cannot_be_used_is_named(url, reason, action):
    with pytest.raises(UserError, match=rf"{reason}.*give a local path, s3://"):
        action(url)


def test_messages_show_no_secrets():
    with pytest.raises(UserError) as raised:
        storage.read_bytes("s4://user:sec/ret@host/x?X-Amz-Signature=sec-ret&a=b")
    assert "s4://***@host/x?***" in str(raised.value)
    text = 'Could not connect to "http://key:sec-ret@host/x?Signature=sec-ret" (twice: http://host/y?sig=sec-ret)'
    assert "sec-ret" not in storage.redacted(text)
    assert storage.redacted("s3://bucket/what?.jpg and /a/b?c=d") == "s3://bucket/what?.jpg and /a/b?c=d"


def test_files_are_listed_in_the_order_of_their_paths(tmp_path):
    names = ["b/2.jpg", "b/10.jpg", "b-c/1.jpg", "a.jpg", "b!/1.jpg", "é/1.JPG", "B/x/y/z.png", "b0.jpg"]
    for name in names:
        storage.write_bytes(storage.join(str(tmp_path), name), name.encode())
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    found = [info[:2] for info in storage.list_files(str(tmp_path))]
    assert found == [(name, len(name.encode())) for name in sorted(names)]
    assert paths(tmp_path, suffix=(".png", ".gif")) == ["B/x/y/z.png"]
    assert paths(tmp_path / "é", suffix=".jpg") == ["1.JPG"]
    assert paths(tmp_path / "nothing") == []


def test_marked_names_are_listed_only_when_asked(tmp_path):
    names = [".hidden", "_SUCCESS", "_tmp/x.parquet", "a/.git/y", "a/_DSC0001.JPG", "a_b.jpg"]
    for name in names:
        storage.write_bytes(storage.join(str(tmp_path), name), b"")
    assert paths(tmp_path) == ["a_b.jpg"]
    assert paths(tmp_path, skip_prefixes=(".",)) == ["_SUCCESS", "_tmp/x.parquet", "a/_DSC0001.JPG", "a_b.jpg"]
    assert paths(tmp_path, skip_prefixes=()) == sorted(names)
    assert paths(tmp_path / "_tmp") == ["x.parquet"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    photos = tmp_path / "photos"
    storage.write_bytes(str(photos / "ann" / "1.jpg"), b"1")
    storage.write_bytes(str(tmp_path / "elsewhere" / "2.jpg"), b"22")
    (photos / "bob").symlink_to(tmp_path / "elsewhere")
    (photos / "cat.jpg").symlink_to(tmp_path / "elsewhere" / "2.jpg")
    (photos / "ann" / "up").symlink_to(photos)
    (photos / "ann" / "self").symlink_to(photos / "ann")
    (photos / "nowhere.jpg").symlink_to(tmp_path / "gone")
    os.mkfifo(photos / "pipe.jpg")
    assert [info[:2] for info in storage.list_files(str(photos))] == [
        ("ann/1.jpg", 1),
        ("bob/2.jpg", 2),
        ("cat.jpg", 2),
    ]


@pytest.fixture
def web_server(tmp_path: Path) -> Iterator[str]:
    """Serve `tmp_path` with the listings of Python's own web server; yields its URL."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_photos_of_a_web_server_are_listed_and_read(tmp_path, web_server):
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "1.jpg").write_bytes(b"a photo")
    manifest = read_manifest(open_source(web_server), None, split_seed=0, identities_required=True)
    assert manifest.photos.select(["photo", "identity"]).to_pylist() == [{"photo": "ann/1.jpg", "identity": "ann"}]
    assert storage.read_bytes(f"{web_server}/ann/1.jpg", 1000) == b"a photo"
    with pytest.raises(UserError, match=r"cannot read 'http.*/ann/2\.jpg': it is not there"):
        storage.read_bytes(f"{web_server}/ann/2.jpg", 1000)


def test_a_tree_is_removed_and_what_links_point_to_stays(tmp_path):
    storage.write_bytes(str(tmp_path / "faces" / "split=train" / "part-0.parquet"), b"1")
    storage.write_bytes(str(tmp_path / "photos" / "1.jpg"), b"1")
    (tmp_path / "faces" / "link").symlink_to(tmp_path / "photos")
    storage.remove_tree(str(tmp_path / "faces"))
    assert paths(tmp_path) == ["photos/1.jpg"]
    storage.remove_tree(str(tmp_path / "faces"))


def test_json_comes_back_and_is_written_for_people(tmp_path):
    url = str(tmp_path / "model.json")
    content = {"name": "Zoë", "threshold": 0.5, "dims": [1, 2], "none": None}
    storage.write_json(url, content)
    assert storage.read_json(url) == content == json.loads((tmp_path / "model.json").read_text(encoding="utf-8"))
    assert "Zoë" in (tmp_path / "model.json").read_text(encoding="utf-8")
    storage.write_bytes(url, b'{"cut": ')
    with pytest.raises(UserError, match=r"model.json' is not JSON"):
        storage.read_json(url)


@pytest.fixture
def table() -> pa.Table:
    table = pa.table({"photo": [f"{i}.jpg" for i in range(1000)], "score": pa.array(range(1000), pa.float32())})
    return table.replace_schema_metadata({"fingerprint": "abc"})


def test_parquet_comes_back_whole_by_columns_and_by_row_groups(tmp_path, table):
    url = str(tmp_path / "split=train" / "part 0.parquet")
    storage.write_parquet(url, table, row_group_size=300, compression="zstd")
    assert storage.read_parquet(url).equals(table, check_metadata=True)
    assert storage.read_parquet(url, [table.schema.field("score")]).column_names == ["score"]
    assert storage.parquet_schema(url).equals(table.schema, check_metadata=True)
    assert pq.ParquetFile(url).metadata.row_group(0).column(0).compression == "ZSTD"
    with storage.open_parquet(url) as file:
        assert file.num_row_groups == 4
        assert file.read_row_group(3).equals(table.slice(900))


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "footer", "pages"])
def test_a_damaged_parquet_file_is_named_in_one_line(tmp_path, table, damage):
    path = tmp_path / "part.parquet"
    storage.write_parquet(str(path), table)
    data = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "cut": data[:-100],
            "text": b"hello" * 100,
            "footer": data[:-300] + bytes(292) + data[-8:],
            "pages": bytes(2000) + data[2000:],
        }[damage]
    )
    with pytest.raises(UserError, match=r"part.parquet' is no whole Parquet file: remove it"):
        storage.read_parquet(str(path))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_other_failures_of_a_disk_fail_the_job_in_one_line(number):
    with (
        pytest.raises(JobError, match=rf"cannot read '/data/x': {os.strerror(number)}"),
        storage.explained("/data/x", "read"),
    ):
        raise OSError(number, os.strerror(number))


def test_our_own_bugs_are_not_explained_away():
    with pytest.raises(ZeroDivisionError), storage.explained("/data/x", "read"):
        raise ZeroDivisionError
