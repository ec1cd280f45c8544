"""`jobs/evaluate.py --pairs pairs_CPLFW.txt agedb_30_ann.txt` as a user runs it: lists over one faces table."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lib import storage
from lib.errors import UserError
from lib.evaluation.evaluate_job import EvaluateConfig, evaluate
from lib.recognition.embeddings_table import read_embeddings
from tests.evaluation.test_insightface_protocol import reference
from tests.job_runner import RayHead, run_here

NUM_EACH = 30


@pytest.fixture
def lists(aligned: list[dict], tmp_path: Path) -> dict[str, list[tuple[str, str, bool]]]:
    """Write two lists over the drawn people, and return the pairs of each by its URL."""
    same = [(a, b) for a, b in itertools.combinations(aligned, 2) if a["identity"] == b["identity"]]
    other = [(a, b) for a, b in itertools.combinations(aligned, 2) if a["identity"] != b["identity"]]
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(2):
        taken = [[kind[n] for n in rng.choice(len(kind), NUM_EACH, replace=False)] for kind in (same, other)]
        rows = [
            (pair, is_same)
            for both in zip(*taken, strict=True)
            for pair, is_same in zip(both, (True, False), strict=True)
        ]
        drawn.append([(a["photo"], b["photo"], is_same) for (a, b), is_same in rows])
    two_lines = [f"{name} {int(is_same)}" for a, b, is_same in drawn[0] for name in (a, b)]
    (tmp_path / "pairs_CPLFW.txt").write_text("\n".join(two_lines))
    (tmp_path / "agedb_30_ann.txt").write_text("\n".join(f"{int(is_same)} {a} {b}" for a, b, is_same in drawn[1]))
    return dict(zip((str(tmp_path / name) for name in ("pairs_CPLFW.txt", "agedb_30_ann.txt")), drawn, strict=True))


def test_lists_over_crops_in_parquet_give_the_table_of_papers(
    connected_head: RayHead, model_url: str, aligned: list[dict], lists: dict[str, list], tmp_path: Path
) -> None:
    columns = {"image": [row["crop"] for row in aligned], "photo": [row["photo"] for row in aligned]}
    people = [row["identity"] for row in aligned]
    crops = tmp_path / "crops é.parquet"
    pq.write_table(pa.table({**columns, "identity": people}), crops, row_group_size=20)
    done = run_here(
        "evaluate.py",
        *("--model", model_url, "--photos", str(crops), "--aligned", "eyes"),
        *("--output", str(tmp_path / "out"), "--gpus", "0"),
        *("--protocol", "insightface", "--pairs", *lists),
    )
    assert done.status == 0, done.errors
    metrics = storage.read_json(str(tmp_path / "out" / "metrics.json"))
    (model,) = metrics["models"]
    made = read_embeddings(str(tmp_path / "out" / "embeddings" / "a run é0"))
    assert set(made.photos) == {name for rows in lists.values() for a, b, _ in rows for name in (a, b)}
    assert model["flip"]
    assert made.model["flip"]
    vector_of = dict(zip(made.photos, made.embeddings_ND.astype(np.float64), strict=True))
    for figures, name, rows in zip(model["sets"], ("CPLFW", "agedb_30"), lists.values(), strict=True):
        assert figures["name"] == name
        assert figures["num_pairs"] == 2 * NUM_EACH
        vectors_ND = np.stack([vector_of[photo] for a, b, _ in rows for photo in (a, b)])
        expected = reference(vectors_ND, [is_same for _, _, is_same in rows])
        if name == "agedb_30":  # its folds are the order of the file
            assert (figures["accuracy"], figures["accuracy_std"]) == pytest.approx(expected, abs=1e-9)
        assert f"{100 * figures['accuracy']:.2f}" in done.errors
    assert metrics["accuracy"] == done.result["accuracy"] == np.mean([one["accuracy"] for one in model["sets"]])
    assert done.result["sets"] == {one["name"]: one["accuracy"] for one in model["sets"]}
    page = (tmp_path / "out" / "report.html").read_text()
    for shown in ("CPLFW", "agedb_30", "mean", "10 folds in file order"):
        assert shown in page


@pytest.mark.slow
def test_lists_over_raw_photos_have_intervals_in_our_protocol(
    connected_head: RayHead,
    model_url: str,
    faces_rows: list[dict],
    lists: dict[str, list],
    sample_data: Path,
    tmp_path: Path,
) -> None:
    urls = list(lists)
    no_face = next(row["photo"] for row in faces_rows if row["status"] == "no_face")
    first = lists[urls[0]][0][0]
    Path(urls[0]).write_text(f"{Path(urls[0]).read_text()}\n{no_face} 0\n{first} 0\n{first} 0\ngone.jpg 0\n")
    config = EvaluateConfig(
        model=(model_url,), photos=str(sample_data / "photos"), pairs=tuple(urls), output=str(tmp_path / "out"), gpus=0
    )
    planned = evaluate(EvaluateConfig(**{**vars(config), "dry_run": True}))
    assert planned["num_pairs"] == 4 * NUM_EACH + 1
    result = evaluate(config)
    metrics = storage.read_json(str(tmp_path / "out" / "metrics.json"))
    first_set, second_set = metrics["models"][0]["sets"]
    for figures in (first_set, second_set):
        low, high = figures["intervals"]["accuracy"]
        assert low <= figures["accuracy"] <= high
    assert (first_set["num_failed_images"], first_set["num_failed_pairs"]) == (1, 1)
    assert second_set["num_failed_pairs"] == 0
    assert any("CPLFW: 1 of 62 pairs name photos that are not there" in note for note in metrics["notes"])
    assert any("1 photos have no embedding (1 no_face)" in note for note in metrics["notes"])
    assert result["photos"] == len({name for rows in lists.values() for a, b, _ in rows for name in (a, b)} | {no_face})


def refused(**settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        evaluate(EvaluateConfig(**settings))
    return str(caught.value)


def test_bad_input_is_refused_in_one_line(
    model_url: str, faces_url: str, lists: dict[str, list], tmp_path: Path
) -> None:
    use = {"model": (model_url,), "faces": faces_url, "output": str(tmp_path / "out"), "gpus": 0}
    urls = tuple(lists)
    few = tmp_path / "few.txt"
    few.write_text("\n".join(Path(urls[1]).read_text().splitlines()[:6]))
    assert "lists of pairs only, or verification sets" in refused(**use, pairs=(urls[0], "lfw.bin"))
    assert "few: there are 6 pairs" in refused(**use, pairs=(str(few),), protocol="insightface")
    assert "two lists that are called 'few'" in refused(**use, pairs=(str(few), str(few)))
    assert "--slices is for one list of pairs" in refused(**use, pairs=urls, slices="/s")
    assert "--at-far is for one list of pairs" in refused(**use, pairs=urls[:1], protocol="insightface", at_far=0.1)
    assert "--protocol insightface is for --pairs and --ijb" in refused(**use, protocol="insightface")
    assert not (tmp_path / "out").exists()
