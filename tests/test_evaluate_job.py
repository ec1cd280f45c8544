"""`jobs/evaluate.py` as a user runs it: from faces and from photos, made and given pairs, one model and two."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lib import storage
from lib.errors import UserError
from lib.evaluation.evaluating import EvaluateConfig, evaluate
from lib.evaluation.metrics import verification_figures
from lib.evaluation.pairs import read_pairs
from lib.recognition.embeddings_table import read_embeddings
from lib.recognition.model import load_model
from tests.job_runner import RayHead, ray_head, run_job
from tests.recognition.test_onnx_model import onnx_file
from tests.s3_server import S3Server

pytestmark = pytest.mark.timeout(600)

SHARED_FIGURES = ("accuracy", "accuracy_std", "auc", "eer", "num_pairs")


@pytest.fixture(scope="module")
def head(s3_server: S3Server) -> Iterator[RayHead]:
    """Start a cluster of 3 logical CPUs whose nodes know the bucket's keys."""
    with ray_head(num_cpus=3, extra=s3_server.environment()) as head:
        yield head


@pytest.fixture
def run(model_url: str, tmp_path: Path) -> Path:
    """Return a run of its own, whose model has the threshold of its training alone, and a short history."""
    folder = tmp_path / "runs" / "first é"
    shutil.copytree(model_url, folder / "model")
    spec = json.loads((folder / "model" / "model.json").read_text())
    (folder / "model" / "model.json").write_text(json.dumps({**spec, "threshold": 0.1, "metrics": {"split": "val"}}))
    history = {"epoch": [1, 2], "train_loss": [0.5, 0.4], "val_accuracy": [0.6, None], "notes": ["", ""]}
    storage.write_parquet(str(folder / "history.parquet"), pa.table(history))
    return folder


def people_of(sample_data: Path) -> dict[str, str]:
    lines = (sample_data / "identities.txt").read_text().splitlines()
    return dict(line.rsplit(" ", 1) for line in lines)


def test_a_run_gets_its_report_and_its_threshold(
    head: RayHead, run: Path, faces_url: str, sample_data: Path, tmp_path: Path
) -> None:
    attributes = tmp_path / "slices.csv"
    people = people_of(sample_data)
    rows = [f"{photo},{'odd' if int(who) % 2 else 'even'}" for photo, who in people.items()]
    attributes.write_text("photo,attribute\n" + "\n".join(rows))
    flags = ["--faces", faces_url, "--split", "all", "--num-pairs", "300", "--slices", str(attributes)]
    done = run_job("evaluate.py", "--data", str(tmp_path), *flags, extra=head.environment)
    assert done.status == 0, done.errors
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    assert {name: done.result[name] for name in SHARED_FIGURES} == {name: metrics[name] for name in SHARED_FIGURES}
    assert done.result["report"] == str(run / "report" / "report.html")
    page = (run / "report" / "report.html").read_text()
    assert "first é" in page
    assert 'alt="Training: loss"' in page
    assert 'alt="Training: verification"' in page

    (model,) = metrics["models"]
    assert model["num_failed_pairs"] == 0
    assert any("are in no pair (" in note and "no_face" in note for note in metrics["notes"])
    assert {row["attribute"] for row in model["slices"]} == {"even", "odd"}
    num_aligned = sum(not failed for failed in read_embeddings(str(run / "report/embeddings/first é")).failed_N)
    assert model["original"]["at_tolerance"]["processed_rows"] > 2 * num_aligned
    with (run / "report" / "suspects.csv").open() as file:
        assert all(row["kind"] in ("duplicate", "wrong_label") for row in csv.DictReader(file))

    spec = load_model(str(run / "model")).spec
    assert spec.threshold == done.result["threshold"] == model["threshold"]
    assert spec.metrics == {name: metrics[name] for name in SHARED_FIGURES}
    assert done.result["threshold_kept"]
    assert f"{spec.threshold:.4g}" in (run / "model" / "README.md").read_text()

    # Again with other pairs: nothing is embedded anew, and the threshold stays the one it has.
    again = run_job("evaluate.py", "--data", str(tmp_path), *flags[:-2], "--seed", "5")
    assert again.status == 0, again.errors
    assert "is complete: nothing to do" in again.errors
    assert not again.result["threshold_kept"]
    assert load_model(str(run / "model")).spec.threshold == spec.threshold


