"""Worst pairs, suspects and slices, against a count by hand or by brute force."""

from pathlib import Path

import numpy as np
import pytest

from lib.errors import UserError
from lib.evaluation.findings import DUPLICATE, WRONG_LABEL, read_slices, slice_figures, suspects, worst_pairs
from lib.evaluation.metrics import kfold_accuracy
from lib.evaluation.pairs import Pairs


def made(a: list[int], b: list[int], same: list[bool], fold: list[int] | None = None) -> Pairs:
    folds = np.array(fold if fold is not None else [0] * len(a), np.int16)
    return Pairs(a_P=np.array(a), b_P=np.array(b), same_P=np.array(same), fold_P=folds)


def test_the_worst_pairs_are_the_surest_errors() -> None:
    pairs = made([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [True, True, True, False, False, False])
    distances_P = np.array([0.2, 1.4, np.inf, 0.9, 0.3, -np.inf])
    (matches, num_matches), (non_matches, num_non_matches) = worst_pairs(distances_P, pairs, 1.0, 10)
    assert (num_matches, num_non_matches) == (2, 1)
    assert [(each.a, each.b, each.distance) for each in matches] == [(4, 10, 0.3), (3, 9, 0.9)]
    assert [(each.a, each.b, each.distance) for each in non_matches] == [(1, 7, 1.4)]
    (matches, num_matches), _ = worst_pairs(distances_P, pairs, 1.0, 1)
    assert (len(matches), num_matches) == (1, 2)


def people(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return unit vectors of 12 people with 6 photos each, who they are, and the distances of all same pairs."""
    rng = np.random.default_rng(seed)
    people_N = np.repeat(np.arange(12), 6)
    vectors_ND = rng.standard_normal((12, 32))[people_N] + 0.25 * rng.standard_normal((72, 32))
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    distances_NN = np.linalg.norm(vectors_ND[:, None] - vectors_ND, axis=2)
    same = distances_NN[(people_N[:, None] == people_N) & ~np.eye(72, dtype=bool)]
    return vectors_ND.astype(np.float32), people_N, same


def test_swapped_labels_and_copied_photos_are_found_and_nothing_else() -> None:
    vectors_ND, people_N, same = people()
    usable_N = np.ones(72, bool)
    assert suspects(vectors_ND, people_N, usable_N, same, 0.9) == []
    people_N[3] = 7  # a photo of person 0 under the name of person 7
    vectors_ND[20] = vectors_ND[40]  # one photo under two names
    found = suspects(vectors_ND, people_N, usable_N, same, 0.9)
    duplicates = [each for each in found if each.kind == DUPLICATE]
    assert [sorted((each.a, each.b)) for each in duplicates] == [[20, 40]]
    assert duplicates[0].distance < 1e-3
    wrong = [each for each in found if each.kind == WRONG_LABEL]
    assert {each.a for each in wrong} == {3, 20}
    suspect = next(each for each in wrong if each.a == 3)
    assert people_N[suspect.b] == 0
    distances_N = np.linalg.norm(vectors_ND[3] - vectors_ND, axis=1)
    own_N = (people_N == 7) & (np.arange(72) != 3)
    assert suspect.distance == pytest.approx(distances_N[people_N != 7].min(), abs=1e-5)
    assert suspect.own_distance == pytest.approx(distances_N[own_N].min(), abs=1e-5)


def test_photos_without_an_embedding_are_no_suspects() -> None:
    vectors_ND, people_N, same = people()
    vectors_ND[[20, 40]] = 0
    usable_N = np.ones(72, bool)
    usable_N[[20, 40]] = False
    assert suspects(vectors_ND, people_N, usable_N, same, 0.9) == []
    assert suspects(vectors_ND, people_N, np.zeros(72, bool), same, 0.9) == []


def test_slices_count_the_pairs_inside_them(tmp_path: Path) -> None:
    photos = ["a 1.jpg", "a2.jpg", "b1.jpg", "b2.jpg", "é.jpg"]
    (tmp_path / "s.csv").write_text(
        "photo,attribute\na 1.jpg,x\na2.jpg,x\nb1.jpg,x\nb2.jpg,y\né.jpg,y\na 1.jpg,y\nnone.jpg,x\n"
    )
    slices, num_unknown = read_slices(str(tmp_path / "s.csv"), photos)
    assert num_unknown == 1
    assert slices["x"].tolist() == [True, True, True, False, False]
    assert slices["y"].tolist() == [True, False, False, True, True]
    pairs = made([0, 0, 2, 3], [1, 2, 3, 4], [True, False, True, False], [0, 0, 1, 1])
    distances_P = np.array([0.1, 0.2, 0.3, 0.9])
    kfold = kfold_accuracy(distances_P, pairs.same_P, pairs.fold_P)
    x, y = slice_figures(slices, distances_P, pairs, kfold, 0.5)
    assert x == {
        "attribute": "x",
        "num_photos": 3,
        "num_same_pairs": 1,
        "num_different_pairs": 1,
        "accuracy": kfold.right_P[:2].mean(),
        "false_match_rate": 1.0,
        "false_non_match_rate": 0.0,
        "auc": 1.0,
    }
    assert (y["num_same_pairs"], y["num_different_pairs"], y["false_match_rate"]) == (0, 1, 0.0)
    told = slice_figures(slices, distances_P, pairs, kfold, 0.5, 0.1)
    assert [each["own_threshold"] for each in told] == [None, None]  # one pair tells nothing
    assert y["auc"] is y["false_non_match_rate"] is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("photo,group\na,b\n", "no column attribute among photo, group"),
        ("photo,attribute\nz.jpg,b\n", "none of its 1 photos was found"),
        ("photo,attribute\n", "none of its 0 photos"),
        ("", "cannot be read as CSV"),
    ],
)
def test_slices_that_say_nothing_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        read_slices(str(tmp_path / "s.csv"), ["a.jpg"])
