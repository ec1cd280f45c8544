"""`jobs/evaluate.py --pairs lfw.bin cfp_fp.bin` as a user runs it: no faces table, no photos, no Ray."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib import storage
from lib.errors import UserError
from lib.evaluation.evaluate_job import EvaluateConfig, evaluate
from lib.recognition import iresnet
from lib.recognition.embedder import load_embedder
from lib.recognition.encoded_crops import decoded_square
from lib.recognition.model import load_model, save_model
from tests.evaluation.drawn_sets import drawn_set, write_set
from tests.evaluation.test_insightface_protocol import reference
from tests.job_runner import run_here
from tests.recognition.test_face_weights import random_like


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return two sets, of which the second has two images that are none."""
    folder = tmp_path_factory.mktemp("sets é")
    images, same = drawn_set(80, noise=60, seed=1)
    images[0], images[5] = b"no picture", images[5][:50]
    return [
        write_set(folder / "lfw.bin", drawn_set(120, noise=100)),
        write_set(folder / "cfp_fp.bin", (images, same), 2),
    ]


@pytest.fixture
def arcface_run(model_url: str, tmp_path: Path) -> Path:
    """Return a run whose model was trained on crops like those of the sets, and has no threshold yet."""
    model = load_model(model_url)
    fingerprint = {"template": "arcface-112"}
    save_model(
        model, str(tmp_path / "runs" / "a é" / "model"), dataclasses.replace(model.spec, fingerprint=fingerprint)
    )
    return tmp_path / "runs" / "a é"


def test_two_sets_give_the_table_of_papers(arcface_run: Path, sets: list[str], tmp_path: Path) -> None:
    before = (arcface_run / "model" / "model.json").read_bytes()
    flags = ["--data", str(tmp_path), "--model", str(arcface_run), "--gpus", "0"]
    done = run_here("evaluate.py", *flags, "--protocol", "insightface", "--pairs", *sets)
    assert done.status == 0, done.errors
    metrics = json.loads((arcface_run / "report" / "sets" / "metrics.json").read_text())
    (model,) = metrics["models"]
    embedder = load_embedder(str(arcface_run))
    images, same = drawn_set(120, noise=100)
    crops_NHWC = np.stack([decoded_square(image) for image in images])  # type: ignore[misc]
    sum_ND = embedder.embed(crops_NHWC) + embedder.embed(np.ascontiguousarray(crops_NHWC[:, :, ::-1]))
    lfw, cfp = model["sets"]
    assert (lfw["accuracy"], lfw["accuracy_std"]) == pytest.approx(reference(sum_ND.astype(np.float64), same), abs=0.02)
    assert (cfp["num_failed_images"], cfp["num_failed_pairs"]) == (2, 2)
    assert any("cfp_fp: 2 images are no square pictures" in note for note in metrics["notes"])
    assert metrics["accuracy"] == done.result["accuracy"] == pytest.approx((lfw["accuracy"] + cfp["accuracy"]) / 2)
    assert (metrics["protocol"], metrics["flip"], metrics["num_pairs"]) == ("insightface", True, 200)

    mean = f"{100 * metrics['accuracy']:.2f}"
    page = (arcface_run / "report" / "sets" / "report.html").read_text()
    for shown in ("lfw", "cfp_fp", "mean", mean, f"{100 * lfw['accuracy']:.2f} ± {100 * lfw['accuracy_std']:.2f}"):
        assert shown in page
        assert shown in done.errors
    assert "aligned to" not in done.errors
    assert (arcface_run / "model" / "model.json").read_bytes() == before


