"""Figures of distances, against scikit-learn, counting, and choosing one by one."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from lib.errors import UserError
from lib.evaluation import metrics
from lib.evaluation.curves import point_at, roc_curve
from lib.evaluation.metrics import verification_report
from lib.evaluation.original_table import original_table
from lib.evaluation.pairs import made_pairs
from tests.evaluation.drawn_pairs import LABELLED, random_pairs, split, unhurried


def test_distances_agree_with_the_norm_of_the_difference_across_chunks(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", 1000)
    embeddings_ND, _, pairs = random_pairs()
    expected_P = np.linalg.norm(embeddings_ND[pairs.a_P].astype(float) - embeddings_ND[pairs.b_P], axis=1)
    np.testing.assert_allclose(metrics.pair_distances(embeddings_ND, pairs.a_P, pairs.b_P), expected_P, rtol=1e-6)


def test_half_precision_embeddings_are_measured_in_single_precision():
    embeddings_ND = np.array([[300.0, 0], [0, 300.0]], np.float16)  # the square of 300 overflows float16
    assert metrics.pair_distances(embeddings_ND, np.array([0]), np.array([1]))[0] == pytest.approx(300 * np.sqrt(2))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_embeddings_are_counted_and_refused(value):
    embeddings_ND, identity_N, pairs = random_pairs()
    embeddings_ND[[3, 7, 7], [0, 1, 2]] = value
    with pytest.raises(UserError, match="2 of 300 embeddings"):
        metrics.pair_distances(embeddings_ND, pairs.a_P, pairs.b_P)
    with pytest.raises(UserError, match="2 of 300 embeddings"):
        metrics.identification(embeddings_ND, identity_N)


@unhurried
@given(LABELLED)
def test_best_threshold_is_as_good_as_the_best_of_all_thresholds(rows):
    distances_P, same_P = split(rows)
    threshold, share = metrics.best_threshold(distances_P, same_P)
    tried = [np.mean((distances_P <= candidate) == same_P) for candidate in np.arange(-0.5, 13)]
    assert share == pytest.approx(max(tried))
    assert np.mean((distances_P <= threshold) == same_P) == pytest.approx(share)


def test_a_threshold_parts_neighbouring_floats():
    low = 1.0
    high = np.nextafter(low, 2)
    threshold, share = metrics.best_threshold(np.array([low, high]), np.array([True, False]))
    assert (threshold, share) == (low, 1.0)


@unhurried
@given(LABELLED)
def test_accuracy_is_the_same_when_labels_and_order_are_both_turned_round(rows):
    distances_P, same_P = split(rows)
    assert metrics.best_threshold(distances_P, same_P)[1] == metrics.best_threshold(-distances_P, ~same_P)[1]


def test_tar_is_none_where_ten_false_accepts_would_be_more_than_the_far_allows():
    embeddings_ND, _, pairs = random_pairs(num_pairs=2_000)  # 1,000 different pairs
    figures = metrics.verification_figures(metrics.pair_distances(embeddings_ND, pairs.a_P, pairs.b_P), pairs)
    assert {far: value is not None for far, value in figures["tar_at_far"].items()} == {
        "0.1": True,
        "0.01": True,
        "0.001": False,
        "0.0001": False,
    }


def test_kfold_accuracy_agrees_with_choosing_thresholds_one_by_one():
    rng = np.random.default_rng(1)
    same_P = rng.random(400) < 0.5
    distances_P = np.round(rng.normal(np.where(same_P, 1.0, 1.5), 0.3), 2)  # rounded, for ties
    fold_P = rng.integers(5, size=400) * 3  # folds need not be numbered without gaps
    result = metrics.kfold_accuracy(distances_P, same_P, fold_P)
    accuracies = []
    for fold, threshold in zip(np.unique(fold_P), result.threshold_F, strict=True):
        others = fold_P != fold
        tried = np.append(distances_P[others], -1)
        best = max(np.mean((distances_P[others] <= candidate) == same_P[others]) for candidate in tried)
        assert np.mean((distances_P[others] <= threshold) == same_P[others]) == pytest.approx(best)
        accuracies.append(np.mean((distances_P[~others] <= threshold) == same_P[~others]))
    np.testing.assert_allclose(result.accuracy_F, accuracies)
    assert result.accuracy == pytest.approx(np.mean(accuracies))
    assert result.accuracy_std == pytest.approx(np.std(accuracies, ddof=1) / np.sqrt(5))


def test_a_fold_of_one_kind_is_named():
    with pytest.raises(UserError, match="fold 7 has pairs of one kind"):
        metrics.kfold_accuracy(np.arange(6.0), np.array([1, 0, 1, 0, 1, 1], bool), np.array([2, 2, 5, 5, 7, 7]))


def test_one_fold_is_refused():
    with pytest.raises(UserError, match="1 fold"):
        metrics.kfold_accuracy(np.arange(4.0), np.array([1, 0, 1, 0], bool), np.zeros(4, int))


def test_the_original_table_agrees_with_scikit_learn():
    rng = np.random.default_rng(2)
    same_P = rng.random(500) < 0.4
    distances_P = rng.normal(np.where(same_P, 1.0, 1.5), 0.3)
    table = original_table(distances_P, same_P, 1.2, beta=0.5)
    called_P = distances_P <= 1.2
    precision, recall, f_beta, _ = reference.precision_recall_fscore_support(
        same_P, called_P, beta=0.5, average="binary"
    )
    (_, false_positives), (false_negatives, _) = reference.confusion_matrix(same_P, called_P)
    expected = {
        "processed_rows": 500,
        "accuracy_percent": 100 * reference.accuracy_score(same_P, called_P),
        "false_positives": false_positives,
        "false_negatives": false_negatives,
        "precision": precision,
        "recall": recall,
        "f_beta": f_beta,
        "beta": 0.5,
        "mean_distance_same": distances_P[same_P].mean(),
        "mean_distance_different": distances_P[~same_P].mean(),
        "tolerance": 1.2,
    }
    assert table == pytest.approx(expected)


def test_precision_is_none_where_nothing_is_called_the_same():
    table = original_table(np.array([1.0, 2.0]), np.array([True, False]), 0.5)
    assert (table["precision"], table["recall"], table["f_beta"]) == (None, 0, 0)


def test_failed_photos_make_errors_at_any_threshold():
    embeddings_ND, identity_N, pairs = random_pairs()
    failed_N = np.zeros(len(embeddings_ND), bool)
    failed_N[[5, 80]] = True
    embeddings_ND[failed_N] = np.nan
    touched_P = failed_N[pairs.a_P] | failed_N[pairs.b_P]
    report = metrics.verification_report(embeddings_ND, identity_N, pairs, failed_N=failed_N, num_resamples=20)
    assert report["num_failed_pairs"] == touched_P.sum() > 0
    table = report["original_table"]
    right_P = np.zeros(len(pairs), bool)
    a_P, b_P = pairs.a_P[~touched_P], pairs.b_P[~touched_P]
    distances_P = np.linalg.norm(embeddings_ND[a_P] - embeddings_ND[b_P], axis=1)
    right_P[~touched_P] = (distances_P <= table["tolerance"]) == pairs.same_P[~touched_P]
    assert table["accuracy_percent"] == pytest.approx(100 * right_P.mean())
    assert table["mean_distance_same"] == pytest.approx(distances_P[pairs.same_P[~touched_P]].mean())
    counted = (distances_P[pairs.same_P[~touched_P]][:, None] < distances_P[~pairs.same_P[~touched_P]]).sum()
    assert report["auc"] == pytest.approx(counted / (pairs.same_P.sum() * (~pairs.same_P).sum()))
    json.dumps(report, allow_nan=False)


def test_only_failed_photos_are_refused():
    embeddings_ND, identity_N, pairs = random_pairs()
    with pytest.raises(UserError, match="no pair has an embedding on both sides"):
        metrics.verification_report(embeddings_ND, identity_N, pairs, failed_N=np.ones(len(embeddings_ND), bool))


def test_intervals_hold_the_figures_and_widen_when_people_are_few():
    widths = {}
    for num_people in (10, 200):
        embeddings_ND, identity_N, pairs = random_pairs(num_photos=5 * num_people, num_people=num_people)
        report = metrics.verification_report(embeddings_ND, identity_N, pairs, num_resamples=200)
        for name in ("accuracy", "auc", "eer"):
            low, high = report["intervals"][name]
            assert low <= report[name] <= high
        widths[num_people] = np.diff(report["intervals"]["auc"])[0]
    assert widths[10] > 2 * widths[200]


def test_identification_agrees_with_ranking_each_probe(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", 500)
    embeddings_ND, identity_N, _ = random_pairs()
    names_N = np.array([f"Zoë O'Neil {identity}" for identity in identity_N])
    result = metrics.identification(embeddings_ND, names_N, seed=4)
    drawn = np.random.default_rng(4).permutation(len(names_N))
    gallery = {names_N[photo]: photo for photo in reversed(drawn)}  # the first drawn of each person stays
    ranks = []
    for probe in sorted(set(range(len(names_N))) - set(gallery.values())):
        distances = {
            name: np.linalg.norm(embeddings_ND[probe] - embeddings_ND[photo]) for name, photo in gallery.items()
        }
        ranks.append(sorted(distances, key=distances.get).index(names_N[probe]) + 1)
    assert result == {
        "rank_1": pytest.approx(np.mean(np.array(ranks) <= 1)),
        "rank_5": pytest.approx(np.mean(np.array(ranks) <= 5)),
        "num_gallery": 60,
        "num_probes": 240,
    }


def test_identification_gives_a_collapsed_model_nothing():
    result = metrics.identification(np.ones((40, 8), np.float32), np.arange(40) // 2)
    assert (result["rank_1"], result["rank_5"]) == (0, 0)


def test_identification_counts_failed_probes_as_misses_and_people_of_one_photo_as_gallery_only():
    embeddings_ND = np.eye(5, dtype=np.float64)[[0, 0, 0, 1, 2, 2, 3]]
    identity_N = np.array(["a", "a", "a", "alone", "failed", "failed", "also alone"])
    failed_N = np.array([False, False, True, False, True, True, False])
    result = metrics.identification(embeddings_ND, identity_N, failed_N=failed_N)
    assert result == {"rank_1": 1 / 4, "rank_5": 1 / 4, "num_gallery": 3, "num_probes": 4}


def test_identification_without_probes_says_none():
    result = metrics.identification(np.eye(3), ["a", "b", "c"])
    assert result == {"rank_1": None, "rank_5": None, "num_gallery": 3, "num_probes": 0}


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_the_report_is_json_and_the_same_for_the_same_seed(seed):
    embeddings_ND, identity_N, _ = random_pairs(num_photos=120, num_people=30, seed=seed)
    pairs = made_pairs([f"{n}.jpg" for n in range(120)], identity_N.astype(str).tolist(), num_pairs=200, seed=seed)
    reports = [
        json.dumps(
            metrics.verification_report(embeddings_ND, identity_N, pairs, num_resamples=10, seed=seed), allow_nan=False
        )
        for _ in range(2)
    ]
    assert reports[0] == reports[1]
    report = json.loads(reports[0])
    assert {"accuracy", "accuracy_std", "auc", "eer", "num_pairs", "threshold"} <= report.keys()
    assert report["num_pairs"] == len(pairs) == report["original_table"]["processed_rows"]


def test_an_operating_point_calls_as_many_the_same_as_its_far_allows():
    rng = np.random.default_rng(0)
    same_P = np.arange(4000) % 2 == 0
    distances_P = np.where(same_P, rng.normal(0.8, 0.2, 4000), rng.normal(1.4, 0.2, 4000)).round(3)
    curve = roc_curve(distances_P, same_P)
    for far in (0.5, 0.1, 0.05, 0.005):
        threshold = curve.threshold_T[point_at(curve, far)]
        tars = [(distances_P[same_P] <= each).mean() for each in np.unique(distances_P)]
        fars = [(distances_P[~same_P] <= each).mean() for each in np.unique(distances_P)]
        assert (distances_P[~same_P] <= threshold).mean() <= far
        best = max(tar for tar, each in zip(tars, fars, strict=True) if each <= far)
        assert (distances_P[same_P] <= threshold).mean() == best


def test_an_operating_point_that_the_pairs_cannot_tell_is_refused():
    same_P = np.arange(2000) % 2 == 0
    curve = roc_curve(np.where(same_P, 0.5, 1.0), same_P)
    assert curve.threshold_T[point_at(curve, 0.01)] == 0.5
    with pytest.raises(UserError, match=r"--at-far 0.001 takes 10,000 pairs of different people .* there are 1,000"):
        point_at(curve, 0.001)
    with pytest.raises(UserError, match="calls no two photos the same"):
        point_at(roc_curve(np.where(same_P, 1.0, 0.5), same_P), 0.01)


def test_the_interval_of_an_operating_point_holds_its_figures():
    rng = np.random.default_rng(1)
    person_N = np.repeat(np.arange(60), 6)
    embeddings_ND = rng.normal(size=(60, 16))[person_N] + rng.normal(scale=0.9, size=(360, 16))
    embeddings_ND /= np.linalg.norm(embeddings_ND, axis=1, keepdims=True)
    names = [f"{n}.jpg" for n in range(360)]
    pairs = made_pairs(names, [str(person) for person in person_N], num_pairs=1200, seed=0)
    plain = verification_report(embeddings_ND, person_N, pairs, num_resamples=200)
    report = verification_report(embeddings_ND, person_N, pairs, num_resamples=200, at_far=0.05)
    point = report.pop("operating_point")
    assert plain.pop("operating_point") is None
    assert report == plain
    assert point["far"] <= 0.05
    for name in ("far", "tar"):
        low, high = point[f"{name}_interval"]
        assert low <= point[name] <= high
        assert high - low > 0.005
