"""Crops that are aligned already: taken byte for byte where nothing changes."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest

from lib.errors import UserError
from lib.faces import table
from lib.faces.aligned import AlignedCrops, aligned_tables
from lib.faces.alignment import Alignment, alignment_matrix
from lib.faces.extraction import fingerprint, fingerprint_differences, settings_from_fingerprint
from lib.faces.jpeg_sides import jpeg_side
from lib.faces.manifest import read_manifest
from lib.faces.part_plan import plan_parts
from lib.faces.photo_flags import PhotoFlags
from lib.faces.photo_parts import part_item
from lib.faces.preprocess_config import PreprocessConfig
from lib.faces.preprocess_worker import PartWorker
from lib.faces.sources.opening import open_source
from tests.faces.sources.test_recordio import insightface


def picture(width: int, height: int, suffix: str = ".jpg") -> bytes:
    pixels = np.random.default_rng(width * height).integers(0, 255, (height, width, 3), np.uint8)
    return cv2.imencode(suffix, cv2.GaussianBlur(pixels, (0, 0), 3))[1].tobytes()


def how(template: str = "arcface-112", size: int = 112, *, verify: bool = False) -> AlignedCrops:
    kind = "arcface-112" if template == "arcface-112" else "eyes"
    return AlignedCrops(template=template, alignment=Alignment(image_size=size, template=kind), verify=verify)


def tables(folder: Path, crops: AlignedCrops) -> pa.Table:
    source = open_source(str(folder))
    manifest = read_manifest(source, None, split_seed=0, identities_required=True)
    plan = plan_parts(manifest, "content")
    parts = [part_item(plan, part) for part in plan.parts]
    return pa.concat_tables(made for part in parts for made, _ in aligned_tables(source, part, crops, 100).values())


def test_a_record_of_insightface_is_copied_byte_for_byte(tmp_path):
    photos = [picture(112, 112)[:-2] + bytes([n]) + b"\xff\xd9" for n in range(30)]
    photos[3] = photos[3][:700]  # breaks off
    photos[4] = b"no picture"
    insightface(tmp_path / "train.rec", photos, [float(n // 3) for n in range(30)])
    rows = sorted(tables(tmp_path, how()).to_pylist(), key=lambda row: int(row["photo"].split("#")[1]))
    assert [row["identity"] for row in rows] == [str(n // 3) for n in range(30)]
    assert [row["status"] for row in rows] == [table.CORRUPT if n in (3, 4) else table.ALIGNED for n in range(30)]
    assert all(row["crop"] == photo for row, photo in zip(rows, photos, strict=True) if row["status"] == table.ALIGNED)
    assert rows[4]["reason"]
    assert rows[0]["box"] == [0, 0, 112, 112]
    # The landmarks are where the template has them: the crop is its own alignment.
    matrix = alignment_matrix(np.zeros(4), np.reshape(rows[0]["landmarks"], (5, 2)), how().alignment)
    assert np.allclose(matrix, [[1, 0, 0], [0, 1, 0]], atol=1e-5)


@pytest.mark.parametrize("template", ["arcface-112", "eyes", "none"])
def test_other_sizes_and_formats_are_brought_to_the_size(tmp_path, template):
    (tmp_path / "p").mkdir()
    for name, data in {
        "a.png": picture(112, 112, ".png"),
        "b.jpg": picture(200, 200),
        "c.jpg": picture(112, 80),
        "d.jpg": picture(112, 112),
    }.items():
        (tmp_path / "p" / name).write_bytes(data)
    rows = {row["photo"]: row for row in tables(tmp_path, how(template)).to_pylist()}
    for name in ("p/a.png", "p/b.jpg", "p/d.jpg"):
        assert rows[name]["status"] == table.ALIGNED
        assert jpeg_side(rows[name]["crop"]) == 112
    assert rows["p/d.jpg"]["crop"] == picture(112, 112)
    if template == "none":
        assert jpeg_side(rows["p/c.jpg"]["crop"]) == 112
    else:
        assert rows["p/c.jpg"]["status"] == table.IMPLAUSIBLE
        assert rows["p/c.jpg"]["reason"] == "112x80 pixels: an aligned crop is square"


def test_verify_finds_what_copying_does_not(tmp_path):
    (tmp_path / "p").mkdir()
    data = picture(112, 112)
    (tmp_path / "p" / "a.jpg").write_bytes(data)
    table_at = data.index(b"\xff\xc4") + 5
    broken = data[:table_at] + b"\xff" * 16 + data[table_at + 16 :]  # no Huffman table
    (tmp_path / "p" / "b.jpg").write_bytes(broken)
    assert tables(tmp_path, how())["status"].to_pylist() == [table.ALIGNED] * 2
    rows = {row["photo"]: row["status"] for row in tables(tmp_path, how(verify=True)).to_pylist()}
    assert rows == {"p/a.jpg": table.ALIGNED, "p/b.jpg": table.CORRUPT}


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8\xff", picture(112, 112)[:-1], picture(112, 80), picture(9, 9, ".png")]
)
def test_what_is_no_square_jpeg_has_no_side(data):
    assert jpeg_side(data) is None


def test_new_photos_are_aligned_to_the_template_of_the_fingerprint() -> None:
    made = how().fingerprint()
    settings = settings_from_fingerprint(made)
    assert settings.alignment == how().alignment
    assert fingerprint_differences(fingerprint(settings), made) == []
    other = fingerprint(settings_from_fingerprint({}))
    assert fingerprint_differences(other, made) == [
        "image_size: 240 here, 112 there",
        "template: None here, arcface-112 there",
    ]
    assert len({how(name).fingerprint()["id"] for name in ("arcface-112", "eyes", "none")}) == 3


def test_raw_photos_can_be_aligned_to_the_template_of_published_models() -> None:
    alignment = PreprocessConfig(template="arcface-112").settings().alignment
    assert (alignment.template, alignment.image_size) == ("arcface-112", 112)
    assert PreprocessConfig(template="arcface-112", image_size=224).settings().alignment.image_size == 224
    assert PreprocessConfig().settings().alignment == Alignment()
    settings = settings_from_fingerprint(PreprocessConfig(template="arcface-112").fingerprint())
    assert settings.alignment == alignment


def test_the_job_writes_the_parts(tmp_path):
    insightface(tmp_path / "train.rec", [picture(112, 112)] * 40, [float(n // 2) for n in range(40)])
    reading = PhotoFlags(aligned="arcface-112")
    config = PreprocessConfig(data=str(tmp_path / "d"), photos=str(tmp_path / "train.rec"), reading=reading)
    source = config.source()
    manifest = read_manifest(source, None, split_seed=0, identities_required=True)
    worker: Any = PartWorker(config, source, config.fingerprint(), 1, False)
    plan = plan_parts(manifest, config.content())
    done = [worker(part_item(plan, part)) for part in plan.parts]
    assert sum(each["count"] for each in done) == 40
    assert not any(each["failure"] for each in done)
    files = list(Path(config.faces_url).rglob("*.parquet"))
    read = [pa.parquet.read_table(path, partitioning=None) for path in files]
    assert sum(len(each) for each in read) == 40
    assert json.loads(read[0].schema.metadata[table.FINGERPRINT_KEY])["aligned"] == "arcface-112"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"aligned": "mtcnn"}, "--aligned is 'mtcnn': allowed are arcface-112, eyes, none"),
        ({"aligned": "eyes", "faces_policy": "all"}, "leave --faces-policy out"),
        ({"verify": True}, "--verify is for --aligned"),
        ({"template": "mtcnn"}, "--template is 'mtcnn': allowed are eyes, arcface-112"),
        ({"template": "arcface-112", "aligned": "none"}, "leave --template out"),
    ],
)
def test_flags_that_cannot_be(flags, message):
    reading = {name: value for name, value in flags.items() if name in ("aligned", "verify")}
    others = {name: value for name, value in flags.items() if name not in reading}
    with pytest.raises(UserError, match=message):
        PreprocessConfig(reading=PhotoFlags(**reading), **others)
