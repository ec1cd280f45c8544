"""What leaves a faces table, and how: names, shards, tars and Parquet, without a cluster."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import UserError
from lib.faces import table
from lib.faces.export_formats import parquet_table, tar_bytes, write_folder
from lib.faces.export_names import MAX_BYTES, file_name, photo_file
from lib.faces.export_plan import FaceShard, FacesOut, Piece, plan_export
from lib.faces.table import read_success
from tests.training.learnable_faces import write_faces

NAMES = st.text(st.sampled_from('ab.~%/\\_ é\0:"2F"\udce9'), min_size=1, max_size=8).map(
    lambda text: text.replace("\udce9", "\\xe9")
)


@given(names=st.lists(NAMES | st.sampled_from(["..", ".", "con.", "train", "Test", "a/../b", "%2F", "/", "~"])))
@settings(max_examples=500, deadline=None)
def test_names_stay_in_their_folder_and_different_ones_different(names: list[str]) -> None:
    made = [file_name(name) for name in names]
    assert len(set(made)) == len(set(names))
    for each in made:
        assert each.isprintable()
        assert not set(each) & set('/\\\0:"')
        assert each[0] not in "._ "
        assert each[-1] not in ". "
        assert each.lower() not in ("train", "test")


@given(
    names=st.lists(NAMES | st.sampled_from(["a.jpg", "x/a.jpg", "x/a.png", "x/b/a.jpg", "a#1"]), unique=True),
    identity=st.sampled_from(["x", "y", "a/b"]),
)
@settings(max_examples=500, deadline=None)
def test_no_two_photos_of_a_person_have_one_file(names: list[str], identity: str) -> None:
    has_folders = any("/" in name for name in names)
    made = [photo_file(name, identity, has_folders=has_folders) for name in names]
    assert len(set(made)) == len(made)
    assert all(each.lower().endswith((".jpg", ".jpeg")) for each in made)


def test_usual_names_stay_as_they_are() -> None:
    assert photo_file("Ada Quill/shot 1.jpg", "Ada Quill", has_folders=True) == "shot 1.jpg"
    assert photo_file("000001.jpg", "2880", has_folders=False) == "000001.jpg"
    assert photo_file("sets/a/1.png", "a", has_folders=True) == "~sets%2Fa%2F1.png~.jpg"
    assert [file_name(name) for name in ("Zoë 李", "../up", "train", ".hidden")] == [
        "Zoë 李",
        "%2E.%2Fup",
        "%74rain",
        "%2Ehidden",
    ]
    long = [file_name("é" * 300 + end) for end in "ab"]
    assert len(set(long)) == 2
    assert max(len(name.encode()) for name in long) <= MAX_BYTES


def test_shards_are_cut_in_the_order_of_the_table_and_each_split_has_its_own(tmp_path: Path) -> None:
    url = write_faces(tmp_path / "faces", people={"train": 5, "val": 2, "test": 2}, photos=7)
    plan = plan_export(url, read_success(url), FacesOut(splits=("train", "val"), shard_faces=10), with_nobody=True)
    sizes = [(shard.split, shard.num_faces) for shard in plan.shards]
    assert sizes == [("train", 10), ("train", 10), ("train", 10), ("train", 5), ("val", 10), ("val", 4)]
    assert [shard.number for shard in plan.shards] == [0, 1, 2, 3, 0, 1]
    assert [piece.num for piece in plan.shards[1].pieces] == [7, 3]  # over the end of the first part
    assert plan.shards[1].pieces[1] == Piece("split=train/part-000001.parquet", 0, 3)
    assert (plan.num_faces, len(plan.identities), plan.has_folders, plan.left_out) == (49, 7, True, {})
    assert plan.identities == tuple(sorted(plan.identities))
    whole = plan_export(url, read_success(url), FacesOut(), with_nobody=True)
    assert [shard.num_faces for shard in whole.shards] == [35, 14, 14]


def test_only_aligned_faces_within_the_ranges_leave(tmp_path: Path) -> None:
    rows = [
        {"photo": "1.jpg", "identity": "a", "status": table.ALIGNED, "crop": b"1", "quality": 0.9},
        {"photo": "2.jpg", "identity": "a", "status": table.ALIGNED, "crop": b"2", "quality": 0.2},
        {"photo": "3.jpg", "identity": None, "status": table.ALIGNED, "crop": b"3", "quality": 0.9},
        {"photo": "4.jpg", "identity": "b", "status": table.CORRUPT},
    ]
    content = pa.Table.from_pylist(rows, schema=table.SCHEMA)
    folder = tmp_path / "faces" / "split=train"
    folder.mkdir(parents=True)
    pq.write_table(content, folder / "part-0.parquet")
    (tmp_path / "faces" / "_SUCCESS").write_text(json.dumps({"run_id": "1", "fingerprint": {}, "counts": {}}))
    url = str(tmp_path / "faces")

    def planned(out: FacesOut, *, with_nobody: bool) -> tuple[int, dict[str, int]]:
        plan = plan_export(url, read_success(url), out, with_nobody=with_nobody)
        return plan.num_faces, plan.left_out

    assert planned(FacesOut(), with_nobody=True) == (3, {"no_face": 1})
    assert planned(FacesOut(), with_nobody=False) == (2, {"no_face": 1, "no_identity": 1})
    assert planned(FacesOut(min_quality=0.5), with_nobody=False) == (
        1,
        {"no_face": 1, "not_within": 1, "no_identity": 1},
    )
    with pytest.raises(UserError, match="no face to export: widen --where"):
        planned(FacesOut(where="quality=0.95:"), with_nobody=True)
    with pytest.raises(UserError, match="no photo in split val"):
        planned(FacesOut(splits=("val",)), with_nobody=True)


FACES = pa.table(
    {
        "crop": pa.array([b"\xff\xd8 one", b"two"], pa.binary()),
        "photo": ["p é/1.jpg", "b.jpg#2"],
        "identity": pa.array(["p é", None], pa.string()),
        "score": pa.array([0.5, None], pa.float32()),
        "num_faces": pa.array([1, None], pa.int16()),
    }
)
KNOWN = pa.array(["a", "p é"])
SHARD = FaceShard(split="val", number=12, pieces=())


def test_a_tar_has_a_jpg_and_a_json_of_each_face_and_the_same_bytes_again() -> None:
    data = tar_bytes(FACES, KNOWN, SHARD)
    assert data == tar_bytes(FACES, KNOWN, SHARD)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        content = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    assert list(content) == ["0000120000.jpg", "0000120000.json", "0000120001.jpg", "0000120001.json"]
    assert [content[name] for name in list(content)[::2]] == [b"\xff\xd8 one", b"two"]
    assert json.loads(content["0000120000.json"]) == {
        "photo": "p é/1.jpg",
        "identity": "p é",
        "score": 0.5,
        "num_faces": 1,
        "label": 1,
        "split": "val",
        "key": "0000120000",
    }
    assert json.loads(content["0000120001.json"])["label"] == -1


def test_parquet_has_image_and_label_as_hugging_face_reads_them() -> None:
    made = parquet_table(FACES, KNOWN)
    assert made["image"].to_pylist()[0] == {"bytes": b"\xff\xd8 one", "path": "p é/1.jpg"}
    assert made["label"].to_pylist() == [1, -1]
    assert made["identity"].to_pylist() == ["p é", None]
    features = json.loads(made.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features.keys() == set(made.column_names)


def test_a_folder_has_the_photos_of_each_person(tmp_path: Path) -> None:
    faces = FACES.slice(0, 1)
    faces = pa.concat_tables([faces, faces.set_column(2, "identity", pa.array(["../../up"]))])
    write_folder(str(tmp_path / "out"), faces, has_folders=True)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "out/%2E.%2F..%2Fup/~p é%2F1.jpg",
        "out/p é/1.jpg",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"splits": ("dev",)}, "--splits is dev: allowed are train, val, test"),
        ({"shard_faces": 0}, "--shard-faces is 0: allowed are 1 to 10000"),
        ({"min_quality": 2.0}, "--min-quality is 2.0"),
        ({"where": "age=1:"}, "no such column"),
    ],
)
def test_flags_that_cannot_be(flags: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FacesOut(**flags)
