"""`jobs/evaluate.py --ijb FOLDER` as a user runs it, on a small set in the format of IJB-C, of drawn people."""

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib import storage
from lib.errors import UserError
from lib.evaluation.evaluate_job import EvaluateConfig, evaluate
from lib.evaluation.ijb_embedding import aligned
from lib.pipeline_job import PipelineConfig
from lib.recognition.embedder import load_embedder
from lib.recognition.model import load_model, save_model
from lib.recognition.recognizer import decoded_crop
from tests.evaluation.ijb_sets import hand_made, hand_made_again, search_reference, tar_reference, template_reference
from tests.job_runner import RayHead, finish, run_here, start_job, wait_until


@pytest.fixture(scope="module")
def ijb_folder(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    return made_once("ijb é", hand_made)


@pytest.fixture(scope="module")
def arcface_run(model_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run whose model was trained on crops like those of the set."""
    model = load_model(model_url)
    folder = tmp_path_factory.mktemp("runs") / "a é"
    spec = dataclasses.replace(model.spec, fingerprint={"template": "arcface-112"})
    save_model(model, str(folder / "model"), spec)
    return folder


def test_a_set_gives_the_figures_of_the_description(
    connected_head: RayHead, arcface_run: Path, ijb_folder: Path, tmp_path: Path
) -> None:
    done = run_here(
        "evaluate.py",
        *("--data", str(tmp_path), "--model", str(arcface_run), "--ijb", str(ijb_folder)),
        *("--protocol", "insightface"),
    )
    assert done.status == 0, done.errors
    report = arcface_run / "report" / "ijbc"
    metrics = json.loads((report / "metrics.json").read_text())
    (model,) = metrics["models"]
    assert (metrics["protocol"], model["flip"], model["by_score"]) == ("insightface", True, True)

    made = hand_made_again(ijb_folder)
    embedder = load_embedder(str(arcface_run), flip=True)
    vector_of = {}
    for image, values in made.points.items():
        crop = aligned(str(ijb_folder / "loose_crop"), image, np.float32(values[:10]).tolist())[1]
        assert crop is not None
        vector_of[image] = embedder.embed(decoded_crop(crop)[None])[0]
    vectors = template_reference(made, vector_of, by_score=True)
    same = [label for _, _, label in made.pairs]
    cosines = [float(vectors[a] @ vectors[b]) for a, b, _ in made.pairs]
    one_pair = 1.5 / sum(same)  # two nearly equal ones may change places in the last digit
    for far in (0.01, 0.1):
        expected = tar_reference(cosines, same, far)
        assert model["verification"]["tar_at_far"][f"{far:g}"] == pytest.approx(expected, abs=one_pair)
    assert model["verification"]["tar_at_far"]["0.0001"] is None
    for name, gallery in made.galleries.items():
        searched = search_reference(vectors, gallery, made.probes)
        mated = [(mate, rank) for mate, rank, _ in searched if mate is not None]
        others = sorted((other for mate, _, other in searched if mate is None), reverse=True)
        found = model["identification"]["galleries"][name]
        for rank in (1, 5, 10):
            assert found[f"rank_{rank}"] == pytest.approx(np.mean([each <= rank for _, each in mated]), abs=0.1)
        expected = float(np.mean([mate > others[1] for mate, _ in mated]))  # a tenth of twelve others
        assert found["tpir_at_0.1"] == pytest.approx(expected, abs=0.1)
        assert found["tpir_at_0.01"] is None
    assert done.result["num_pairs"] == metrics["num_pairs"] == len(made.pairs)
    assert done.result["tar_at_far"] == model["verification"]["tar_at_far"]
    assert done.result["identification"] == model["identification"]["mean"]

    page = (report / "report.html").read_text()
    for shown in ("ijbc", "TAR@FAR 1e-06", "TPIR@FPIR 0.01", "G1", "together", 'alt="ROC"'):
        assert shown in page
    assert f"{100 * model['verification']['tar_at_far']['0.1']:.2f}" in page
    assert "Rank 10" in done.errors
    assert "aligned to" not in done.errors
    assert "threshold" not in storage.read_json(str(arcface_run / "model" / "model.json"))["metrics"]


@pytest.mark.slow
def test_two_models_in_a_bucket_have_intervals_and_a_damaged_image_is_left_out(
    connected_head: RayHead, arcface_run: Path, model_url: str, ijb_folder: Path, s3_bucket: str
) -> None:
    for path in ijb_folder.rglob("*.*"):
        storage.write_bytes(f"{s3_bucket}/ijb ü/{path.relative_to(ijb_folder)}", path.read_bytes())
    storage.write_bytes(f"{s3_bucket}/ijb ü/loose_crop/9.jpg", b"no picture")
    output = f"{s3_bucket}/out ü"
    evaluate(EvaluateConfig(model=(str(arcface_run), model_url), ijb=f"{s3_bucket}/ijb ü", output=output))
    metrics = storage.read_json(f"{output}/metrics.json")
    assert [model["name"] for model in metrics["models"]] == ["a é", "a run é0"]
    for model in metrics["models"]:
        low, high = model["verification"]["intervals"]["tar_at_far"]["0.1"]
        assert low <= model["verification"]["tar_at_far"]["0.1"] <= high
        assert model["failed_images"] == {"corrupt": 1}
        low, high = model["identification"]["galleries"]["G1"]["intervals"]["rank_5"]
        assert low <= model["identification"]["galleries"]["G1"]["rank_5"] <= high
    assert any("1 of 72 images cannot be read (1 corrupt)" in note for note in metrics["notes"])
    assert len([note for note in metrics["notes"] if "was trained on faces aligned to 'eyes'" in note]) == 1
    assert storage.read_bytes(f"{output}/report.html").count(b"a run") >= 3


@pytest.mark.slow
def test_a_job_that_was_killed_goes_on_and_gives_exactly_the_same_figures(
    connected_head: RayHead,
    arcface_run: Path,
    ijb_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("lib.evaluation.ijb_embedding.PART_IMAGES", 16)
    config = EvaluateConfig(model=(str(arcface_run),), ijb=str(ijb_folder), output=str(tmp_path))
    evaluate(config)
    before = storage.read_json(str(tmp_path / "metrics.json"))
    table = tmp_path / "embeddings" / "a é"
    parts = sorted(table.glob("split=test/*.parquet"))
    assert len(parts) == 5
    for lost in (table / "_SUCCESS", parts[1], parts[4], tmp_path / "metrics.json"):
        lost.unlink()
    left = {part: part.stat().st_mtime_ns for part in parts if part.exists()}
    with caplog.at_level("INFO"):
        evaluate(config)
    assert "resuming: 3 of 5 parts are done" in caplog.text
    assert {part: part.stat().st_mtime_ns for part in left} == left
    after = storage.read_json(str(tmp_path / "metrics.json"))
    assert after["models"] == before["models"]

    caplog.clear()
    with caplog.at_level("INFO"):
        evaluate(dataclasses.replace(config, seed=1))
    assert "is complete: nothing to do" in caplog.text


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_whole_parts(
    head: RayHead, arcface_run: Path, ijb_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "many"
    shutil.copytree(ijb_folder, folder)
    many = hand_made_again(ijb_folder)
    many.folder = folder
    rows = list(many.rows)
    for n, name in itertools.product(range(60), list(many.points)):
        copy = f"{n}_{name}"
        os.link(folder / "loose_crop" / name, folder / "loose_crop" / copy)
        many.points[copy] = many.points[name]
        many.rows += [(copy, template, media + 1_000) for of, template, media in rows if of == name]
    many.write()
    flags = ["--model", str(arcface_run), "--ijb", str(folder), "--output"]
    whole = finish(start_job("evaluate.py", *flags, str(tmp_path / "whole"), extra=head.environment))
    assert whole.status == 0, whole.errors

    process = start_job("evaluate.py", *flags, str(tmp_path / "cut"), extra=head.environment)
    table = tmp_path / "cut" / "embeddings" / "a é"
    wait_until(lambda: any(table.glob("split=test/*.parquet")), process)
    process.kill()
    process.wait()
    assert not (table / "_SUCCESS").exists()
    done = finish(start_job("evaluate.py", *flags, str(tmp_path / "cut"), extra=head.environment))
    assert done.status == 0, done.errors
    assert "resuming" in done.errors
    first, second = (storage.read_json(str(tmp_path / name / "metrics.json")) for name in ("whole", "cut"))
    assert first["models"] == second["models"]


def test_a_dry_run_writes_nothing(arcface_run: Path, ijb_folder: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(model=(str(arcface_run),), ijb=str(ijb_folder), output=str(tmp_path), dry_run=True)
    planned = evaluate(config)
    assert (planned["images"], planned["templates"], planned["set"]) == (72, 36, "ijbc")
    assert list(tmp_path.iterdir()) == []


def refused(**settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        evaluate(EvaluateConfig(**settings))
    return str(caught.value)


def test_bad_input_is_refused_in_one_line(arcface_run: Path, model_url: str, ijb_folder: Path, tmp_path: Path) -> None:
    use = {"model": (str(arcface_run),), "ijb": str(ijb_folder), "output": str(tmp_path / "out")}
    assert "is no folder of IJB-B or IJB-C" in refused(**use | {"ijb": str(tmp_path)})
    assert "aligned to 'eyes'" in refused(**use | {"model": (model_url,)}, strict=True)
    for flag, value in (
        ("pairs", ("lfw.bin",)),
        ("faces", "/f"),
        ("photos", "/p"),
        ("slices", "/s"),
        ("tolerance", 1.0),
        ("at_far", 0.1),
        ("keep_threshold", True),
        ("whole_split", True),
    ):
        assert f"--{flag.replace('_', '-')} means nothing for --ijb" in refused(**use, **{flag: value})
    shutil.copytree(ijb_folder, tmp_path / "one kind")
    (tmp_path / "one kind" / "meta" / "ijbc_template_pair_label.txt").write_text("1 2 1\n1 3 1\n")
    told = refused(**use | {"ijb": str(tmp_path / "one kind")})
    assert "2 of 2 pairs are of the same person" in told
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"--evaluate\.ijb: run jobs/evaluate\.py --ijb"):
        PipelineConfig(evaluate=EvaluateConfig(ijb="/ijb"))
