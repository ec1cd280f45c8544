"""RecordIO files written by hand from the description of the format, in the layouts of InsightFace and im2rec."""

import random
import struct
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from lib.errors import UserError
from lib.faces import table
from lib.faces.sources import recordio
from lib.faces.sources.opening import open_source
from lib.faces.sources.source import SCAN_SCHEMA, Source

MAGIC = struct.pack("<I", 0xCED7230A)


def framed(data: bytes) -> bytes:
    """Return a record as dmlc-core writes it: cut where the magic stands at a multiple of four bytes."""
    pieces = [b""]
    for start in range(0, len(data), 4):
        word = data[start : start + 4]
        if word == MAGIC:
            pieces.append(b"")
        else:
            pieces[-1] += word
    frames = b""
    for number, piece in enumerate(pieces):
        cflag = 0 if len(pieces) == 1 else 1 if number == 0 else 3 if number == len(pieces) - 1 else 2
        frames += MAGIC + struct.pack("<I", cflag << 29 | len(piece)) + piece + bytes(-len(piece) % 4)
    return frames


def packed(image: bytes, labels: Sequence[float], key: int) -> bytes:
    if len(labels) == 1:
        return struct.pack("<IfQQ", 0, labels[0], key, 0) + image
    return struct.pack("<IfQQ", len(labels), 0.0, key, 0) + struct.pack(f"<{len(labels)}f", *labels) + image


def images(num: int) -> list[bytes]:
    draw = random.Random(7)
    made = [draw.randbytes(draw.randint(1, 200)) for _ in range(num)]
    made[1] = b"abcd" + MAGIC + b"efg"  # at a multiple of four bytes of the data
    made[2] = MAGIC + MAGIC + b"x" + MAGIC
    return made


def insightface(path: Path, photos: list[bytes], classes: list[float], *, index: bool = True) -> None:
    """Images, then key 0, then a record for each person, as InsightFace writes them."""
    people = sorted(set(classes))
    records = [
        (key, packed(photo, [label, 1.0], key))
        for key, (photo, label) in enumerate(zip(photos, classes, strict=True), 1)
    ]
    end = len(photos) + 1
    records.append((0, packed(b"", [end, end + len(people)], 0)))
    records += [(end + n, packed(b"", [0.0, 0.0], end + n)) for n in range(len(people))]
    write(path, records, index=index)


def im2rec(path: Path, photos: list[bytes], classes: list[float], *, index: bool = True) -> None:
    records = [
        (key, packed(photo, [label], key)) for key, (photo, label) in enumerate(zip(photos, classes, strict=True))
    ]
    write(path, records, index=index)


def write(path: Path, records: list[tuple[int, bytes]], *, index: bool) -> None:
    data, lines = b"", []
    for key, record in records:
        lines.append(f"{key}\t{len(data)}\n")
        data += framed(record)
    path.write_bytes(data)
    if index:
        path.with_suffix(".idx").write_text("".join(lines))


def scanned(source: Source) -> pa.Table:
    return pa.Table.from_batches([batch for shard in source.shards() for batch in source.scan(shard)], SCAN_SCHEMA)


def read(source: Source) -> list[tuple[str | None, bytes | str]]:
    rows = scanned(source).to_pylist()
    return [(row["identity"], data) for row, data in source.read(rows, num_ahead=4)]  # type: ignore[index]


