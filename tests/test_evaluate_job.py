"""`jobs/evaluate.py` as a user runs it: from faces and from photos, made and given pairs, one model and two."""

import csv
import dataclasses
import itertools
import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from lib import storage
from lib.errors import UserError
from lib.evaluation.evaluate_job import EvaluateConfig, evaluate
from lib.evaluation.metrics import verification_figures
from lib.evaluation.pair_files import read_pairs
from lib.evaluation.pairs import made_pairs
from lib.recognition.embeddings_table import read_embeddings
from lib.recognition.model import load_model, save_model
from tests.job_runner import Finished, RayHead, run_job
from tests.recognition.test_onnx_model import onnx_file

SHARED_FIGURES = ("accuracy", "accuracy_std", "auc", "eer", "num_pairs")


def made_run(model_url: str, folder: Path) -> Path:
    """Make a run whose model has the threshold of its training alone, and a short history."""
    shutil.copytree(model_url, folder / "model")
    spec = json.loads((folder / "model" / "model.json").read_text())
    (folder / "model" / "model.json").write_text(json.dumps({**spec, "threshold": 0.1, "metrics": {"split": "val"}}))
    history = {"epoch": [1, 2], "train_loss": [0.5, 0.4], "val_accuracy": [0.6, None], "notes": ["", ""]}
    storage.write_parquet(str(folder / "history.parquet"), pa.table(history))
    return folder


@pytest.fixture
def run(model_url: str, tmp_path: Path) -> Path:
    """Return a run of its own."""
    return made_run(model_url, tmp_path / "runs" / "first é")


@pytest.fixture(scope="module")
def evaluated(
    connected_head: RayHead,
    model_url: str,
    faces_url: str,
    faces_rows: list[dict],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, EvaluateConfig, Finished]:
    """Return a run, what was evaluated of it, and what the job said."""
    data = tmp_path_factory.mktemp("evaluated é")
    run = made_run(model_url, data / "runs" / "first é")
    groups = [f"{row['photo']},{'odd' if int(row['identity']) % 2 else 'even'}" for row in faces_rows]
    (data / "slices.csv").write_text("\n".join(["photo,attribute", *groups]))
    flags = ["--faces", faces_url, "--split", "all", "--num-pairs", "300", "--slices", str(data / "slices.csv")]
    flags += ["--whole-split"]
    done = run_job("evaluate.py", "--data", str(data), *flags, extra=connected_head.environment)
    assert done.status == 0, done.errors
    return run, EvaluateConfig(data=str(data), faces=faces_url, split="all", num_pairs=300, whole_split=True), done


def test_a_run_gets_its_report(evaluated: tuple[Path, EvaluateConfig, Finished], aligned: list[dict]) -> None:
    run, _, done = evaluated
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    assert {name: done.result[name] for name in SHARED_FIGURES} == {name: metrics[name] for name in SHARED_FIGURES}
    assert done.result["report"] == str(run / "report" / "report.html")
    page = (run / "report" / "report.html").read_text()
    for shown in (
        "first é",
        'alt="Training: loss"',
        'alt="Training: verification"',
        str(run / "model"),
        "made, seed 0",
    ):
        assert shown in page

    (model,) = metrics["models"]
    assert model["num_failed_pairs"] == 0
    assert any("are in no pair (" in note and "corrupt" in note for note in metrics["notes"])
    assert {row["attribute"] for row in model["slices"]} == {"even", "odd"}
    with (run / "report" / "suspects.csv").open() as file:
        assert all(row["kind"] in ("duplicate", "wrong_label") for row in csv.DictReader(file))


def test_the_originals_protocol_is_of_all_pairs_of_each_person(
    evaluated: tuple[Path, EvaluateConfig, Finished], aligned: list[dict]
) -> None:
    metrics = json.loads((evaluated[0] / "report" / "metrics.json").read_text())
    table = metrics["models"][0]["original"]["at_tolerance"]
    photos_of = Counter(row["identity"] for row in aligned)
    num_same = sum(len(list(itertools.combinations(range(num), 2))) for num in photos_of.values())
    assert table["processed_rows"] == 2 * num_same
    assert table["tolerance"] == 0.1  # what the model came with
    made = read_embeddings(str(evaluated[0] / "report" / "embeddings" / "first é"))
    vector_of = dict(zip(made.photos, made.embeddings_ND, strict=True))
    distances = [
        np.linalg.norm(vector_of[a["photo"]] - vector_of[b["photo"]])
        for a, b in itertools.combinations(aligned, 2)
        if a["identity"] == b["identity"]
    ]
    assert table["mean_distance_same"] == pytest.approx(np.mean(distances), rel=1e-5)
    assert table["false_negatives"] == np.count_nonzero(np.array(distances) > 0.1)


