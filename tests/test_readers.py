"""Files of the right name and the wrong content: whoever reads one says in one line which it is and what to do."""

import json
import os
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import parts, storage
from lib.errors import UserError
from lib.evaluation.findings import read_slices
from lib.evaluation.pair_files import read_pairs
from lib.faces import table
from lib.recognition import embeddings_table
from lib.recognition.model import ModelSpec
from lib.training.early_end import read_outcome
from lib.training.face_names import read_identities
from lib.training.history import read_rows
from lib.tuning.compare_job import read_run, trial_urls
from lib.tuning.winner import train_defaults

PLAN = {"job": "x", "fingerprint": {"id": "1"}}
SUCCESS = {"run_id": "1", "fingerprint": {"image_size": 112}, "parts": {}, "counts": {}}
RESULTS = {"winner": "one", "init": "auto"}
SETTINGS = {"fingerprint": {"id": "1"}, "lr": 0.1, "head": "", "loss": "softmax"}

READERS = {
    "plan": ("_plan.json", {"run_id": "1", **PLAN}, lambda url: settle(url)),
    "success": ("_SUCCESS", SUCCESS, lambda url: parts.read_success(url, what="faces", job="jobs/preprocess.py")),
    "crop size": ("_SUCCESS", SUCCESS, lambda url: table.crop_size(table.read_success(url))),
    "model": (
        "model.json",
        ModelSpec().to_json(),
        lambda url: ModelSpec.from_json(storage.read_json(f"{url}/model.json")),
    ),
    "run": ("config.json", SETTINGS, read_run),
    "outcome": ("outcome.json", {"ending": "failed", "reason": "x"}, read_outcome),
    "sweep": ("sweep.json", {"runs": ["one"], **PLAN}, trial_urls),
    "winner": ("results.json", RESULTS, lambda url: train_defaults(["--from-sweep", url])),
    "winner's settings": ("runs/one/config.json", SETTINGS, lambda url: train_defaults(["--from-sweep", url])),
}

OTHERS = [None, True, -1, 1e308, "", "é", [], [None], {}, {"a": 1}]


def settle(url):
    return parts.settle(url, PLAN, flag="--x", overwrite=False)


def mutations(content):
    """Yield files that hold something else than `content`, as people, programs and disks leave them."""
    text = json.dumps(content).encode()
    yield from (text[:7], b"", b"\xff\xfe" + text, b"\x00" * 20, b"[" * 100_000, text.replace(b'"', b"'"))
    yield from (json.dumps(other).encode() for other in OTHERS)
    rng = random.Random(1)
    for name in content:
        yield json.dumps({key: value for key, value in content.items() if key != name}).encode()
        yield from (json.dumps({**content, name: other}).encode() for other in rng.sample(OTHERS, 6))


@pytest.mark.parametrize("reader", READERS)
def test_json_of_another_shape_is_refused_in_one_line(reader, tmp_path):
    name, content, read = READERS[reader]
    storage.write_json(storage.join(str(tmp_path), "results.json"), RESULTS)
    num_refused = 0
    for mutation in mutations(content):
        storage.write_bytes(storage.join(str(tmp_path), name), mutation)
        try:
            read(str(tmp_path))
        except UserError as error:
            num_refused += "\n" not in str(error)
    assert num_refused >= 14


def part(**changed):
    row = {"photo": "a.jpg", "identity": "a", "status": "aligned", "crop": b"x", "box": [0.0] * 4}
    return table.faces_table([row] * 50, "{}") if not changed else other_part(changed)


def other_part(changed):
    made = part()
    for name, column in changed.items():
        place = made.schema.names.index(name)
        made = made.remove_column(place) if column is None else made.set_column(place, name, pa.array([column] * 50))
    return made


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"identity": None}, r"has no column identity of type string"),
        ({"status": 3}, r"has no column status of type string, it has .*status \(int64\)"),
        ({"identity": [["a"]]}, r"has no column identity of type string"),
    ],
)
def test_a_part_of_other_columns_is_refused(changed, said, tmp_path):
    url = str(tmp_path)
    storage.write_json(f"{url}/_SUCCESS", {name: value for name, value in SUCCESS.items() if name != "parts"})
    storage.write_parquet(f"{url}/split=train/part-000000.parquet", part(**changed))
    with pytest.raises(UserError, match=said + ".*run the job that made it again"):
        read_identities(url, ["train"])


def test_a_crop_that_is_no_bytes_is_refused(tmp_path):
    url = str(tmp_path / "part.parquet")
    storage.write_parquet(url, part(crop="x"))
    with pytest.raises(UserError, match=r"no column crop of type binary, it has .*crop \(string\)"):
        storage.read_parquet(url, table.columns("crop"))


def test_damage_that_only_shows_while_reading_is_told_of(tmp_path):
    path = tmp_path / "part.parquet"
    pq.write_table(pa.table({"photo": np.random.default_rng(0).bytes(9000).hex().split("0")}), path, compression=None)
    data = bytearray(path.read_bytes())
    data[4:40] = os.urandom(36)
    path.write_bytes(data)
    with (
        pytest.raises(UserError, match=r"is no whole Parquet file"),
        storage.open_parquet(str(path)) as file,
    ):
        list(file.iter_batches())


def test_embeddings_of_another_model_in_one_part_are_refused(tmp_path):
    url = str(tmp_path)
    storage.write_json(f"{url}/_SUCCESS", {name: value for name, value in SUCCESS.items() if name != "parts"})
    for number, dim in enumerate((2, 3)):
        about = json.dumps({"digest": "1", "embedding_dim": dim, "template": []})
        rows = [{"photo": "a", "status": "aligned", "embedding": [1.0] * dim}]
        made = pa.Table.from_pylist(rows, schema=embeddings_table.schema(dim, "{}", about))
        storage.write_parquet(f"{url}/split=test/part-{number:06d}.parquet", made)
    with pytest.raises(UserError, match=r"part-000001.parquet was made by another model than the other parts"):
        embeddings_table.read_embeddings(url)


def test_a_history_without_epochs_is_refused(tmp_path):
    for column in ({"epoch": ["x"]}, {"steps": [1]}):
        storage.write_parquet(f"{tmp_path}/history.parquet", pa.table(column))
        with pytest.raises(UserError, match=r"has no column epoch of type int64"):
            read_rows(str(tmp_path))


@pytest.mark.parametrize(
    "content", [b"photo_a,photo_b,same\n\xff.jpg,b,1\n", b"photo_a,photo_b,same,\xe9\na,b,1,2\n", b"\xff\xfe\x00,"]
)
@pytest.mark.parametrize("read", [read_pairs, read_slices])
def test_a_table_that_is_not_utf8_is_refused(content, read, tmp_path):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be read as"):
        read(str(tmp_path / "x.csv"), ["a", "b"])


@pytest.mark.parametrize("read", [storage.read_bytes, storage.read_json, storage.read_parquet])
def test_a_pipe_is_refused_and_not_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe' is a pipe or a device: write its content into a file"):
        read(str(tmp_path / "pipe"))
