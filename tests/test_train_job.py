"""`jobs/train.py` as users run it: what it makes, what it refuses, and that it learns."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pyarrow.parquet as pq
import pytest
import torch

from lib.evaluation.metrics import pair_distances, verification_figures
from lib.evaluation.pairs import made_pairs
from lib.recognition.model import EmbeddingModel, ModelSpec, embed, load_model, save_model
from lib.training.cache_building import build_cache, size_of_crops
from lib.training.checkpoints import newest_progress
from lib.training.face_cache import FaceCache
from lib.training.settings import TrainConfig
from lib.training.validation import Validation
from tests.job_runner import JOB_LIMIT_S, ROOT, RayHead, environment, run_here, run_job
from tests.training.learnable_faces import write_faces

TINY = ["--backbone", "test_convnext", "--init", "none", "--embedding-dim", "16", "--lr", "2e-3", "--val-pairs", "400"]
TIMES = {"time_min", "seconds", "minutes_left", "images_per_s", "data_wait_share", "store_wait_share", "refresh_s"}
TIMES |= {"Date", "Time", "Time taken (M)"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("it's data")
    write_faces(folder / "faces")
    return folder


def flags(data: Path, name: str, *more: str) -> list[str]:
    return ["--data", str(data), "--name", name, "--cache-dir", str(data / "the cache"), *TINY, *more]


def clip_norm(data: Path, name: str) -> float:
    progress = newest_progress(str(data / "runs" / name))
    assert progress is not None
    return progress.clip_norm


def history(data: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(data / "runs" / name / "history.parquet").to_pylist()


@pytest.fixture(scope="module")
def run(head: RayHead, data: Path) -> dict[str, Any]:
    """Train the run "first" and return the job's result."""
    arguments = flags(data, "first", "--epochs", "6", "--batch-size", "48")
    done = run_job("train.py", *arguments, "--triplets-per-epoch", "960", extra=head.environment)
    assert done.status == 0, done.errors
    assert "Traceback" not in done.errors
    assert "epoch 6/6" in done.errors
    return done.result


def test_the_result_says_what_was_made(run: dict[str, Any], data: Path) -> None:
    assert run["model"] == str(data / "runs" / "first" / "model")
    assert run["epochs"] == 6
    assert run["images"] == 6 * 960
    assert clip_norm(data, "first") == 5  # its weights began at random
    rows = history(data, "first")
    assert run["accuracy"] == rows[run["best_epoch"] - 1]["accuracy"]
    assert [row["epoch"] for row in rows if row["is_best"]][-1] == run["best_epoch"]


def test_the_history_has_a_row_an_epoch_in_every_format(run: dict[str, Any], data: Path) -> None:
    rows = history(data, "first")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    folder = data / "runs" / "first"
    sheet = openpyxl.load_workbook(folder / "history.xlsx").active
    assert sheet.max_row == 7
    names = {cell.value for cell in sheet[1]}
    assert {"Train Loss", "no train rows", "Test Loss", "No test rows", "Time taken (M)", "Notes"} <= names
    assert len((folder / "history.csv").read_text().splitlines()) == 7
    assert list((folder / "tensorboard").glob("events*"))
    assert {"val_loss_random", "auc", "active_share", "embedding_variance", "std_uses", "images_per_s"} <= set(rows[0])


def test_the_model_tells_unseen_people_apart(run: dict[str, Any], data: Path) -> None:
    model = load_model(run["model"])
    assert model.spec.fingerprint == {"id": "f", "image_size": 40}
    assert model.spec.metrics["accuracy"] == run["accuracy"]
    cache = FaceCache(build_cache(str(data / "faces"), ["test"], str(data / "the cache")))
    pairs = made_pairs(
        cache.photos.to_pylist(), [cache.identities[n] for n in cache.labels_N], num_pairs=300, num_folds=4, seed=0
    )

    def accuracy(model: EmbeddingModel) -> float:
        embeddings = embed(model, cache.decode(np.arange(len(cache)))[0])
        return verification_figures(pair_distances(embeddings, pairs.a_P, pairs.b_P), pairs)["accuracy"]

    def untrained(seed: int) -> EmbeddingModel:
        torch.manual_seed(seed)
        return EmbeddingModel(model.spec)

    assert accuracy(model) > 0.85
    assert accuracy(model) > np.median([accuracy(untrained(seed)) for seed in range(5)]) + 0.05


def test_every_use_of_a_photo_is_counted(run: dict[str, Any], data: Path) -> None:
    usage = pq.read_table(data / "runs" / "first" / "usage.parquet")
    assert sum(usage["anchor"].to_pylist()) == 6 * 960
    names = [f"person {person}/“{photo}”.jpg" for person in range(24) for photo in range(8)]
    assert sorted(usage["photo"].to_pylist()) == sorted(names)


