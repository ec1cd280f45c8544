"""The figures of IJB against loops that follow their description."""

import numpy as np
import pytest

from lib.evaluation import ijb_verification
from lib.evaluation.ijb_files import Enrolled, IjbSet
from lib.evaluation.ijb_identification import identification, search
from lib.evaluation.ijb_verification import people_of, tar_intervals, verification
from tests.evaluation.ijb_sets import search_reference, tar_reference


def drawn(num_templates: int = 120, num_people: int = 30, num_pairs: int = 4_000, seed: int = 0) -> tuple:
    """Return a set without images, and vectors of its templates."""
    rng = np.random.default_rng(seed)
    person_T = np.arange(num_templates) % num_people
    centre_ID = rng.standard_normal((num_people, 12))
    vectors_TD = centre_ID[person_T] + 0.9 * rng.standard_normal((num_templates, 12))
    vectors_TD /= np.linalg.norm(vectors_TD, axis=1, keepdims=True)
    a_P, b_P = rng.integers(num_templates, size=(2, num_pairs))
    a_P, b_P = a_P[a_P != b_P], b_P[a_P != b_P]
    place_T = np.arange(num_templates)
    half = num_people // 2
    nothing = np.empty(0)
    one = IjbSet(
        name="ijbx",
        images_url="",
        images=None,
        marks=None,
        landmarks_NX=nothing,
        score_N=nothing,
        image_R=nothing,
        template_R=nothing,
        media_R=nothing,
        templates_T=place_T,
        a_P=a_P.astype(np.int32),
        b_P=b_P.astype(np.int32),
        same_P=person_T[a_P] == person_T[b_P],
        galleries={
            "G1": Enrolled(template_E=place_T[:half], subject_E=person_T[:half]),
            "G2": Enrolled(template_E=place_T[half:num_people], subject_E=person_T[half:num_people]),
        },
        probes=Enrolled(template_E=place_T[num_people:], subject_E=person_T[num_people:]),
    )
    return one, vectors_TD.astype(np.float32), person_T


def test_tar_at_far_is_that_of_the_description() -> None:
    one, vectors_TD, _ = drawn(num_pairs=1_500)
    figures, curve = verification(vectors_TD, np.zeros(120, bool), one, "insightface")
    cosines = np.einsum("pd,pd->p", vectors_TD[one.a_P].astype(float), vectors_TD[one.b_P].astype(float)).tolist()
    for far in (1e-3, 1e-2, 1e-1):
        assert figures["tar_at_far"][f"{far:g}"] == pytest.approx(tar_reference(cosines, one.same_P.tolist(), far))
    assert figures["tar_at_far"]["1e-06"] is None
    assert figures["intervals"] is None
    ours, _ = verification(vectors_TD, np.zeros(120, bool), one, "ours")
    assert ours["tar_at_far"]["0.001"] is None
    assert ours["tar_at_far"]["0.1"] == figures["tar_at_far"]["0.1"]
    low, high = ours["intervals"]["tar_at_far"]["0.1"]
    assert low < ours["tar_at_far"]["0.1"] < high
    assert curve.num_same + curve.num_different == len(one.same_P) == figures["num_pairs"]


def test_templates_without_an_image_never_match() -> None:
    one, vectors_TD, _ = drawn()
    failed_T = np.arange(120) < 40
    vectors_TD[failed_T] = 0
    figures, _ = verification(vectors_TD, failed_T, one, "insightface")
    failed_P = failed_T[one.a_P] | failed_T[one.b_P]
    assert figures["num_failed_pairs"] == failed_P.sum()
    cosines = np.einsum("pd,pd->p", vectors_TD[one.a_P].astype(float), vectors_TD[one.b_P].astype(float))
    cosines[failed_P] = -2
    expected = tar_reference(cosines.tolist(), one.same_P.tolist(), 0.01)
    assert figures["tar_at_far"]["0.01"] == pytest.approx(expected)


def test_intervals_are_those_of_counting_every_pair_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    one, vectors_TD, person_T = drawn()
    people_T = people_of(one)
    assert len(np.unique(np.stack([people_T, person_T]), axis=1).T) == len(np.unique(people_T)) == 30
    distances_P = np.linalg.norm(vectors_TD[one.a_P] - vectors_TD[one.b_P], axis=1).astype(np.float64)
    found = tar_intervals(distances_P, one, people_T, [1e-2, 1e-1], num_resamples=40, seed=5)

    rng = np.random.default_rng(5)
    codes_T = np.unique(people_T, return_inverse=True)[1]
    tars: dict[float, list[float]] = {1e-2: [], 1e-1: []}
    for _ in range(40):
        times_I = np.bincount(rng.integers(30, size=30), minlength=30)
        a, b = times_I[codes_T[one.a_P]], times_I[codes_T[one.b_P]]
        weight_P = np.where(one.same_P, a, a * b).astype(float)
        for far, values in tars.items():
            best = 0.0
            for threshold in np.unique(distances_P):
                near_P = distances_P <= threshold
                different = weight_P[~one.same_P]
                if different[near_P[~one.same_P]].sum() <= far * different.sum():
                    same = weight_P[one.same_P]
                    best = max(best, same[near_P[one.same_P]].sum() / same.sum())
            values.append(best)
    for far, values in tars.items():
        assert found["tar_at_far"][f"{far:g}"] == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=1e-9)
    assert found["tar_at_far"]["1e-05"] is None
    monkeypatch.setattr(ijb_verification, "_KEPT_FALSE_ACCEPTS", 100.0)
    whole = tar_intervals(distances_P, one, people_T, [1e-2, 1e-1], num_resamples=40, seed=5)
    assert whole == found


