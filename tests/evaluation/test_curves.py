"""The ROC curve and what is read off it, against scikit-learn and counting."""

import numpy as np
import pytest
from hypothesis import given
from sklearn import metrics as reference

from lib.errors import UserError
from lib.evaluation import curves
from tests.evaluation.drawn_pairs import LABELLED, split, unhurried


def area(distances_P, same_P):
    curve = curves.roc_curve(distances_P, same_P)
    return float(curves.auc(curve.far_T, curve.tar_T))


@unhurried
@given(LABELLED)
def test_auc_is_that_of_scikit_learn_and_of_counting_pairs(rows):
    distances_P, same_P = split(rows)
    nearer = distances_P[same_P][:, None] < distances_P[~same_P]
    tied = distances_P[same_P][:, None] == distances_P[~same_P]
    assert area(distances_P, same_P) == pytest.approx(float((nearer + tied / 2).mean()))
    assert area(distances_P, same_P) == pytest.approx(reference.roc_auc_score(same_P, -distances_P))


@unhurried
@given(LABELLED)
def test_auc_knows_only_the_order_and_turns_round_with_the_labels(rows):
    distances_P, same_P = split(rows)
    assert area(np.exp(distances_P) + 3, same_P) == area(distances_P, same_P)
    assert area(distances_P, ~same_P) == pytest.approx(1 - area(distances_P, same_P))
    assert area(-distances_P, ~same_P) == pytest.approx(area(distances_P, same_P))


@unhurried
@given(LABELLED)
def test_roc_curve_is_that_of_scikit_learn(rows):
    distances_P, same_P = split(rows)
    curve = curves.roc_curve(distances_P, same_P)
    far_T, tar_T, _ = reference.roc_curve(same_P, -distances_P, drop_intermediate=False)
    np.testing.assert_allclose(curve.threshold_T[1:], np.unique(curve.threshold_T[1:]))
    for threshold, far, tar in zip(curve.threshold_T, curve.far_T, curve.tar_T, strict=True):
        assert far == np.mean(distances_P[~same_P] <= threshold)
        assert tar == np.mean(distances_P[same_P] <= threshold)
    # The points left out lie on the lines between those given.
    corners = {*zip(curve.far_T, curve.tar_T, strict=True)}
    for far, tar in zip(far_T, tar_T, strict=True):
        between = np.interp(far, curve.far_T, curve.tar_T)
        vertical = [corner_tar for corner_far, corner_tar in corners if corner_far == far]
        assert between == pytest.approx(tar) or min(vertical) <= tar <= max(vertical)
    for far in (0, 0.1, 0.25, 0.5, 1):
        assert curves.tar_at_far(curve.far_T, curve.tar_T, far) == tar_T[far_T <= far].max()


@unhurried
@given(LABELLED)
def test_eer_lies_where_the_curve_meets_the_falling_diagonal(rows):
    distances_P, same_P = split(rows)
    curve = curves.roc_curve(distances_P, same_P)
    far_T, tar_T, _ = reference.roc_curve(same_P, -distances_P, drop_intermediate=False)
    # Walk the full curve in small steps of its length: the crossing is where FAR + TAR passes 1.
    step = np.linspace(0, len(far_T) - 1, 200 * len(far_T))
    walked_far, walked_tar = (np.interp(step, np.arange(len(far_T)), axis) for axis in (far_T, tar_T))
    expected = walked_far[np.argmin(np.abs(walked_far + walked_tar - 1))]
    assert float(curves.eer(curve.far_T, curve.tar_T)) == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("same", [True, False])
def test_a_curve_of_one_kind_is_refused(same):
    with pytest.raises(UserError, match="both kinds"):
        curves.roc_curve(np.arange(3.0), np.full(3, same))