def test_a_finished_run_is_left_alone(run: dict[str, Any], head: RayHead, data: Path) -> None:
    arguments = flags(data, "first", "--epochs", "6", "--batch-size", "48", "--triplets-per-epoch", "960")
    again = run_here("train.py", *arguments)  # without a cluster: there is nothing to do
    assert again.status == 0, again.errors
    assert again.result["accuracy"] == run["accuracy"]
    assert "nothing to do" in again.errors


def test_another_configuration_is_refused_naming_what_differs(run: dict[str, Any], data: Path) -> None:
    arguments = flags(data, "first", "--epochs", "6", "--batch-size", "48", "--triplets-per-epoch", "960")
    refused = run_here("train.py", *arguments, "--margin", "0.3")
    assert refused.status == 2
    assert "margin: 0.2 there, 0.3 now" in refused.last_error
    assert "Traceback" not in refused.errors


@pytest.mark.parametrize(
    "negatives",
    ["hard", pytest.param("semihard", marks=pytest.mark.slow), pytest.param("exact", marks=pytest.mark.slow)],
)
def test_each_policy_of_triplets_mines_with_a_full_store(connected_head: RayHead, data: Path, negatives: str) -> None:
    more = ["--batch", "triplets", "--negatives", negatives, "--epochs", "2", "--workers", "2", "--ceiling", "0.999"]
    done = run_here("train.py", *flags(data, negatives, *more, "--clip-norm", "30"))
    assert done.status == 0, done.errors
    assert clip_norm(data, negatives) == 30
    rows = history(data, negatives)
    assert [row["negatives"] for row in rows] == [negatives] * 2
    assert [row["num_workers"] for row in rows] == [2, 2]
    assert [row["store_filled_share"] for row in rows] == [1.0, 1.0]
    assert [row["store_num_filled"] for row in rows] == [24 * 8, 0]
    assert rows[1]["val_loss"] > rows[1]["val_loss_random"]


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["identities", "triplets"])
def test_a_node_that_holds_some_people_at_once_trains_and_mines_among_them(
    connected_head: RayHead, data: Path, batch: str
) -> None:
    parts = [str(path) for path in (data / "faces" / "split=train").iterdir()]
    room = 0.7 * size_of_crops(parts)[0] / 1e9
    more = ["--batch", batch, "--negatives", "hard", "--epochs", "3", "--workers", "2", "--batch-size", "24"]
    done = run_here("train.py", *flags(data, f"held {batch}", *more, "--cache-size", f"{room:.9f}"))
    assert done.status == 0, done.errors
    rows = history(data, f"held {batch}")
    assert [row["negatives"] for row in rows] == ["hard"] * 3
    shares = [row["store_filled_share"] for row in rows]
    assert 0.5 < shares[0] < 0.75
    assert shares == sorted(shares)
    assert shares[2] > shares[0], "other people were held later"
    assert all(0 < row["num_images"] <= 3 * 0.75 * 24 * 8 for row in rows)
    used = pq.read_table(data / "runs" / f"held {batch}" / "usage.parquet").to_pylist()
    assert len({row["photo"].partition("/")[0] for row in used if row["anchor"]}) > 0.75 * 24
    assert len(list((data / "the cache").glob("faces-share-*.arrow"))) <= 2


@pytest.mark.slow
def test_two_deterministic_runs_have_the_same_history(head: RayHead, data: Path) -> None:
    more = [
        "--batch",
        "triplets",
        "--negatives",
        "hard",
        "--deterministic",
        "--epochs",
        "3",
        "--triplets-per-epoch",
        "96",
    ]
    for name in ("one", "two"):
        done = run_job("train.py", *flags(data, name, *more), extra=head.environment)
        assert done.status == 0, done.errors
    first, second = (
        [{k: v for k, v in row.items() if k not in TIMES} for row in history(data, n)] for n in ("one", "two")
    )
    assert first == second
    assert {row["negatives"] for row in first} == {"hard"}
    assert len({row["train_loss"] for row in first}) == 3, "it learns"


@pytest.mark.slow
def test_faces_that_lack_something_are_trained_on_and_the_lack_is_told(head: RayHead, tmp_path: Path) -> None:
    """A crop that cannot be decoded is skipped; without validation people the last model is kept."""
    write_faces(tmp_path / "faces", people={"train": 6}, broken=("person 3/“2”.jpg",))
    arguments = flags(tmp_path, "no val", "--epochs", "1", "--triplets-per-epoch", "192")
    done = run_job("train.py", *arguments, extra=head.environment)
    assert done.status == 0, done.errors
    assert history(tmp_path, "no val")[-1]["num_corrupt_crops"] == 1
    assert "person 3/“2”.jpg" in done.errors
    assert "no photo of a validation person is aligned" in done.errors
    assert load_model(done.result["model"]).spec.threshold is None


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(connected_head: RayHead, data: Path) -> None:
    arguments = flags(data, "nan", "--epochs", "3", "--no-normalize", "--warmup-share", "0")
    ended = run_here("train.py", *arguments, "--lr", "1e30")
    assert ended.status == 1
    assert "the loss is not finite at step" in ended.last_error
    assert "--lr" in ended.last_error
    assert "Traceback" not in ended.errors
    assert list((data / "runs" / "nan" / "checkpoints").glob("epoch-*"))


