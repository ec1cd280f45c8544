"""Each kind of file is left without the targets, and without nothing else."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.csv_text import csv_bytes
from lib.forgetting.kinds import (
    csv_without,
    json_without,
    kind_of,
    list_without,
    names_on_page,
    parquet_without,
)
from lib.forgetting.targets import of_names

TARGETS = of_names(["p/1.jpg", "=x.jpg", "set#5"], ["12", "Ann 'A'"])


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def test_rows_go_by_photo_face_identity_and_lists_of_photos() -> None:
    table = pa.table(
        {
            "photo_a": ["p/1.jpg", "p/1.jpg#3", "p/10.jpg", "set#5", "set#55", "set#6", None],
            "identity_b": [None, "1", "12", "1", "12345", "1", "2"],
            "photos": pa.array([["q"], [], ["q"], None, ["q"], ["q", "p/1.jpg"], []], pa.list_(pa.string())),
            "status": ["12"] * 7,
        }
    )
    content, num = parquet_without(parquet(table), TARGETS)
    kept = pq.read_table(io.BytesIO(content))
    assert num == 5
    assert kept.equals(table.take([4, 6]))
    assert pq.ParquetFile(io.BytesIO(content)).metadata.row_group(0).column(0).compression == "ZSTD"


def test_a_file_without_targets_stays_byte_for_byte() -> None:
    data = parquet(pa.table({"photo": ["other"]}))
    assert parquet_without(data, TARGETS) == (data, 0)
    for without in (csv_without, list_without):
        assert without(b"photo,identity\nother,1\r\n", TARGETS) == (b"photo,identity\nother,1\r\n", 0)
    assert json_without(b'{"a": ["other"]}', TARGETS) == (b'{"a": ["other"]}', 0)


def test_spreadsheets_lose_rows_with_names_made_harmless_too() -> None:
    rows = [["=x.jpg", "1"], ["fine, really.jpg", "7"], ["b.jpg", "12"], ["12", "1"]]
    content, num = csv_without(csv_bytes(["photo", "other_identity"], rows), TARGETS)
    assert (content, num) == (csv_bytes(["photo", "other_identity"], [rows[1], rows[3]]), 2)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"p/1.jpg 3\r\nb.jpg 12\r\nc.jpg 4\r\n", b"c.jpg 4\r\n"),
        (b"photo,identity\n./p/1.jpg,3\nc.jpg,Ann 'A'\nd.jpg,\n", b"photo,identity\nd.jpg,\n"),
        (b"p\\1.jpg\tx\n\nc.jpg\ty", b"\nc.jpg\ty"),
        ("\ufeffb.jpg;12\nç d.jpg;13\n".encode(), "ç d.jpg;13\n".encode()),
    ],
)
def test_lists_lose_lines_and_keep_the_others_byte_for_byte(before: bytes, after: bytes) -> None:
    assert list_without(before, TARGETS)[0] == after


def test_figures_lose_entries_and_names_within_texts() -> None:
    content = {"failed": ["p/1.jpg", "q.jpg"], "notes": ["such as p/1.jpg, xp/1.jpg"], "rows": [{"identity": "12"}, 3]}
    data, num = json_without(json.dumps(content).encode(), TARGETS)
    expected = {"failed": ["q.jpg"], "notes": ["such as (forgotten), xp/1.jpg"], "rows": [{}, 3]}
    assert (json.loads(data), num) == (expected, 3)


@pytest.mark.parametrize("page", ["<b>o'x.jpg</b>", "<b>o&#39;x.jpg</b>", '{"photo": "\\u00e9.jpg"}'])
def test_pages_are_searched_for_names_as_html_and_json_write_them(page: str) -> None:
    assert names_on_page(page.encode(), of_names(["o'x.jpg", "é.jpg"], []))[1] == 1
    assert names_on_page(page.encode(), TARGETS)[1] == 0


def test_with_very_many_photos_every_page_counts() -> None:
    many = of_names(map(str, range(1001)), [])
    assert names_on_page(b"nothing", many)[1] == 1


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("runs/a/usage.parquet", "rows"),
        ("runs/a/checkpoints/identities.parquet", "rows"),
        ("report/suspects.csv", "spreadsheet"),
        ("curation/identities-before.csv", "list of identities"),
        ("matches/matches-00012.parquet", "matches"),
        ("matches/matches-00012.csv", "spreadsheet"),
        ("identities.txt", "list of identities"),
        ("runs/a/report/report.html", "page"),
        ("photos.parquet", None),
        ("mine/faces.jpg", None),
    ],
)
def test_outputs_have_a_kind_and_files_of_users_none(path: str, what: str | None) -> None:
    kind = kind_of(path)
    assert (kind and kind.what) == what
