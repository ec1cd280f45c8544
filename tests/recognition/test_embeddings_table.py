"""The embeddings table read back, and what is none."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lib import storage
from lib.errors import UserError
from lib.recognition.embeddings_table import MODEL_KEY, read_embeddings, schema


def written(folder: Path, rows: dict[str, list[dict]]) -> str:
    parts = schema(3, json.dumps({"id": "f"}), json.dumps({"digest": "d", "embedding_dim": 3, "template": "eyes"}))
    for name, content in rows.items():
        storage.write_parquet(str(folder / name), pa.Table.from_pylist(content, schema=parts))
    storage.write_json(str(folder / "_SUCCESS"), {"run_id": "1", "fingerprint": {}, "counts": {}})
    return str(folder)


def test_rows_come_back_with_their_splits_and_zeros_where_there_is_none(tmp_path: Path) -> None:
    aligned = {"photo": "é 1.jpg", "identity": "a", "status": "aligned", "box": [1, 2, 3, 4], "embedding": [1, 2, 3]}
    failed = {"photo": "b.jpg", "identity": None, "status": "no_face"}
    url = written(
        tmp_path / "e", {"split=test/part-000000.parquet": [failed], "split=val/part-000001.parquet": [aligned, failed]}
    )
    made = read_embeddings(url)
    assert made.photos == ["b.jpg", "é 1.jpg", "b.jpg"]
    assert made.identities == [None, "a", None]
    assert made.splits == ["test", "val", "val"]
    assert made.failed_N.tolist() == [True, False, True]
    assert made.embeddings_ND.tolist() == [[0, 0, 0], [1, 2, 3], [0, 0, 0]]
    assert made.boxes_N4[1].tolist() == [1, 2, 3, 4]
    assert made.embeddings_ND.dtype == np.float32
    assert (made.model["digest"], made.fingerprint) == ("d", {"id": "f"})
    assert read_embeddings(url, ["split=val/part-000001.parquet"]).photos == ["é 1.jpg", "b.jpg"]


def test_an_embedding_that_is_not_finite_is_told(tmp_path: Path) -> None:
    row = {"photo": "a", "status": "aligned", "box": [1, 2, 3, 4]}
    rows = [{**row, "embedding": [1, float(value), 3]} for value in ("nan", "inf", "2")]
    with pytest.raises(UserError, match=r"2 of 3 embeddings in .* hold NaN or infinity"):
        read_embeddings(written(tmp_path / "e", {"split=test/part-000000.parquet": rows}))


@pytest.mark.parametrize("about", ["{", "[]", "{}", json.dumps({"digest": "d", "embedding_dim": 4}), '{"digest": 1}'])
def test_metadata_that_do_not_fit_are_told(tmp_path: Path, about: str) -> None:
    url = written(tmp_path / "e", {"split=test/part-000000.parquet": [{"photo": "a", "status": "no_face"}]})
    part = storage.read_parquet(f"{url}/split=test/part-000000.parquet")
    metadata = {**part.schema.metadata, MODEL_KEY: about.encode()}
    storage.write_parquet(f"{url}/split=test/part-000000.parquet", part.replace_schema_metadata(metadata))
    with pytest.raises(UserError, match="is no embeddings table"):
        read_embeddings(url)


def test_what_is_no_embeddings_table_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no finished embeddings at .*jobs/embed\.py"):
        read_embeddings(str(tmp_path))
    storage.write_json(str(tmp_path / "_SUCCESS"), {"run_id": "1", "fingerprint": {}, "counts": {}})
    with pytest.raises(UserError, match="holds no embeddings"):
        read_embeddings(str(tmp_path))
    storage.write_parquet(str(tmp_path / "split=test" / "part-000000.parquet"), pa.table({"photo": ["a"]}))
    with pytest.raises(UserError, match="is no embeddings table, its columns are photo"):
        read_embeddings(str(tmp_path))