@pytest.mark.parametrize("layout", [insightface, im2rec])
@pytest.mark.parametrize("index", [True, False])
def test_every_image_of_both_layouts_is_read_whole(tmp_path, layout, index):
    photos = images(20)
    layout(tmp_path / "train.rec", photos, [float(n // 3) for n in range(20)], index=index)
    source = open_source(str(tmp_path))
    assert source.format == "rec"
    assert read(source) == [(str(n // 3), photo) for n, photo in enumerate(photos)]
    num_without = 1 + 7 if layout is insightface else 0
    assert source.passed_over["records without an image"] == num_without


def test_ranges_of_any_size_find_each_record_once(tmp_path, monkeypatch):
    photos = images(40)
    insightface(tmp_path / "train.rec", photos, [float(n) for n in range(40)])
    whole = scanned(open_source(str(tmp_path)))
    for size in (4, 20, 100, 1000):
        monkeypatch.setattr(recordio, "SHARD_BYTES", size)
        assert scanned(open_source(str(tmp_path))).equals(whole), size


def test_labels_over_two_to_the_24th_are_whole_numbers(tmp_path, caplog):
    im2rec(tmp_path / "a.rec", images(3), [2.0**24 + 2, 3e7, float("nan")])
    source = open_source(str(tmp_path / "a.rec"))
    assert scanned(source)["identity"].to_pylist() == ["16777218", "30000000", None]
    assert source.passed_over["labels that are no numbers"] == 1
    assert "a.rec: 1 labels are no numbers: their photos are of nobody known" in caplog.text


@pytest.mark.parametrize("index", [True, False])
def test_of_a_truncated_file_whole_records_are_rows_and_the_rest_is_counted(tmp_path, index, caplog):
    photos = images(20)
    im2rec(tmp_path / "a.rec", photos, [float(n) for n in range(20)], index=index)
    offsets = scanned(open_source(str(tmp_path)))["row"].to_pylist()
    data = (tmp_path / "a.rec").read_bytes()
    (tmp_path / "a.rec").write_bytes(data[: offsets[15] + 9])
    source = open_source(str(tmp_path))
    assert [image for _, image in read(source)] == photos[:15]
    assert source.passed_over["records cut off"] == (5 if index else 1)
    assert "cut off" in caplog.text


def test_a_file_without_the_magic_is_refused(tmp_path):
    (tmp_path / "a.rec").write_bytes(b"no magic here" * 9)
    with pytest.raises(UserError, match=r"a\.rec is no RecordIO file"):
        scanned(open_source(str(tmp_path)))


def test_a_file_beside_the_records_is_named_for_what_it_is(tmp_path):
    im2rec(tmp_path / "it's a.rec", images(3), [0.0] * 3)
    with pytest.raises(UserError, match=r"it's a\.idx is a file, and not one that holds photos by its name \(\.rec, "):
        open_source(str(tmp_path / "it's a.idx"))


def test_the_index_of_another_file_is_refused(tmp_path):
    im2rec(tmp_path / "a.rec", images(20), [0.0] * 20)
    (tmp_path / "a.idx").write_text("".join(f"{n}\t{n * 61}\n" for n in range(1, 30)))
    with pytest.raises(UserError, match=r"a\.idx is the index of another file: no record of .*a\.rec begins at \d+"):
        open_source(str(tmp_path)).shards()
    (tmp_path / "a.idx").write_text("this is\tno index\n")
    with pytest.raises(UserError, match=r"a\.idx is no index of a RecordIO file"):
        open_source(str(tmp_path)).shards()


@pytest.mark.parametrize("place", [0, 4, 5, 7])
def test_a_damaged_frame_costs_its_own_record(tmp_path, place):
    photos = images(20)
    im2rec(tmp_path / "a.rec", photos, [float(n) for n in range(20)], index=False)
    offsets = scanned(open_source(str(tmp_path)))["row"].to_pylist()
    data = bytearray((tmp_path / "a.rec").read_bytes())
    data[offsets[10] + place] ^= 0x55
    (tmp_path / "a.rec").write_bytes(data)
    source = open_source(str(tmp_path))
    found = [image for _, image in read(source)]
    # A length that is too short leaves the beginning of the image, which is found corrupt when it is decoded.
    assert [image for image in found if image in photos] == photos[:10] + photos[11:]
    assert all(photos[10].startswith(bytes(image)) for image in found if image not in photos)
    assert source.passed_over["damaged records"] == 1


def test_a_record_that_is_gone_since_the_scan_is_corrupt(tmp_path):
    im2rec(tmp_path / "a.rec", images(5), [0.0] * 5)
    source = open_source(str(tmp_path))
    rows = scanned(source).to_pylist()
    (tmp_path / "a.rec").write_bytes((tmp_path / "a.rec").read_bytes()[:60])
    assert [data for _, data in source.read(rows, num_ahead=1)][-1] == table.CORRUPT


def in_a_run(source: Source, rows: pa.Table) -> dict[int, bytes]:
    """Return the images that are read at once, by their rows."""
    run = source.read_run(rows["source"][0].as_py(), rows)
    if run is None:
        return {}
    places = enumerate(zip(run.start_N.tolist(), run.stop_N.tolist(), strict=True))
    return {n: run.data_B[start:stop].tobytes() for n, (start, stop) in places if start >= 0}


@pytest.mark.parametrize("layout", [insightface, im2rec])
def test_images_read_at_once_are_those_read_one_by_one(tmp_path, layout):
    photos = images(40)
    layout(tmp_path / "a.rec", photos, [float(n) for n in range(40)])
    source = open_source(str(tmp_path))
    rows = scanned(source)
    assert in_a_run(source, rows) == {n: photo for n, photo in enumerate(photos) if n not in (1, 2)}  # these are cut
    some = rows.take([3, 4, 6, 7, 8, 9, 39])
    assert in_a_run(source, rows.slice(3, 9)) == dict(enumerate(photos[3:12]))
    assert in_a_run(source, some) in ({}, {n: photos[k] for n, k in enumerate([3, 4, 6, 7, 8, 9, 39])})


def test_what_changed_since_the_scan_is_not_read_at_once_as_something_else(tmp_path):
    photos = images(40)
    im2rec(tmp_path / "a.rec", photos, [float(n) for n in range(40)], index=False)
    source = open_source(str(tmp_path))
    rows = scanned(source)
    whole = (tmp_path / "a.rec").read_bytes()
    draw = random.Random(11)
    for _ in range(200):
        data = bytearray(whole)
        for place in rows["row"].to_pylist():
            if draw.random() < 0.1:
                data[place + draw.randrange(36)] ^= 1 << draw.randrange(8)
        (tmp_path / "a.rec").write_bytes(data[: draw.choice([len(data), draw.randrange(len(data))])])
        one_by_one = [data for _, data in source.read(rows.to_pylist(), num_ahead=1)]
        for n, image in in_a_run(source, rows).items():
            assert image == one_by_one[n]


def test_random_damage_ends_in_rows_or_one_line(tmp_path):
    draw = random.Random(3)
    insightface(tmp_path / "a.rec", images(30), [float(n // 2) for n in range(30)], index=False)
    whole = (tmp_path / "a.rec").read_bytes()
    lines: list[str] = []
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        (tmp_path / "a.rec").write_bytes(data[: draw.randint(1, len(data))])
        try:
            rows = read(open_source(str(tmp_path)))
        except UserError as refused:
            lines.append(str(refused))
        else:
            assert len(rows) <= 31
    assert all("\n" not in line for line in lines)
