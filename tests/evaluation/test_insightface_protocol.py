"""The protocol of InsightFace against a plain program that was written from its description."""

import numpy as np
import pytest

from lib.errors import UserError
from lib.evaluation.insightface_protocol import file_order_folds, insightface_accuracy
from lib.evaluation.set_figures import check_set, mean_figures, people_of, set_figures, set_pairs
from lib.evaluation.verification_sets import VerificationSet


def reference(vectors_ND: np.ndarray, same: list[bool]) -> tuple[float, float]:
    """Return mean and standard deviation over the folds, pair by pair and threshold by threshold."""
    unit_ND = vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    squared = [float(np.sum((unit_ND[2 * n] - unit_ND[2 * n + 1]) ** 2)) for n in range(len(same))]
    size, longer = divmod(len(same), 10)
    begins = [0]
    for fold in range(10):
        begins.append(begins[-1] + size + (fold < longer))
    accuracies = []
    for fold in range(10):
        tested = range(begins[fold], begins[fold + 1])
        best, best_right = 0.0, -1
        for threshold in np.arange(0, 4, 0.01):
            right = sum((squared[n] < threshold) == same[n] for n in range(len(same)) if n not in tested)
            if right > best_right:
                best, best_right = threshold, right
        accuracies.append(sum((squared[n] < best) == same[n] for n in tested) / len(tested))
    return float(np.mean(accuracies)), float(np.std(accuracies))


def drawn(num_pairs: int, noise: float, seed: int) -> tuple[np.ndarray, VerificationSet]:
    rng = np.random.default_rng(seed)
    same = rng.random(num_pairs) < 0.5
    people_ND = rng.standard_normal((2 * num_pairs, 8))
    people_ND[1::2][same] = people_ND[0::2][same]
    vectors_ND = people_ND + noise * rng.standard_normal(people_ND.shape)
    images = [str(n).encode() for n in range(2 * num_pairs)]
    return vectors_ND.astype(np.float32), VerificationSet(name="drawn", images=images, same_P=same)


@pytest.mark.parametrize(("num_pairs", "noise"), [(40, 0.3), (57, 0.8), (83, 1.5), (10, 1.0)])
def test_accuracy_is_that_of_the_description(num_pairs: int, noise: float) -> None:
    for seed in range(3):
        vectors_ND, one = drawn(num_pairs, noise, seed)
        figures = set_figures(vectors_ND, np.zeros(2 * num_pairs, bool), one, "insightface")
        expected = reference(vectors_ND.astype(np.float64), one.same_P.tolist())
        assert (figures["accuracy"], figures["accuracy_std"]) == pytest.approx(expected, abs=1e-12)
        assert len(figures["fold_accuracies"]) == 10
        assert figures["intervals"] is None


def test_a_distance_at_the_threshold_is_of_two_people_and_the_first_best_threshold_is_taken() -> None:
    same_P = np.arange(20) % 2 == 0
    found = insightface_accuracy(np.where(same_P, 0.25, 2.0), same_P)
    assert found["accuracy"] == 1
    assert found["fold_thresholds"] == pytest.approx([0.26] * 10)


def test_folds_are_runs_of_the_file_and_the_first_are_longer() -> None:
    assert np.bincount(file_order_folds(23)).tolist() == [3, 3, 3, 2, 2, 2, 2, 2, 2, 2]
    assert (np.diff(file_order_folds(23)) >= 0).all()


def test_lengths_of_vectors_do_not_count_for_insightface() -> None:
    vectors_ND, one = drawn(60, 0.8, 0)
    failed_N = np.zeros(120, bool)
    scaled_ND = vectors_ND * np.random.default_rng(1).uniform(0.1, 9, (120, 1)).astype(np.float32)
    first, second = (set_figures(each, failed_N, one, "insightface") for each in (vectors_ND, scaled_ND))
    assert first["accuracy"] == second["accuracy"]
    assert first["auc"] == pytest.approx(second["auc"])


@pytest.mark.parametrize("protocol", ["ours", "insightface"])
def test_images_that_cannot_be_read_make_their_pairs_errors(protocol: str) -> None:
    vectors_ND, one = drawn(60, 0.01, 0)
    failed_N = np.zeros(120, bool)
    failed_N[[0, 7]] = True  # pairs 0 and 3, both in the first fold
    figures = set_figures(vectors_ND, failed_N, one, protocol)  # type: ignore[arg-type]
    assert figures["num_failed_pairs"] == 2
    assert figures["fold_accuracies"] == pytest.approx([4 / 6, *[1.0] * 9])


def test_our_protocol_has_intervals_around_its_figures() -> None:
    vectors_ND, one = drawn(300, 1.2, 0)
    figures = set_figures(vectors_ND, np.zeros(600, bool), one, "ours")
    for name in ("accuracy", "auc", "eer"):
        low, high = figures["intervals"][name]
        assert low < figures[name] < high


def test_people_are_known_as_far_as_the_set_tells() -> None:
    images = [b"a", b"b", b"b", b"c", b"d", b"e", b"a", b"d"]
    one = VerificationSet(name="x", images=images, same_P=np.array([True, True, True, False]))
    people_N = people_of(one)
    assert len(set(people_N[:4])) == len(set(people_N[4:6])) == 1
    assert people_N[6] == people_N[0] != people_N[4] == people_N[7]


def test_folds_of_one_kind_are_dealt_anew_for_our_protocol() -> None:
    one = VerificationSet(name="x", images=[], same_P=np.arange(100) < 50)
    pairs = set_pairs(one)
    assert "dealt into folds" in pairs.note
    assert all(0 < pairs.same_P[pairs.fold_P == fold].mean() < 1 for fold in range(10))
    assert not set_pairs(VerificationSet(name="x", images=[], same_P=np.arange(100) % 2 == 0)).note


def test_sets_without_figures_are_refused_by_name() -> None:
    for protocol in ("ours", "insightface"):
        one = VerificationSet(name="all same", images=[], same_P=np.ones(40, bool))
        with pytest.raises(UserError, match=r"all same: .*both kinds are needed"):
            check_set(one, protocol)  # type: ignore[arg-type]
    few = VerificationSet(name="few", images=[], same_P=np.array([True, False, True]))
    with pytest.raises(UserError, match="few: there are 3 pairs"):
        check_set(few, "insightface")


def test_a_mean_is_told_only_where_every_set_has_the_figure() -> None:
    sets = [
        {"num_pairs": 2, "accuracy": a, "auc": 1.0, "eer": 0.0, "tar_at_far": dict.fromkeys(("0.1", "0.01"), t)}
        for a, t in ((0.5, 0.25), (1.0, None))
    ]
    for one in sets:
        one["tar_at_far"] |= {"0.001": 0.5, "0.0001": 0.5}  # type: ignore[operator]
    mean = mean_figures(sets)
    assert (mean["num_pairs"], mean["accuracy"], mean["tar_at_far"]["0.1"]) == (4, 0.75, None)
    assert mean["tar_at_far"]["0.001"] == 0.5
