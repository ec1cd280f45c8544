"""The search of a gallery in pieces, against one search of all vectors, and galleries that cannot be searched."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import storage
from lib.errors import JobError, UserError
from lib.nearest import nearest
from lib.recognition import gallery_search, identify_job
from lib.recognition.embeddings_table import schema
from lib.recognition.gallery import known_people, runs_of
from lib.recognition.gallery_search import SearchWorker, left_to_search, planned_search
from lib.recognition.match_worker import MatchPlan, MatchWorker, left_to_write
from lib.recognition.matches import first_faces
from tests.job_runner import ROOT, mounted

DIM = 6
MODEL = {"digest": "d", "embedding_dim": DIM, "template": "eyes"}
EMBEDDER = SimpleNamespace(flip=False, digest="d", url="the model")


def row(photo: str, identity: str | None, vector_D: np.ndarray | None) -> dict[str, Any]:
    status = "no_face" if vector_D is None else "aligned"
    return {"photo": photo, "identity": identity, "status": status, "box": [1, 2, 3, 4], "embedding": vector_D}


def written(folder: Path, parts: list[list[dict[str, Any]]], model: dict[str, Any] = MODEL, run_id: str = "1") -> str:
    for number, rows in enumerate(parts):
        made = pa.Table.from_pylist(rows, schema=schema(DIM, "{}", json.dumps(model)))
        storage.write_parquet(str(folder / f"split=test/part-{number:04d}-{'0' * 12}.parquet"), made)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*.parquet")}
    success = {"run_id": run_id, "fingerprint": {}, "counts": {}, "parts": sizes}
    storage.write_json(str(folder / "_SUCCESS"), success)
    return str(folder)


@pytest.fixture
def tables(tmp_path: Path) -> tuple[str, str]:
    """Return a gallery of seven parts and probes in five, with doubles, and with rows without a face or a name."""
    rng = np.random.default_rng(0)
    known, probes = ([rng.standard_normal(DIM).astype(np.float32) for _ in range(num)] for num in (60, 40))
    for double in range(20, 60, 5):
        known[double] = known[3]  # the same photo under other names
    probes[5] = known[3]
    rows = [row(f"é {n}.jpg", f"person {n % 9}", vector) for n, vector in enumerate(known)]
    rows[10]["identity"] = None
    rows[11] = row("é 11.jpg", "person 2", None)
    asked = [row(f"p {n}.jpg", f"person {n % 12}", vector) for n, vector in enumerate(probes)]
    asked[17] = row("p 17.jpg", "person 5", None)
    asked[18]["identity"] = None
    gallery = written(tmp_path / "gallery é", [rows[n : n + 9] for n in range(0, 60, 9)])
    return gallery, written(tmp_path / "probes é", [asked[n : n + 8] for n in range(0, 40, 8)])


def planned(tables: tuple[str, str], output: Path, top: int = 4, threshold: float = 1.5) -> MatchPlan:
    search = planned_search(known_people(tables[0], EMBEDDER), tables[1], str(output), top, [str(threshold)])
    return MatchPlan(search=search, output=str(output), threshold=threshold, with_names=True, several=False)


def matched(plan: MatchPlan) -> list[dict[str, Any]]:
    """Search and write all that is left, and return the rows of all groups."""
    worker, writer = SearchWorker(plan.search), MatchWorker(plan)
    for piece in left_to_search(plan.search):
        worker.search(piece)
    for group in left_to_write(plan):
        writer.write({"group": group})
    names = [plan.file_name(group, "parquet") for group in range(len(plan.search.groups))]
    return [each for name in names for each in pq.read_table(Path(plan.output, name)).to_pylist()]


@pytest.mark.parametrize(("shard_faces", "group_rows", "num_pieces"), [(1 << 18, 1 << 15, 1), (20, 16, 12), (1, 1, 35)])
def test_matches_are_those_of_one_search_however_it_is_cut(
    tables: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shard_faces: int,
    group_rows: int,
    num_pieces: int,
) -> None:
    monkeypatch.setattr(gallery_search, "SHARD_FACES", shard_faces)
    monkeypatch.setattr(gallery_search, "GROUP_ROWS", group_rows)
    plan = planned(tables, tmp_path / "out é")
    assert len(left_to_search(plan.search)) == num_pieces
    rows = matched(plan)

    known, asked = (
        [each for path in sorted(Path(url).rglob("*.parquet")) for each in pq.ParquetFile(path).read().to_pylist()]
        for url in tables
    )
    known = [each for each in known if each["embedding"] and each["identity"]]
    index_BK, distance_BK = nearest(
        np.array([each["embedding"] for each in asked if each["embedding"]], np.float32),
        np.array([each["embedding"] for each in known], np.float32),
        4,
    )
    found = iter(zip(index_BK, distance_BK, strict=True))
    expected: list[dict[str, Any]] = []
    for probe in asked:
        if not probe["embedding"]:
            expected.append(dict.fromkeys(rows[0]) | {"photo": probe["photo"], "status": "no_face"})
            continue
        index_K, distance_K = next(found)
        decision = known[index_K[0]]["identity"] if distance_K[0] <= 1.5 else "unknown"
        for rank, (g, distance) in enumerate(zip(index_K, distance_K, strict=True), 1):
            match = {"rank": rank, "identity": known[g]["identity"], "gallery_photo": known[g]["photo"]}
            said = {"photo": probe["photo"], "status": "aligned", "decision": decision, "distance": distance}
            expected.append({**said, **match, "x0": 1.0, "y0": 2.0, "x1": 3.0, "y1": 4.0})
    assert rows == expected
    assert [each["gallery_photo"] for each in rows if each["photo"] == "p 5.jpg"] == [
        f"é {n}.jpg" for n in (3, 20, 25, 30)
    ]

    counts = [storage.read_json(plan.counts_url(group)) for group in range(len(plan.search.groups))]
    named = pa.concat_tables([storage.read_parquet(plan.named_url(group)) for group in range(len(counts))])
    is_right = [
        probe["identity"] == next((each["identity"] for each in rows if each["photo"] == probe["photo"]), None)
        for probe in asked
        if probe["identity"]
    ]
    assert (named["person"].to_numpy() == named["nearest"].to_numpy()).tolist() == is_right
    assert np.isinf(named["distance"].to_numpy()).sum() == 1
    assert sum(each["photos_without_name"] for each in counts) == 1
    assert sum(each["faces"] for each in counts) == 39


def test_a_search_goes_on_with_what_is_missing_and_leaves_nothing_of_an_earlier_one(
    tables: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery_search, "SHARD_FACES", 20)
    monkeypatch.setattr(gallery_search, "GROUP_ROWS", 16)
    output = tmp_path / "out"
    for name in ("matches.parquet", "matches.csv", "matches-00009.csv", "matches-mine.csv"):
        storage.write_bytes(str(output / name), b"earlier")
    whole = matched(planned(tables, output))
    assert sorted(path.name for path in output.glob("m*.csv")) == [
        *(f"matches-0000{n}.csv" for n in range(3)),
        "matches-mine.csv",
    ]
    assert not (output / "matches.parquet").exists()

    plan = planned(tables, output)
    assert (left_to_search(plan.search), left_to_write(plan)) == ([], [])
    storage.remove(plan.search.piece_url(1, 2))
    storage.remove(plan.counts_url(1))
    assert left_to_search(plan.search) == [{"group": 1, "shard": 2}]
    assert left_to_write(plan) == [1]
    assert not (output / "matches-00001.parquet").exists()
    assert matched(plan) == whole

    assert len(left_to_search(planned(tables, output, top=2).search)) == 12
    success = storage.read_json(f"{tables[0]}/_SUCCESS")
    storage.write_json(f"{tables[0]}/_SUCCESS", {**success, "run_id": "2"})  # the gallery was made again
    assert len(left_to_search(planned(tables, output).search)) == 12


def test_photos_without_any_face_have_rows_and_no_matches(tables: tuple[str, str], tmp_path: Path) -> None:
    nobody = written(tmp_path / "nobody", [[row("a", "A", None)], [row("b", None, None)]])
    plan = planned((tables[0], nobody), tmp_path / "out")
    rows = matched(plan)
    assert [(each["photo"], each["status"], each["decision"]) for each in rows] == [
        ("a", "no_face", None),
        ("b", "no_face", None),
    ]
    assert len(first_faces(pq.read_table(tmp_path / "out" / "matches.parquet"), 40)) == 0
    assert storage.read_json(plan.counts_url(0))["faces"] == 0


def test_the_first_faces_are_shown_with_all_their_matches(tables: tuple[str, str], tmp_path: Path) -> None:
    matched(planned(tables, tmp_path))
    rows = pq.read_table(tmp_path / "matches.parquet")
    assert first_faces(rows, 18)["photo"].unique().to_pylist() == [f"p {n}.jpg" for n in range(19) if n != 17]
    assert len(first_faces(rows, 18)) == 18 * 4


def test_only_the_groups_that_are_left_are_searched(
    tables: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found for a group may be gone once its matches are written."""
    plan = planned(tables, tmp_path / "out")
    whole = matched(plan)
    storage.remove(plan.search.piece_url(0, 0))
    monkeypatch.setattr(SearchWorker, "search", lambda *_: pytest.fail("it is searched again"))
    identify_job.search_and_write(plan)
    assert pq.read_table(tmp_path / "out" / "matches.parquet").to_pylist() == whole


