"""Open-set identification: how many known people are found, and how many strangers are taken for one of them?

A probe is mated if its person is in the gallery, else non-mated. TPIR, the true positive identification rate, is the
share of mated probes whose nearest gallery face is their person's and lies within the threshold. FPIR, the false
positive identification rate, is the share of non-mated probes with any gallery face within it (Grother, Ngan and
Hanaoka, NIST FRTE part 2: identification; ISO/IEC 19795-1). A photo without a face is a miss of a mated probe, and
names no stranger.

Shapes: B probes, M mated probes, S strangers' probes, I people, R resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.progress import progress_over
from lib.resampling import percentiles

FPIRS = (0.001, 0.01, 0.1)

MIN_FALSE_POSITIVES = 10
"""An FPIR is reported only if it amounts to at least this many strangers. With fewer its threshold means nothing."""

RESAMPLES = 500


@dataclass(frozen=True, kw_only=True, eq=False)
class Probes:
    """Searches with a known answer, in rising order of distance.

    Attributes:
        person_B: the true person, as a number.
        is_mated_B: whether that person is in the gallery.
        distance_B: of the nearest gallery face; infinite for a photo without a face.
        is_right_B: whether that face is the person's.
    """

    person_B: NDArray[np.int64]
    is_mated_B: NDArray[np.bool_]
    distance_B: NDArray[np.floating]
    is_right_B: NDArray[np.bool_]


def probes_of(person_B: NDArray, nearest_B: NDArray, distance_B: NDArray[np.floating], known: NDArray) -> Probes:
    """Return the probes of these people, by the person and the distance of each one's nearest gallery face.

    People are numbers or texts; `known` are those of the gallery. The distance of a photo without a face is infinite.
    """
    order_B = np.argsort(distance_B, kind="stable")
    return Probes(
        person_B=np.unique(person_B, return_inverse=True)[1].astype(np.int64)[order_B],
        is_mated_B=np.isin(person_B, known)[order_B],
        distance_B=np.asarray(distance_B, np.float64)[order_B],
        is_right_B=((person_B == nearest_B) & np.isfinite(distance_B))[order_B],
    )


def open_set_figures(probes: Probes, threshold: float, *, seed: int = 0) -> dict[str, Any]:
    """Return TPIR and FPIR at the threshold, TPIR at fixed FPIRs, and rank 1 of the mated, ready for JSON.

    Each has its 95 % interval by a bootstrap over identities. A figure is None if there are no probes of its kind, or
    too few strangers for its FPIR. `rank_1` needs no threshold.
    """
    weight_B = np.ones(len(probes.person_B))
    at_all = _rates(probes, weight_B, threshold)
    rng = np.random.default_rng(seed)
    num_people = int(probes.person_B.max(initial=-1)) + 1
    drawn: dict[str, list[float]] = {name: [] for name in at_all}
    resamples = range(RESAMPLES if num_people else 0)
    for _ in progress_over(resamples, "computing the intervals", unit="resample"):
        times_I = np.bincount(rng.integers(num_people, size=num_people), minlength=num_people)
        for name, value in _rates(probes, times_I[probes.person_B].astype(float), threshold).items():
            drawn[name].append(value)
    num_strangers = int(np.count_nonzero(~probes.is_mated_B))
    told = {f"tpir_at_fpir_{fpir:g}": fpir * num_strangers >= MIN_FALSE_POSITIVES * (1 - 1e-9) for fpir in FPIRS}
    shown = {
        name: (float(value), percentiles(drawn[name])) if np.isfinite(value) and told.get(name, True) else (None, None)
        for name, value in at_all.items()
    }

    def figure(name: str) -> dict[str, Any]:
        value, interval = shown[name]
        return {name: value, f"{name}_interval": interval}

    at_fpir = {f"{fpir:g}": shown[f"tpir_at_fpir_{fpir:g}"] for fpir in FPIRS}
    return {
        "threshold": threshold,
        "mated_probes": int(np.count_nonzero(probes.is_mated_B)),
        "non_mated_probes": num_strangers,
        **figure("tpir"),
        **figure("fpir"),
        **figure("rank_1"),
        "tpir_at_fpir": {key: {"tpir": value, "interval": interval} for key, (value, interval) in at_fpir.items()},
    }


def open_set_line(figures: dict[str, Any]) -> str:
    """Return the figures as one line for people."""

    def percent(value: float | None, interval: Sequence[float] | None) -> str:
        if value is None:
            return "unknown"
        return f"{value:.2%}" + (f" ({interval[0]:.2%} to {interval[1]:.2%})" if interval else "")

    mated, strangers = figures["mated_probes"], figures["non_mated_probes"]
    tpir, fpir = (percent(figures[name], figures[f"{name}_interval"]) for name in ("tpir", "fpir"))
    return f"TPIR {tpir} of {mated:,} known probes, FPIR {fpir} of {strangers:,} strangers"


def _rates(probes: Probes, weight_B: NDArray[np.float64], threshold: float) -> dict[str, float]:
    """Return every rate with these weights of the probes. A rate is NaN if all probes of its kind have weight 0."""
    mated_B = weight_B * probes.is_mated_B
    num_named_B = np.append(0.0, np.cumsum(mated_B * probes.is_right_B))
    num_taken_B = np.append(0.0, np.cumsum(weight_B - mated_B))
    num_mated, num_strangers = float(mated_B.sum()), float(num_taken_B[-1])
    within = int(np.searchsorted(probes.distance_B, threshold, side="right"))
    with_face = int(np.searchsorted(probes.distance_B, np.inf))

    def share(part: float, whole: float) -> float:
        return float(part / whole) if whole else float("nan")

    rates = {
        "tpir": share(num_named_B[within], num_mated),
        "fpir": share(num_taken_B[within], num_strangers),
        "rank_1": share(num_named_B[with_face], num_mated),
    }
    for fpir in FPIRS:
        # The threshold lies just below the first stranger that is one too many, and below all probes at that distance.
        last = int(np.searchsorted(num_taken_B, fpir * num_strangers * (1 + 1e-9), side="right")) - 1
        if last < len(probes.distance_B):
            last = int(np.searchsorted(probes.distance_B, probes.distance_B[last]))
        named = num_named_B[min(last, with_face)]
        rates[f"tpir_at_fpir_{fpir:g}"] = share(named, num_mated) if num_strangers else float("nan")
    return rates