def test_only_photos_in_pairs_are_embedded_and_the_pairs_have_the_same_figures(
    evaluated: tuple[Path, EvaluateConfig, Finished], tmp_path: Path, aligned: list[dict]
) -> None:
    run, config, _ = evaluated
    whole = read_embeddings(str(run / "report" / "embeddings" / "first é"))
    config = dataclasses.replace(config, model=(str(run),), output=str(tmp_path), num_pairs=20, whole_split=False)
    few = evaluate(config)
    made = read_embeddings(str(tmp_path / "embeddings" / "first é"))
    pairs = made_pairs(
        [row["photo"] for row in aligned], [row["identity"] for row in aligned], num_pairs=20, seed=config.seed
    )
    paired = {aligned[n]["photo"] for n in [*pairs.a_P, *pairs.b_P]}
    assert set(made.photos) == paired
    assert len(paired) == few["photos"] < len(aligned)
    place = {photo: n for n, photo in enumerate(whole.photos)}
    vectors_ND = np.stack([whole.embeddings_ND[place[row["photo"]]] for row in aligned])
    expected = verification_figures(np.linalg.norm(vectors_ND[pairs.a_P] - vectors_ND[pairs.b_P], axis=1), pairs)
    found = json.loads((tmp_path / "metrics.json").read_text())["models"][0]
    for name in ("accuracy", "auc", "eer"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6)


def test_the_first_evaluation_chooses_the_threshold_and_later_ones_leave_it(
    evaluated: tuple[Path, EvaluateConfig, Finished], caplog: pytest.LogCaptureFixture
) -> None:
    run, config, done = evaluated
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    spec = load_model(str(run / "model")).spec
    assert spec.threshold == done.result["threshold"] == metrics["models"][0]["threshold"]
    assert spec.metrics == {name: metrics[name] for name in SHARED_FIGURES}
    assert done.result["threshold_kept"]
    assert f"{spec.threshold:.4g}" in (run / "model" / "README.md").read_text()

    with caplog.at_level(logging.INFO):
        again = evaluate(dataclasses.replace(config, seed=5))
    assert "is complete: nothing to do" in caplog.text
    assert not again["threshold_kept"]
    assert load_model(str(run / "model")).spec.threshold == spec.threshold