def test_what_a_search_meets_is_told_in_one_line(tables: tuple[str, str], tmp_path: Path) -> None:
    plan = planned(tables, tmp_path / "out")

    def refused(kind: type[Exception]) -> str:
        with pytest.raises(kind) as caught:
            SearchWorker(plan.search).search({"group": 0, "shard": 0})
        assert "\n" not in str(caught.value)
        return str(caught.value)

    part = Path(tables[0], plan.search.gallery_parts[2])
    rows = pq.ParquetFile(part).read().to_pylist()
    part.unlink()
    assert "another job made a new version of the gallery" in refused(JobError)
    for model, embedding, said in (
        ({**MODEL, "digest": "other"}, rows[0]["embedding"], "was made by another model than the other parts"),
        (MODEL, [np.nan] * DIM, "1 of 9 embeddings in .* hold NaN or infinity"),
        (MODEL, None, "1 aligned faces of .* have no embedding"),
    ):
        made = [{**rows[0], "embedding": embedding}, *rows[1:]]
        storage.write_parquet(str(part), pa.Table.from_pylist(made, schema=schema(DIM, "{}", json.dumps(model))))
        with pytest.raises(UserError, match=said):
            SearchWorker(plan.search).search({"group": 0, "shard": 0})


def test_galleries_that_cannot_be_searched_are_told(tmp_path: Path) -> None:
    nobody = written(tmp_path / "nobody", [[row("a", None, np.zeros(DIM)), row("b", "B", None)]])
    with pytest.raises(UserError, match="is empty: none of its 2 rows has both a face and an identity"):
        known_people(nobody, EMBEDDER)
    one = written(tmp_path / "one", [[row("a", "A", np.zeros(DIM))], [row("b", "B", np.ones(DIM))]])
    assert len(known_people(one, EMBEDDER)) == 2
    with pytest.raises(UserError, match="was made by another model than the model"):
        known_people(one, SimpleNamespace(flip=False, digest="other", url="the model"))
    (tmp_path / "one" / "split=test" / f"part-0001-{'0' * 12}.parquet").unlink()
    with pytest.raises(UserError, match=r"1 of the 2 parts of .*/one are gone"):
        known_people(one, EMBEDDER)


