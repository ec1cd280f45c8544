"""Open-set identification beside a reference that counts one probe after the other."""

import numpy as np
import pytest

from lib.recognition.open_set import Probes, open_set_figures, open_set_line, probes_of


def as_arrays(identities: list[str], nearest: list[str | None], distances: list[float], known: set[str]) -> Probes:
    """Return these probes; a photo without a face has nobody nearest."""
    nearest_B = np.array([name or "" for name in nearest])
    return probes_of(np.array(identities), nearest_B, np.array(distances), np.array(sorted(known)))


def counted(
    identities: list[str], nearest: list[str | None], distances: list[float], known: set[str], at: float
) -> tuple[float, float]:
    """Return TPIR and FPIR at a threshold, written from the definition."""
    mated = [n for n, person in enumerate(identities) if person in known]
    others = [n for n, person in enumerate(identities) if person not in known]
    named = sum(1 for n in mated if nearest[n] == identities[n] and distances[n] <= at)
    taken = sum(1 for n in others if distances[n] <= at)
    return named / len(mated), taken / len(others)


def drawn(seed: int, num: int = 400) -> tuple[list[str], list[str | None], list[float], set[str]]:
    """Return probes of 30 people, 20 of them known; some without a face, many at equal distances."""
    rng = np.random.default_rng(seed)
    identities = [f"p{n}" for n in rng.integers(30, size=num)]
    known = {f"p{n}" for n in range(20)}
    nearest: list[str | None] = []
    distances: list[float] = []
    for person in identities:
        if rng.random() < 0.05:
            nearest.append(None)
            distances.append(np.inf)
        else:
            is_right = person in known and rng.random() < 0.9
            nearest.append(person if is_right else f"p{rng.integers(20)}")
            distances.append(round(float(rng.normal(0.7 if is_right else 1.2, 0.2)), 2))
    return identities, nearest, distances, known


@pytest.mark.parametrize("seed", range(5))
def test_rates_are_those_of_the_definition_at_the_threshold_and_at_each_fpir(seed: int) -> None:
    probes = drawn(seed)
    figures = open_set_figures(as_arrays(*probes), 0.9)
    assert (figures["tpir"], figures["fpir"]) == pytest.approx(counted(*probes, at=0.9))
    finite = sorted({distance for distance in probes[2] if np.isfinite(distance)})
    assert figures["rank_1"] == pytest.approx(counted(*probes, at=finite[-1])[0])
    for fpir in (0.1,):
        best = max(tpir for tpir, rate in (counted(*probes, at=at) for at in [0.0, *finite]) if rate <= fpir)
        assert figures["tpir_at_fpir"]["0.1"]["tpir"] == pytest.approx(best)
    assert figures["tpir_at_fpir"]["0.01"] == {"tpir": None, "interval": None}  # takes 1,000 strangers
    for name in ("tpir", "fpir", "rank_1"):
        low, high = figures[f"{name}_interval"]
        assert low < figures[name] < high


def test_intervals_cover_the_rate_of_other_people_about_as_often_as_they_say() -> None:
    """People differ in how often they are named, so an interval over probes alone would be too narrow."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(40):
        chance_I = rng.beta(4, 1, size=60)  # in the mean 0.8
        identities = [f"p{n}" for n in range(60) for _ in range(10)]
        is_right = rng.random(600) < np.repeat(chance_I, 10)
        nearest = [one if right else "other" for one, right in zip(identities, is_right, strict=True)]
        figures = open_set_figures(as_arrays(identities, nearest, [0.5] * 600, set(identities)), 1.0, seed=seed)
        low, high = figures["tpir_interval"]
        covered += low <= 0.8 <= high
    assert 33 <= covered <= 40
    assert figures["fpir"] is None
    assert figures["fpir_interval"] is None


def test_the_line_says_what_cannot_be_known() -> None:
    figures = open_set_figures(as_arrays(["a", "a"], ["a", "b"], [0.1, 0.2], {"a", "b"}), 1.0)
    assert open_set_line(figures) == "TPIR 50.00% (50.00% to 50.00%) of 2 known probes, FPIR unknown of 0 strangers"