def test_an_operating_point_is_kept_in_the_model_with_its_figures(
    evaluated: tuple[Path, EvaluateConfig, Finished], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "runs" / "first é"
    shutil.copytree(evaluated[0], run)
    config = dataclasses.replace(evaluated[1], data=str(tmp_path), at_far=0.1)
    left = evaluate(config)
    assert left["operating_point"]["at_far"] == 0.1
    assert not left["threshold_kept"]
    assert "keeps the threshold that it has: --keep-threshold replaces it" in caplog.text
    kept = evaluate(dataclasses.replace(config, keep_threshold=True))
    spec = load_model(str(run / "model")).spec
    assert spec.threshold == kept["threshold"] == kept["operating_point"]["threshold"]
    assert spec.metrics["operating_point"] == kept["operating_point"]
    assert "chosen for a FAR of 0.1" in (run / "model" / "README.md").read_text()
    assert "Threshold chosen by --at-far" in (run / "report" / "report.html").read_text()


@pytest.mark.slow
def test_mirror_images_go_into_the_model_with_their_threshold_only_where_that_is_asked(
    evaluated: tuple[Path, EvaluateConfig, Finished], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "runs" / "first é"
    made_run(str(evaluated[0] / "model"), run)
    before = (run / "model" / "model.json").read_bytes()
    config = dataclasses.replace(evaluated[1], data=str(tmp_path), flip=True)
    left = evaluate(config)
    assert not left["threshold_kept"]
    assert "without mirror images: --keep-threshold keeps --flip and its threshold" in caplog.text
    assert (run / "model" / "model.json").read_bytes() == before
    (flipped,) = storage.read_json(str(run / "report" / "metrics.json"))["models"]
    (plain,) = storage.read_json(str(evaluated[0] / "report" / "metrics.json"))["models"]
    assert (flipped["flip"], plain["flip"]) == (True, False)
    assert flipped["digest"] != plain["digest"]
    assert flipped["original_table"] != plain["original_table"]

    kept = evaluate(dataclasses.replace(config, keep_threshold=True))
    spec = load_model(str(run / "model")).spec
    assert kept["threshold_kept"]
    assert (spec.flip, spec.threshold) == (True, kept["threshold"])
    assert read_embeddings(str(run / "report" / "embeddings" / "first é")).model["flip"]
    again = evaluate(dataclasses.replace(config, flip=False))  # the model says so now
    assert (again["threshold"], again["accuracy"]) == (kept["threshold"], kept["accuracy"])
    off = evaluate(dataclasses.replace(config, flip=False, no_flip=True, keep_threshold=True))
    assert off["threshold_kept"]
    assert not load_model(str(run / "model")).spec.flip


def test_a_model_that_cannot_be_written_to_is_measured_all_the_same(
    evaluated: tuple[Path, EvaluateConfig, Finished], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(evaluated[0], tmp_path / "runs" / "first é")
    card = tmp_path / "runs" / "first é" / "model" / "README.md"
    card.unlink()
    card.mkdir()  # no file can take its place
    result = evaluate(dataclasses.replace(evaluated[1], data=str(tmp_path), keep_threshold=True, seed=1))
    assert not result["threshold_kept"]
    assert "into the model: cannot write" in caplog.text
    assert storage.read_json(str(tmp_path / "runs" / "first é" / "report" / "metrics.json"))["seed"] == 1


@pytest.mark.slow
def test_two_models_are_measured_on_given_pairs_of_raw_photos_in_a_bucket(
    connected_head: RayHead, s3_bucket: str, run: Path, sample_data: Path, faces_rows: list[dict], tmp_path: Path
) -> None:
    there = [row for row in faces_rows if row["status"] == "aligned"][:30]
    there += [row for row in faces_rows if row["status"] in ("no_face", "corrupt")][:4]
    people = {row["photo"]: row["identity"] for row in there}
    for name in people:
        storage.write_bytes(f"{s3_bucket}/photos/{name}", (sample_data / "photos" / name).read_bytes())
    rng = np.random.default_rng(0)
    drawn = rng.permutation(list(itertools.combinations(people, 2)))[:120].tolist()
    content = {"photo_a": [a for a, _ in drawn], "photo_b": [b for _, b in drawn], "fold": [n % 3 for n in range(120)]}
    content["same"] = [people[a] == people[b] for a, b in drawn]
    content = {name: [*values, {"photo_b": "gone.jpg"}.get(name, values[0])] for name, values in content.items()}
    pairs_url = str(tmp_path / "pairs é.parquet")
    storage.write_parquet(pairs_url, pa.table(content))
    onnx_url = onnx_file(tmp_path / "public.onnx")
    config = EvaluateConfig(
        data=s3_bucket,
        photos=f"{s3_bucket}/photos",
        pairs=(pairs_url,),
        model=(str(run), onnx_url),
        output=f"{s3_bucket}/out ü",
    )
    result = evaluate(config)
    metrics = storage.read_json(f"{s3_bucket}/out ü/metrics.json")
    assert [model["name"] for model in metrics["models"]] == ["first é", "public"]
    assert metrics["models"][0]["num_missing_pairs"] == 1
    assert len(metrics["models"][0]["fold_accuracies"]) == 3
    assert metrics["num_pairs"] == result["num_pairs"] == 120
    assert any("gone.jpg" in note for note in metrics["notes"])
    assert set(metrics["difference"]) == {"accuracy", "std"}
    assert storage.read_bytes(f"{s3_bucket}/out ü/report.html").count(b"public") > 3

    for model in metrics["models"]:
        made = read_embeddings(f"{s3_bucket}/out ü/embeddings/{model['name']}")
        pairs = read_pairs(pairs_url, made.photos)
        distances_P = np.linalg.norm(made.embeddings_ND[pairs.a_P] - made.embeddings_ND[pairs.b_P], axis=1)
        failed_P = made.failed_N[pairs.a_P] | made.failed_N[pairs.b_P]
        distances_P[failed_P] = np.where(pairs.same_P[failed_P], np.inf, -np.inf)
        expected = verification_figures(distances_P, pairs)
        for name in ("accuracy", "auc", "eer"):
            assert model[name] == pytest.approx(expected[name], abs=1e-6)
        assert model["num_failed_pairs"] == failed_P.sum() > 0
        assert sum(model["failed_photos"].values()) == len(model["failed_photo_names"]) > 0
        assert any("have no embedding" in note for note in metrics["notes"])


@pytest.mark.real_photos
def test_lfw_is_evaluated_by_its_own_pairs(
    connected_head: RayHead, run: Path, real_photos: Path, tmp_path: Path
) -> None:
    lines = (real_photos / "lfw" / "pairs.txt").read_text().splitlines()
    num_each = int(lines[0].split()[1])
    taken = [line for fold in range(2) for kind in range(2) for line in lines[1 + (2 * fold + kind) * num_each :][:25]]
    (tmp_path / "pairs.txt").write_text("\n".join(["2\t25", *taken]))
    photos = str(real_photos / "lfw" / "photos")
    evaluate(EvaluateConfig(model=(str(run),), photos=photos, pairs=(str(tmp_path / "pairs.txt"),)))
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    assert metrics["num_pairs"] == 100
    assert metrics["models"][0]["num_missing_pairs"] == 0
    assert len(metrics["models"][0]["fold_accuracies"]) == 2
    assert metrics["models"][0]["num_failed_pairs"] <= 1
    assert 0.4 < metrics["accuracy"] < 0.9  # random weights


def test_a_dry_run_writes_nothing(run: Path, faces_url: str) -> None:
    planned = evaluate(EvaluateConfig(model=(str(run),), faces=faces_url, split="all", dry_run=True))
    assert planned["num_pairs"] > 100
    assert not (run / "report").exists()


def refused(faces_url: str, model_url: str, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        evaluate(EvaluateConfig(**{"faces": faces_url, "model": (model_url,), **settings}))
    return str(caught.value)


def test_bad_input_is_refused_in_one_line(model_url: str, faces_url: str, tmp_path: Path) -> None:
    (tmp_path / "gone.csv").write_text("photo_a,photo_b,same\nx.jpg,y.jpg,1\n")
    (tmp_path / "pairs.docx").write_text("?")
    (tmp_path / "no.onnx").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    gone, docx, no_model = (str(tmp_path / name) for name in ("gone.csv", "pairs.docx", "no.onnx"))
    assert "none of its 1 pairs has both photos here" in refused(faces_url, model_url, pairs=(gone,))
    assert "pairs are read from .txt" in refused(faces_url, model_url, pairs=(docx,))
    assert "no finished faces at" in refused(str(tmp_path), model_url)
    assert "no model at" in refused(faces_url, str(tmp_path))
    assert "is no ONNX model" in refused(faces_url, no_model)
    assert "given 3 times" in refused(faces_url, model_url, model=(model_url,) * 3)
    assert "--split is 'tset'" in refused(faces_url, model_url, split="tset")
    assert "both given" in refused(faces_url, model_url, photos="/p")
    assert "at least 2 folds" in refused(faces_url, model_url, num_pairs=3)
    assert "--tolerance is nan" in refused(faces_url, model_url, tolerance=float("nan"))
    assert "--whole-split is for pairs that are made" in refused(faces_url, model_url, pairs=(gone,), whole_split=True)
    assert "--gpus is -1" in refused(faces_url, model_url, gpus=-1)


@pytest.mark.parametrize(
    ("folds", "said"),
    [((0, 0, 1), "fold 1 has pairs of one kind only"), ((0, 0, 0), "the pairs have 1 fold")],
)
def test_folds_that_cannot_be_used_are_told_before_anything_is_embedded(
    model_url: str, faces_url: str, aligned: list[dict], tmp_path: Path, folds: tuple[int, ...], said: str
) -> None:
    a, b, c, d = (row["photo"] for row in aligned[:4])
    rows = [f"{a},{b},1,{folds[0]}", f"{a},{d},0,{folds[1]}", f"{a},{c},1,{folds[2]}"]
    (tmp_path / "pairs.csv").write_text("\n".join(["photo_a,photo_b,same,fold", *rows]))
    assert said in refused(faces_url, model_url, pairs=(str(tmp_path / "pairs.csv"),), output=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry_run", [True, False])
def test_strict_refuses_other_faces_before_anything_is_embedded(
    model_url: str, faces_url: str, tmp_path: Path, dry_run: bool
) -> None:
    model = load_model(model_url)
    model.spec = dataclasses.replace(model.spec, fingerprint={**model.spec.fingerprint, "eye_height": 0.5})
    save_model(model, str(tmp_path / "other"))
    settings = {"split": "all", "strict": True, "output": str(tmp_path / "out"), "dry_run": dry_run}
    told = refused(faces_url, "", model=(model_url, str(tmp_path / "other")), **settings)
    assert "eye_height: 0.4 here, 0.5 there" in told
    assert not (tmp_path / "out").exists()