def test_identification_is_that_of_the_description() -> None:
    one, vectors_TD, person_T = drawn(num_templates=400, num_people=60)
    failed_T = np.zeros(400, bool)
    found = identification(vectors_TD, failed_T, one, "insightface")
    assert found is not None
    assert one.probes is not None
    vectors = dict(enumerate(vectors_TD.astype(np.float64)))
    probes = [(int(t), str(person_T[t])) for t in one.probes.template_E]
    means: dict[str, list[float]] = {}
    everybody = []
    for name, gallery in one.galleries.items():
        enrolled = [(int(t), str(person_T[t])) for t in gallery.template_E]
        everybody += enrolled
        searched = search_reference(vectors, enrolled, probes)
        mated = [(mate, rank) for mate, rank, _ in searched if mate is not None]
        others = sorted((other for mate, _, other in searched if mate is None), reverse=True)
        figures = found["galleries"][name]
        assert (figures["num_mated_probes"], figures["num_other_probes"]) == (len(mated), len(others))
        for rank in (1, 5, 10):
            share = np.mean([each <= rank for _, each in mated])
            assert figures[f"rank_{rank}"] == pytest.approx(share)
            means.setdefault(f"rank_{rank}", []).append(float(share))
        for fpir in (0.01, 0.1):
            threshold = others[int(fpir * len(others))]
            share = np.mean([mate > threshold for mate, _ in mated])
            assert figures[f"tpir_at_{fpir:g}"] == pytest.approx(share)
            means.setdefault(f"tpir_at_{fpir:g}", []).append(float(share))
    assert found["mean"] == pytest.approx({name: np.mean(values) for name, values in means.items()})

    searched = search_reference(vectors, everybody, probes)
    assert found["together"]["rank_1"] == pytest.approx(np.mean([rank == 1 for _, rank, _ in searched]))
    wrong = sorted(
        (float(vectors[t] @ vectors[p]) for p, subject in probes for t, whose in everybody if whose != subject),
        reverse=True,
    )
    for fpir in (0.01, 0.1):
        threshold = wrong[int(np.ceil(fpir * len(probes))) - 1]
        share = np.mean([mate is not None and mate > threshold for mate, _, _ in searched])
        assert found["together"][f"tpir_at_{fpir:g}"] == pytest.approx(share)


def test_identification_has_intervals_and_says_where_probes_are_too_few() -> None:
    one, vectors_TD, _ = drawn(num_templates=400, num_people=60)
    found = identification(vectors_TD, np.zeros(400, bool), one, "ours")
    assert found is not None
    for figures in found["galleries"].values():
        low, high = figures["intervals"]["rank_1"]
        assert low < figures["rank_1"] < high
        assert figures["tpir_at_0.01"] is None
        assert figures["tpir_at_0.1"] is not None
    assert found["mean"]["tpir_at_0.01"] is None


def test_probes_and_subjects_without_an_image_find_and_are_found_by_nobody() -> None:
    one, vectors_TD, _ = drawn()
    assert one.probes is not None
    failed_T = np.zeros(120, bool)
    failed_T[[0, 31]] = True  # the gallery's template of person 0, and a probe of person 1
    vectors_TD[failed_T] = 0
    searched = search(vectors_TD, failed_T, one.galleries["G1"], one.probes)
    of_0 = one.probes.subject_E == 0
    assert np.all(np.isneginf(searched.mate_B[of_0]))
    assert np.isneginf(searched.top_other_B[1])
    assert np.all(searched.top_other_B[np.arange(90) != 1] > -2)


def test_a_subject_with_several_templates_is_as_near_as_the_nearest() -> None:
    one, vectors_TD, _ = drawn()
    assert one.probes is not None
    twice = Enrolled(template_E=np.array([0, 1, 30]), subject_E=np.array([0, 1, 0]))
    searched = search(vectors_TD, np.zeros(120, bool), twice, one.probes)
    probes_ND = vectors_TD[one.probes.template_E]
    is_0 = one.probes.subject_E == 0
    expected = np.maximum(probes_ND[is_0] @ vectors_TD[0], probes_ND[is_0] @ vectors_TD[30])
    np.testing.assert_allclose(searched.mate_B[is_0], expected, rtol=1e-5)