def test_a_dry_run_starts_nothing_and_says_what_it_would_do(data: Path) -> None:
    done = run_here("train.py", *flags(data, "dry", "--dry-run"))
    assert done.status == 0, done.errors
    assert done.result["photos"] == 192
    assert not (data / "runs" / "dry").exists()


@pytest.mark.slow
def test_a_path_of_python_with_a_space_in_it_is_no_obstacle(data: Path, tmp_path: Path) -> None:
    """On a Ray of its own, whose workers are started by the path that this process was."""
    (tmp_path / "my env").symlink_to(sys.prefix)
    command = [tmp_path / "my env" / "bin" / "python", ROOT / "jobs" / "train.py", *flags(data, "spaced")]
    done = subprocess.run(
        [*command, "--epochs", "1"],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=JOB_LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    assert len(history(data, "spaced")) == 1


def test_fine_tuning_takes_a_model_and_leaves_its_statistics_and_frozen_stages(
    connected_head: RayHead, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ModelSpec(backbone="test_efficientnet", embedding_dim=16, image_size=40, mean=(0.1, 0.2, 0.3))
    earlier = EmbeddingModel(spec)
    for _ in range(30):
        earlier(torch.rand(8, 3, 40, 40))  # in training mode: the norms take up its statistics
    save_model(earlier, str(tmp_path / "an earlier model"))
    # All paths as seen from another folder, which is not the workers' own.
    there = Path(os.path.relpath(data, tmp_path))
    monkeypatch.chdir(tmp_path)
    more = ["--epochs", "1", "--batch-size", "48", "--triplets-per-epoch", "480"]
    more += ["--backbone", spec.backbone, "--init", "an earlier model", "--frozen-stages", "2"]
    done = run_here("train.py", *flags(there, "tuned", *more))
    assert done.status == 0, done.errors
    assert done.result["model"] == str(data / "runs" / "tuned" / "model")
    assert load_model(done.result["model"]).spec.mean == (0.1, 0.2, 0.3)
    before, after = earlier.backbone.state_dict(), load_model(done.result["model"]).backbone.state_dict()
    statistics = [name for name in before if "running" in name]
    assert statistics
    for name in [*statistics, "conv_stem.weight", "bn1.weight", "blocks.0.0.conv.weight"]:
        torch.testing.assert_close(after[name], before[name], msg=name)
    assert not torch.equal(after["conv_head.weight"], before["conv_head.weight"])
    assert not torch.equal(after["bn2.weight"], before["bn2.weight"])
    assert clip_norm(data, "tuned") == 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--faces", "/nowhere/faces"], "run jobs/preprocess.py first"),
        (["--backbone", "convnext_tinny"], "near it are"),
        (["--name", "../out"], "--name"),
        (["--head", "256,x"], "--head"),
        (["--lr", "0"], "--lr is 0"),
        (["--workers", "4", "2"], "--workers"),
        (["--negatives", "exact"], "--batch triplets"),
        (["--init", "/nowhere/weights.pth"], "/nowhere/weights.pth"),
        (["--deterministic", "--workers", "2"], "--deterministic"),
        (["--batch-size", "4"], "--batch-size 4 is too small"),
        (["--batch-norm", "fixed"], "come with no statistics"),
        (["--frozen-stages", "6"], "none of test_convnext's 6 stages"),
        (["--temperature", "0"], "--temperature is 0"),
        (["--loss", "arcfaze"], "--loss is 'arcfaze': softmax, arcface, or a sum"),
        (["--loss", "arcface", "--sample-rate", "0"], "--sample-rate is 0"),
        (["--loss", "arcface", "--scale", "0"], "--scale is 0"),
        (["--loss", "arcface", "--center-margin", "2"], "--center-margin is 2"),
        (["--loss", "softmax", "--batch", "photos"], "--batch photos with --loss softmax"),
        (["--loss", "triplet"], "add that, or take softmax"),
        (["--sample-rate", "0.1"], "--loss is softmax"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_anything_starts(
    data: Path, arguments: list[str], words: str
) -> None:
    refused = run_here("train.py", *flags(data, "refused"), *arguments)
    assert refused.status == 2, refused.errors
    assert words in refused.last_error
    assert "Traceback" not in refused.errors
    assert not (data / "runs" / "refused").exists()


@pytest.mark.parametrize(
    ("people", "photos", "words"),
    [({"train": 1, "val": 4}, 4, "1 identity"), ({"train": 5, "val": 4}, 1, "none of the 5 identities has two photos")],
)
def test_faces_without_triplets_are_refused(tmp_path: Path, people: dict[str, int], photos: int, words: str) -> None:
    write_faces(tmp_path / "faces", people=people, photos=photos)
    refused = run_here("train.py", *flags(tmp_path, "few"))
    assert refused.status == 2
    assert words in refused.last_error


def test_two_workers_learn_centres_of_people_with_one_photo_too(connected_head: RayHead, tmp_path: Path) -> None:
    write_faces(tmp_path / "faces", people={"train": 24, "val": 8}, photos=1)
    refused = run_here("train.py", *flags(tmp_path, "pairs", "--loss", "arcface+softmax"))
    assert refused.status == 2
    assert "none of the 24 identities has two photos" in refused.last_error
    more = ["--loss", "adaface", "--batch", "photos", "--sample-rate", "0.9", "--workers", "2", "--epochs", "2"]
    done = run_here("train.py", *flags(tmp_path, "centres", *more, "--batch-size", "6"))
    assert done.status == 0, done.errors
    assert [row["num_images"] for row in history(tmp_path, "centres")] == [24, 24]
    parts = sorted((tmp_path / "runs" / "centres" / "checkpoints").glob("*/centres-*"))
    assert [part.name[8:33] for part in parts[-2:]] == ["000000000000-000000000012", "000000000012-000000000024"]
    again = run_here("train.py", *flags(tmp_path, "centres", *more, "--batch-size", "6", "--scale", "30"))
    assert again.status == 2
    assert "scale: 64.0 there, 30.0 now" in again.last_error


@pytest.mark.slow
def test_embeddings_of_512_numbers_are_learnt_mined_and_kept(connected_head: RayHead, data: Path) -> None:
    more = ["--loss", "arcface+softmax", "--negatives", "hard", "--stored-negatives", "16", "--epochs", "2"]
    brief = ["--batch-size", "24", "--triplets-per-epoch", "96", "--embedding-dim", "512"]
    done = run_here("train.py", *flags(data, "wide", *more), *brief)
    assert done.status == 0, done.errors
    assert [row["store_filled_share"] for row in history(data, "wide")] == [1.0, 1.0]
    model = load_model(done.result["model"])
    assert model.spec.embedding_dim == 512
    assert embed(model, np.zeros((1, 40, 40, 3), np.uint8)).shape == (1, 512)


@pytest.mark.slow
def test_mirror_images_are_part_of_the_model_and_of_its_validation(connected_head: RayHead, data: Path) -> None:
    brief = ["--epochs", "2", "--batch-size", "24", "--triplets-per-epoch", "96"]
    done = run_here("train.py", *flags(data, "mirrored", *brief, "--flip"))
    assert done.status == 0, done.errors
    model = load_model(done.result["model"])
    assert model.spec.flip
    assert model.spec.threshold is not None
    cache = FaceCache(build_cache(str(data / "faces"), ["val"], str(data / "the cache")))
    validation = Validation(cache, TrainConfig.of(val_pairs=400))
    crops = cache.decode(validation.rows_V)[0]
    row = history(data, "mirrored")[done.result["best_epoch"] - 1]
    figures = validation.figures(embed(model, crops), "random").metrics
    assert figures["auc"] == pytest.approx(row["auc"], abs=1e-6)
    assert model.spec.threshold == pytest.approx(figures["threshold"], abs=1e-4)
    model.spec = dataclasses.replace(model.spec, flip=False)
    plain = validation.figures(embed(model, crops), "random").metrics
    assert plain["auc"] != pytest.approx(row["auc"], abs=1e-9)
    refused = run_here("train.py", *flags(data, "raw", "--flip", "--no-normalize"))
    assert refused.status == 2
    assert "leave out --no-normalize" in refused.last_error


def test_more_workers_than_the_cluster_has_are_refused_saying_what_it_has(connected_head: RayHead, data: Path) -> None:
    refused = run_here("train.py", *flags(data, "many", "--workers", "9"))
    assert refused.status == 2
    assert "9 workers need 9 CPUs, and this cluster of 1 nodes has 2" in refused.last_error


def test_weights_that_do_not_fit_are_named(data: Path, tmp_path: Path) -> None:
    spec = ModelSpec(backbone="test_efficientnet", embedding_dim=16, image_size=40)
    save_model(EmbeddingModel(spec), str(tmp_path / "model"))
    weights = tmp_path / "model" / "model.safetensors"
    refused = run_here("train.py", *flags(data, "misfit"), "--init", str(weights))
    assert refused.status == 2
    assert "does not fit" in refused.last_error
    assert json.loads((tmp_path / "model" / "model.json").read_text())["backbone"] == "test_efficientnet"
