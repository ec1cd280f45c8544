"""Arrow and Parquet files as Hugging Face writes them, and lists of photos."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib.errors import UserError
from lib.faces import table
from lib.faces.sources.opening import open_source
from lib.faces.sources.patterns import expanded, split_pattern
from lib.faces.sources.source import Source

FEATURES = {
    "photo of a face": {"_type": "Image"},
    "label": {"names": ["Ada", "Zoë"], "_type": "ClassLabel"},
}
ROWS = [(b"0", 1), (b"1", 0), (b"2", 1), (None, 0), (b"4", -1), (b"5", None)]
PEOPLE = ["Zoë", "Ada", "Zoë", "Ada", None, None]


def hugging_face() -> pa.Table:
    images = [None if data is None else {"bytes": data, "path": f"{n}.jpg"} for n, (data, _) in enumerate(ROWS)]
    schema = pa.schema(
        [("photo of a face", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={b"huggingface": json.dumps({"info": {"features": FEATURES}}).encode()},
    )
    return pa.table({"photo of a face": images, "label": [label for _, label in ROWS]}, schema=schema)


def scanned(source: Source) -> list[dict[str, Any]]:
    return [row for shard in source.shards() for batch in source.scan(shard) for row in batch.to_pylist()]


def save_to_disk(folder: Path) -> Path:
    folder.mkdir()
    path = folder / "data-00000-of-00001.arrow"
    with pa.ipc.new_stream(path, hugging_face().schema) as writer:
        writer.write_table(hugging_face(), max_chunksize=4)
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    (folder / "state.json").write_text("{}")
    return path


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_classes_have_their_names(tmp_path, kind):
    if kind == "arrow":
        save_to_disk(tmp_path / "set")
    else:
        (tmp_path / "set").mkdir()
        pq.write_table(hugging_face(), tmp_path / "set" / "train.parquet", row_group_size=4)
    source = open_source(str(tmp_path / "set"), identities_required=True)
    assert source.format == kind
    rows = scanned(source)
    assert [row["identity"] for row in rows] == PEOPLE
    wanted = [table.MISSING if data is None else data for data, _ in ROWS]
    assert [data for _, data in source.read(rows, num_ahead=1)] == wanted
    assert [data for _, data in source.read(rows[4:], num_ahead=1)] == wanted[4:]


def test_an_arrow_file_that_is_cut_off_keeps_the_batches_before(tmp_path, caplog):
    path = save_to_disk(tmp_path / "set")
    data = path.read_bytes()
    path.write_bytes(data[:-200])
    assert len(scanned(open_source(str(path)))) == 4
    assert "is cut off or damaged" in caplog.text
    path.write_bytes(b"no arrow file at all")
    with pytest.raises(UserError, match="is no whole Arrow stream"):
        scanned(open_source(str(path)))


def test_random_damage_of_an_arrow_file_ends_in_rows_or_one_line(tmp_path):
    """Arrow itself ends the process at some of these, such as a message that says it is of another kind."""
    draw = random.Random(8)
    path = save_to_disk(tmp_path / "it's a set")
    whole = path.read_bytes()
    lines: list[str] = []
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 1, 2, 8])):
            # The descriptions of the columns are a small part of a file of photos.
            place = draw.randrange(600 if draw.random() < 0.6 else len(data))
            data[place] = draw.choice([draw.randrange(256), 0xFF, 0, data[place] ^ 1 << draw.randrange(8)])
        path.write_bytes(data[: draw.randint(1, len(data))] if draw.random() < 0.2 else data)
        source = open_source(str(path))
        try:
            rows = scanned(source)
            assert all(isinstance(data, bytes) or data == table.MISSING for _, data in source.read(rows, num_ahead=1))
        except UserError as refused:
            lines.append(str(refused))
    assert lines
    assert all("\n" not in line and "it's a set" in line for line in lines)


def test_a_message_of_another_kind_is_no_schema(tmp_path):
    path = save_to_disk(tmp_path / "set")
    data = bytearray(path.read_bytes())
    schema = pa.ipc.read_message(pa.BufferReader(data))
    start = data.index(schema.serialize().to_pybytes()[8:])
    kinds = [n for n in range(start, start + 40) if data[n] == 1]  # the kind of a schema
    for place in kinds:
        for kind in (0, 2, 3, 4, 200):
            path.write_bytes(data[:place] + bytes([kind]) + data[place + 1 :])
            with pytest.raises(UserError, match="is no whole Arrow stream"):
                scanned(open_source(str(path)))


def test_lists_of_both_layouts(tmp_path):
    for name in ("a b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    lists = {
        "im2rec.lst": "1\t7.000000\ta b.jpg\n2\t8.000000\tc.jpg\n3\t8.0\tgone.jpg\n",
        "insightface.lst": f"1\ta b.jpg\t7\n1\t{tmp_path}/c.jpg\t8\t1\t2\t3\t4\n0\tgone.jpg\t8\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        source = open_source(str(tmp_path / name))
        assert source.format == "lst"
        rows = scanned(source)
        people = {row["photo"]: row["identity"] for row in rows}
        assert people == {"a b.jpg": "7", "c.jpg": "8", "gone.jpg": "8"}
        assert [data for _, data in source.read(rows, num_ahead=2)] == [b"a b.jpg", b"c.jpg", table.MISSING]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1\t7\t../../etc/passwd", r"line 2 \(\.\./\.\./etc/passwd\) leads out of the folder of the list"),
        ("1\t/elsewhere/x.jpg\t7", r"line 2 \(/elsewhere/x\.jpg\) leads out"),
        ("a line without tabs", r"line 2 is neither `index, label, path` nor"),
    ],
)
def test_a_list_that_cannot_be_used_names_the_line(tmp_path, line, message):
    (tmp_path / "a.lst").write_text(f"0\t1\ta.jpg\n{line}\n")
    with pytest.raises(UserError, match=message):
        scanned(open_source(str(tmp_path / "a.lst")))


def test_labels_of_a_list_that_are_no_numbers_are_names(tmp_path, caplog):
    (tmp_path / "a.lst").write_text("1\ta.jpg\tAda\n1\tb.jpg\tnan\n")
    assert [row["identity"] for row in scanned(open_source(str(tmp_path / "a.lst")))] == ["Ada", None]
    assert r"1 labels are no numbers, such as line 1 (Ada)" in caplog.text


def test_patterns():
    assert split_pattern("s3://b/x/{08..11}/a-{a,b}.tar") == (
        "s3://b/x",
        tuple(f"{n:02d}/a-{letter}.tar" for n in range(8, 12) for letter in "ab"),
    )
    assert split_pattern("/a/{one}/b") == ("/a/{one}/b", ())
    assert split_pattern("/a/*.tar") == ("/a", ("*.tar",))
    assert expanded("{3..1}") == ["3", "2", "1"]
    with pytest.raises(UserError, match="at most"):
        expanded("{0..999999999}")