def test_people_are_counted_by_name_not_by_photo(tables: tuple[str, str]) -> None:
    gallery = known_people(tables[0], EMBEDDER)
    assert (len(gallery), len(gallery.people)) == (58, 9)


def test_a_full_disk_is_told_and_the_search_goes_on_when_there_is_room(tables: tuple[str, str], tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=64k") as disk:
        (disk / "ballast").write_bytes(bytes(64 * 1024))
        plan = planned(tables, disk / "out")
        with pytest.raises(JobError, match="free space in that folder, and run the same command again"):
            SearchWorker(plan.search).search({"group": 0, "shard": 0})
        (disk / "ballast").unlink()
        assert left_to_search(plan.search) == [{"group": 0, "shard": 0}]
        assert len(matched(plan)) == 4 * 39 + 1


@pytest.mark.parametrize(("most", "runs"), [(5, [(0, 2), (2, 3), (3, 5)]), (1, [(n, n + 1) for n in range(5)])])
def test_runs_hold_whole_parts(most: int, runs: list[tuple[int, int]]) -> None:
    assert runs_of([2, 3, 9, 0, 4], most) == runs


KILLED = """
import sys
from pathlib import Path
from lib.recognition import gallery_search
from tests.recognition.test_gallery import SearchWorker, left_to_search, planned
gallery_search.SHARD_FACES = gallery_search.GROUP_ROWS = 1
plan = planned((sys.argv[1], sys.argv[2]), Path(sys.argv[3]))
worker = SearchWorker(plan.search)
for piece in left_to_search(plan.search):
    worker.search(piece)
    print("done", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on_and_finds_the_same(
    tables: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gallery_search, "SHARD_FACES", 1)
    monkeypatch.setattr(gallery_search, "GROUP_ROWS", 1)
    whole = matched(planned(tables, tmp_path / "whole"))
    command = [sys.executable, "-c", KILLED, *tables, str(tmp_path / "killed")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == "done\n"
            process.stdin.write("\n")
            process.stdin.flush()
        process.kill()
    plan = planned(tables, tmp_path / "killed")
    assert len(left_to_search(plan.search)) in (31, 32)
    assert matched(plan) == whole