def test_two_models_are_measured_on_given_pairs_of_raw_photos_in_a_bucket(
    head: RayHead, s3_bucket: str, run: Path, sample_data: Path, tmp_path: Path
) -> None:
    people = people_of(sample_data)
    names = sorted(name for name in people if (sample_data / "photos" / name).exists())[:48]
    for name in names:
        storage.write_bytes(f"{s3_bucket}/photos/{name}", (sample_data / "photos" / name).read_bytes())
    rng = np.random.default_rng(0)
    rows = ["photo_a,photo_b,same,fold"]
    for n in range(120):
        a, b = rng.choice(names, 2, replace=False)
        rows.append(f"{a},{b},{people[a] == people[b]},{n % 2}")
    rows.append(f"{names[0]},gone.jpg,false,0")
    (tmp_path / "pairs é.csv").write_text("\n".join(rows))
    onnx_url = onnx_file(tmp_path / "public.onnx")
    done = run_job(
        "evaluate.py",
        *("--data", s3_bucket, "--photos", f"{s3_bucket}/photos", "--pairs", str(tmp_path / "pairs é.csv")),
        *("--model", str(run), "--model", onnx_url, "--output", f"{s3_bucket}/out ü"),
        extra=head.environment,
    )
    assert done.status == 0, done.errors
    metrics = storage.read_json(f"{s3_bucket}/out ü/metrics.json")
    assert [model["name"] for model in metrics["models"]] == ["first é", "public"]
    assert metrics["models"][0]["num_missing_pairs"] == 1
    assert metrics["num_pairs"] == done.result["num_pairs"] == 120
    assert any("gone.jpg" in note for note in metrics["notes"])
    assert set(metrics["difference"]) == {"accuracy", "std"}
    assert storage.read_bytes(f"{s3_bucket}/out ü/report.html").count(b"public") > 3

    for model in metrics["models"]:
        made = read_embeddings(f"{s3_bucket}/out ü/embeddings/{model['name']}")
        pairs = read_pairs(str(tmp_path / "pairs é.csv"), made.photos)
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
def test_lfw_is_evaluated_by_its_own_pairs(head: RayHead, run: Path, real_photos: Path, tmp_path: Path) -> None:
    lines = (real_photos / "lfw" / "pairs.txt").read_text().splitlines()
    num_each = int(lines[0].split()[1])
    taken = [line for fold in range(2) for kind in range(2) for line in lines[1 + (2 * fold + kind) * num_each :][:25]]
    (tmp_path / "pairs.txt").write_text("\n".join(["2\t25", *taken]))
    flags = ["--photos", str(real_photos / "lfw" / "photos"), "--pairs", str(tmp_path / "pairs.txt")]
    done = run_job("evaluate.py", "--model", str(run), *flags, extra=head.environment)
    assert done.status == 0, done.errors
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    assert metrics["num_pairs"] == 100
    assert metrics["models"][0]["num_missing_pairs"] == 0
    assert len(metrics["models"][0]["fold_accuracies"]) == 2
    assert metrics["models"][0]["num_failed_pairs"] <= 1
    assert 0.4 < metrics["accuracy"] < 0.9  # random weights


def test_a_dry_run_writes_nothing(run: Path, faces_url: str) -> None:
    done = run_job("evaluate.py", "--model", str(run), "--faces", faces_url, "--split", "all", "--dry-run")
    assert done.status == 0, done.errors
    assert done.result["num_pairs"] > 100
    assert not (run / "report").exists()


def refused(faces_url: str, model_url: str, **settings: object) -> str:
    values = {"faces": faces_url, "model": (model_url,), **settings}
    with pytest.raises(UserError) as caught:
        evaluate(EvaluateConfig(**values))  # type: ignore[arg-type]
    return str(caught.value)


def test_bad_input_is_refused_in_one_line(model_url: str, faces_url: str, tmp_path: Path) -> None:
    (tmp_path / "gone.csv").write_text("photo_a,photo_b,same\nx.jpg,y.jpg,1\n")
    (tmp_path / "one kind.csv").write_text("photo_a,photo_b,same,fold\n00001_001.jpg,00001_002.jpg,1,0\n")
    (tmp_path / "pairs.docx").write_text("?")
    pairs = {name: str(tmp_path / name) for name in ("gone.csv", "one kind.csv", "pairs.docx")}
    assert "none of its 1 pairs has both photos here" in refused(faces_url, model_url, pairs=pairs["gone.csv"])
    assert "pairs are read from .txt" in refused(faces_url, model_url, pairs=pairs["pairs.docx"])
    assert "no finished faces at" in refused(str(tmp_path), model_url)
    assert "no model at" in refused(faces_url, str(tmp_path))
    assert "is no ONNX model" in refused(faces_url, _no_model(tmp_path))
    assert "given 3 times" in refused(faces_url, model_url, model=(model_url,) * 3)
    assert "--split is 'tset'" in refused(faces_url, model_url, split="tset")
    assert "both given" in refused(faces_url, model_url, photos="/p")
    assert "at least 2 folds" in refused(faces_url, model_url, num_pairs=3)


def _no_model(folder: Path) -> str:
    (folder / "no.onnx").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    return str(folder / "no.onnx")


def test_a_fold_with_one_kind_of_pairs_is_named(head: RayHead, run: Path, faces_url: str, tmp_path: Path) -> None:
    photos = sorted(read_photo_names(faces_url))
    rows = [f"{photos[0]},{photos[1]},1,0", f"{photos[0]},{photos[-1]},0,0", f"{photos[0]},{photos[2]},1,1"]
    (tmp_path / "pairs.csv").write_text("\n".join(["photo_a,photo_b,same,fold", *rows]))
    flags = ["--faces", faces_url, "--pairs", str(tmp_path / "pairs.csv")]
    done = run_job("evaluate.py", "--model", str(run), *flags, extra=head.environment)
    assert done.status == 2
    assert "fold 1 holds pairs of one kind only" in done.last_error
    assert "Traceback" not in done.errors


def read_photo_names(faces_url: str) -> list[str]:
    files = storage.list_files(faces_url, suffix=".parquet")
    parts = [storage.read_parquet(f"{faces_url}/{info.path}", columns=["photo"]) for info in files]
    return [name for part in parts for name in part["photo"].to_pylist()]