def test_published_weights_are_measured_as_they_are(tmp_path: Path) -> None:
    small = drawn_set(20, noise=100)
    network = iresnet.iresnet18()
    network.load_state_dict(random_like(network.state_dict(), 3))
    torch.save(network.eval().state_dict(), tmp_path / "backbone é.pth")
    pairs = write_set(tmp_path / "lfw.bin", small)
    flags = ["--model", str(tmp_path / "backbone é.pth"), "--data", str(tmp_path), "--gpus", "0", "--pairs", pairs]
    done = run_here("evaluate.py", *flags, "--protocol", "insightface")
    assert done.status == 0, done.errors
    assert "aligned to" not in done.errors
    images, same = small
    crops_NHWC = np.stack([decoded_square(image) for image in images])  # type: ignore[misc]
    images_NCHW = torch.from_numpy(crops_NHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        sum_ND = (network(images_NCHW) + network(images_NCHW.flip(3))).double().numpy()
    (lfw,) = storage.read_json(done.result["report"].replace("report.html", "metrics.json"))["models"][0]["sets"]
    assert (lfw["accuracy"], lfw["accuracy_std"]) == pytest.approx(reference(sum_ND, same), abs=0.02)


def test_our_protocol_has_intervals_and_two_models_stand_side_by_side(
    arcface_run: Path, model_url: str, sets: list[str], s3_bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{s3_bucket}/sets/lfw.bin"
    storage.write_bytes(url, Path(sets[0]).read_bytes())
    config = EvaluateConfig(model=(str(arcface_run), model_url), pairs=(url,), output=f"{s3_bucket}/out ü", gpus=0)
    result = evaluate(config)
    metrics = storage.read_json(f"{s3_bucket}/out ü/metrics.json")
    assert [model["name"] for model in metrics["models"]] == ["a é", "a run é0"]
    for model in metrics["models"]:
        low, high = model["sets"][0]["intervals"]["accuracy"]
        assert low <= model["sets"][0]["accuracy"] <= high
    assert not metrics["flip"]
    assert not result["threshold_kept"]
    assert len([note for note in metrics["notes"] if "was trained on faces aligned to 'eyes'" in note]) == 1
    assert caplog.text.count("was trained on faces aligned to 'eyes'") == 1
    assert storage.read_bytes(f"{s3_bucket}/out ü/report.html").count(b"a run") >= 3

    mirrored = tmp_path / "mirrored" / "model"
    of_run = load_model(str(arcface_run / "model"))
    save_model(of_run, str(mirrored), dataclasses.replace(of_run.spec, flip=True))
    evaluate(dataclasses.replace(config, model=(str(arcface_run),), flip=True))
    flipped = storage.read_json(f"{s3_bucket}/out ü/metrics.json")
    evaluate(dataclasses.replace(config, model=(str(mirrored), str(arcface_run))))
    mixed = storage.read_json(f"{s3_bucket}/out ü/metrics.json")
    assert flipped["flip"]
    assert (mixed["flip"], [model["flip"] for model in mixed["models"]]) == (False, [True, False])
    assert mixed["models"][0]["sets"] == flipped["models"][0]["sets"]
    assert "left out" in storage.read_bytes(f"{s3_bucket}/out ü/report.html").decode()
    of_fold, of_fold_flipped = (each["models"][0]["sets"][0]["fold_thresholds"] for each in (metrics, flipped))
    assert of_fold != of_fold_flipped


def test_a_dry_run_writes_nothing(arcface_run: Path, sets: list[str]) -> None:
    planned = evaluate(EvaluateConfig(model=(str(arcface_run),), pairs=tuple(sets), dry_run=True))
    assert planned["images"] == 400
    assert not (arcface_run / "report").exists()


def refused(**settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        evaluate(EvaluateConfig(**settings))
    return str(caught.value)


def test_bad_input_is_refused_in_one_line(model_url: str, sets: list[str], tmp_path: Path) -> None:
    one_kind = write_set(tmp_path / "one kind.bin", ([b"x"] * 40, [True] * 20))
    no_images = write_set(tmp_path / "no images.bin", ([b"x"] * 40, [True, False] * 10))
    use = {"model": (model_url,), "output": str(tmp_path / "out"), "gpus": 0}
    assert "aligned to 'eyes'" in refused(**use, pairs=sets, strict=True)
    assert "one kind: 20 of 20 pairs are of the same person" in refused(**use, pairs=(one_kind,))
    assert "no images: not one of its 40 images" in refused(**use, pairs=(no_images,))
    assert "gone.bin" in refused(**use, pairs=(str(tmp_path / "gone.bin"),))
    assert "lists of pairs only, or verification sets" in refused(**use, pairs=(sets[0], "pairs.txt"))
    assert "two sets that are called 'lfw'" in refused(**use, pairs=(sets[0], "/other/lfw.bin"))
    assert "--flip and --no-flip are both given" in refused(**use, pairs=sets, flip=True, no_flip=True)
    assert "--protocol insightface is for" in refused(**use, protocol="insightface")
    for flag, value in (
        ("photos", "/p"),
        ("slices", "/s"),
        ("tolerance", 1.0),
        ("at_far", 0.1),
        ("keep_threshold", True),
    ):
        assert f"--{flag.replace('_', '-')} means nothing for" in refused(**use, pairs=sets, **{flag: value})
    assert "metrics.json" not in {path.name for path in tmp_path.rglob("*")}
