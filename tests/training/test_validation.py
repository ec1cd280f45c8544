"""Validation on plain arrays: what it looks at, and the figures of embeddings whose answers are known."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import TripletMarginLoss
from sklearn.metrics import roc_auc_score

from lib.training.cache_building import build_cache
from lib.training.face_cache import FaceCache
from lib.training.settings import TrainConfig
from lib.training.validation import Validation
from tests.training.learnable_faces import write_faces

PEOPLE, PHOTOS = 12, 5


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FaceCache:
    folder = tmp_path_factory.mktemp("data")
    write_faces(folder / "faces", people={"val": PEOPLE}, photos=PHOTOS)
    return FaceCache(build_cache(str(folder / "faces"), ["val"], str(folder)))


def unit_vectors(labels_N: np.ndarray, noise: float, seed: int = 0) -> np.ndarray:
    """Return an axis for each person, and noise."""
    rng = np.random.default_rng(seed)
    embeddings_ND = np.eye(PEOPLE)[labels_N] + rng.normal(0, noise, (len(labels_N), PEOPLE))
    return (embeddings_ND / np.linalg.norm(embeddings_ND, axis=1, keepdims=True)).astype(np.float32)


def test_embeddings_that_tell_people_apart_are_right_about_every_pair(cache: FaceCache) -> None:
    validation = Validation(cache, TrainConfig(data="d"))
    assert not validation.problem
    assert len(validation.rows_V) == PEOPLE * PHOTOS
    figures = validation.figures(unit_vectors(cache.labels_N[validation.rows_V], 0.0), "random")
    assert (figures.row["accuracy"], figures.row["auc"], figures.row["eer"]) == (1.0, 1.0, 0.0)
    assert figures.loss_random == 0


def test_the_area_under_the_curve_is_that_of_the_pairs(cache: FaceCache) -> None:
    validation = Validation(cache, TrainConfig(data="d"))
    embeddings_VD = unit_vectors(cache.labels_N[validation.rows_V], 0.6)
    pairs = validation._pairs
    assert pairs is not None
    distances_P = np.linalg.norm(embeddings_VD[pairs.a_P] - embeddings_VD[pairs.b_P], axis=1)
    figures = validation.figures(embeddings_VD, "random")
    assert 0.5 < figures.row["auc"] < 1
    assert figures.row["auc"] == pytest.approx(roc_auc_score(pairs.same_P, -distances_P), abs=1e-6)


def test_the_loss_is_that_of_an_independent_library(cache: FaceCache) -> None:
    config = TrainConfig.of(data="d", batch="triplets", margin=0.3)
    validation = Validation(cache, config)
    embeddings_VD = unit_vectors(cache.labels_N[validation.rows_V], 0.6)
    triplets = validation._triplets
    theirs = TripletMarginLoss(margin=0.3, reducer=None)(
        torch.from_numpy(embeddings_VD),
        indices_tuple=tuple(
            torch.from_numpy(np.asarray(rows, np.int64))
            for rows in (triplets.anchors, triplets.positives, triplets.negatives)
        ),
    ).item()
    figures = validation.figures(embeddings_VD, "random")
    share_active = np.mean(
        np.linalg.norm(embeddings_VD[triplets.anchors] - embeddings_VD[triplets.positives], axis=1)
        - np.linalg.norm(embeddings_VD[triplets.anchors] - embeddings_VD[triplets.negatives], axis=1)
        + 0.3
        > 0
    )
    assert figures.loss == pytest.approx(theirs * share_active, rel=1e-4), "theirs is the mean of those above zero"


@pytest.mark.parametrize("negatives", ["hard", "exact"])
def test_mined_negatives_are_harder_than_random_ones(cache: FaceCache, negatives: str) -> None:
    validation = Validation(cache, TrainConfig.of(data="d", batch="triplets"))
    embeddings_VD = unit_vectors(cache.labels_N[validation.rows_V], 0.6)
    assert validation.figures(embeddings_VD, negatives).loss > validation.figures(embeddings_VD, "random").loss


def test_embeddings_that_are_not_finite_have_no_figures(cache: FaceCache) -> None:
    validation = Validation(cache, TrainConfig(data="d"))
    embeddings_VD = unit_vectors(cache.labels_N[validation.rows_V], 0.1)
    embeddings_VD[3, 2] = np.nan
    figures = validation.figures(embeddings_VD, "random")
    assert figures.row == figures.metrics == {}
    assert math.isnan(figures.loss)


def test_whole_people_are_looked_at_up_to_the_limit(cache: FaceCache) -> None:
    rows_V = Validation(cache, TrainConfig.of(data="d", val_photos=4 * PHOTOS + 3)).rows_V
    assert np.bincount(cache.labels_N[rows_V]).tolist().count(PHOTOS) == 4
    assert len(rows_V) == 4 * PHOTOS


def test_one_person_is_too_few_and_training_is_told(tmp_path: Path) -> None:
    write_faces(tmp_path / "faces", people={"val": 1}, photos=4)
    lonely = FaceCache(build_cache(str(tmp_path / "faces"), ["val"], str(tmp_path)))
    validation = Validation(lonely, TrainConfig(data="d"))
    assert "validation people are too few" in validation.problem
    assert not len(validation.rows_V)
    assert validation.figures(np.empty((0, 4), np.float32), "random").row == {}
