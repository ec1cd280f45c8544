"""1:N figures of IJB: rank 1, 5 and 10, and TPIR at FPIRs, of probe templates searched in galleries of templates.

Shapes: T templates, D embedding dimension, B probes, S subjects of a gallery.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.evaluation.curves import MIN_FALSE_ACCEPTS
from lib.evaluation.ijb_files import Enrolled, IjbSet
from lib.evaluation.set_figures import Protocol
from lib.resampling import CONFIDENCE, percentiles

RANKS = (1, 5, 10)
FPIRS = (0.01, 0.1)
NUM_RESAMPLES = 200

_CHUNK_PROBES = 1_024
_NEVER = np.float32(-np.inf)
"""Similarity of a template without a readable image."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Searched:
    """The result of a search of each probe in a gallery."""

    is_mated_B: NDArray[np.bool_]
    """Whether its subject is in the gallery."""
    mate_B: NDArray[np.float32]
    """Cosine similarity to its own subject. Minus infinity if the gallery does not have it."""
    num_before_B: NDArray[np.int64]
    """Number of other subjects that are at least as similar."""
    top_other_B: NDArray[np.float32]
    """Similarity of the most similar other subject."""
    subject_B: NDArray[np.int64]


def identification(
    vectors_TD: NDArray[np.float32], failed_T: NDArray[np.bool_], one: IjbSet, protocol: Protocol, *, seed: int = 0
) -> dict[str, Any] | None:
    """Return the figures of each gallery, their mean, and those of all galleries together; None without galleries.

    Mated probes are those whose subject is in the gallery. Rank-k shares and TPIR are over mated probes, FPIR is over
    the others. TPIR is the share of mated probes whose own subject is above the threshold. FPIR is the share of the
    other probes whose most similar subject is above it. `together` searches one gallery of all subjects. Its threshold
    is chosen as InsightFace's scripts do: FPIR times the number of probes similarities of wrong subjects are above it.
    """
    if one.probes is None:
        return None
    galleries: dict[str, dict[str, Any]] = {}
    for name, gallery in one.galleries.items():
        searched = search(vectors_TD, failed_T, gallery, one.probes)
        galleries[name] = {
            "num_subjects": len(np.unique(gallery.subject_E)),
            "num_mated_probes": int(searched.is_mated_B.sum()),
            "num_other_probes": int((~searched.is_mated_B).sum()),
            **open_set_figures(searched, protocol),
            "intervals": intervals(searched, protocol, seed=seed) if protocol == "ours" else None,
        }
    names = [*(f"rank_{rank}" for rank in RANKS), *(tpir_key(fpir) for fpir in FPIRS)]
    return {
        "num_probes": len(one.probes.template_E),
        "galleries": galleries,
        "mean": {name: _mean([each[name] for each in galleries.values()]) for name in names},
        "together": together(vectors_TD, failed_T, one),
    }


def tpir_key(fpir: float) -> str:
    """Return the name of TPIR at this FPIR in a report, such as tpir_at_0.01."""
    return f"tpir_at_{fpir:g}"


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def search(
    vectors_TD: NDArray[np.float32], failed_T: NDArray[np.bool_], gallery: Enrolled, probes: Enrolled
) -> Searched:
    """Return what each probe finds. The similarity to a subject is that of its most similar template."""
    subjects_S = np.unique(gallery.subject_E)
    place_B = np.searchsorted(subjects_S, probes.subject_E).clip(max=len(subjects_S) - 1)
    is_mated_B = subjects_S[place_B] == probes.subject_E
    mate, num_before, top_other = [], [], []
    for start, similarity_BS in _similarities(vectors_TD, failed_T, gallery, probes):
        rows = slice(start, start + len(similarity_BS))
        rows_B = np.arange(len(similarity_BS))
        mate_B = np.where(is_mated_B[rows], similarity_BS[rows_B, place_B[rows]], _NEVER)
        similarity_BS[rows_B[is_mated_B[rows]], place_B[rows][is_mated_B[rows]]] = _NEVER
        mate.append(mate_B)
        # A template without a readable image finds nobody: all other subjects rank before its own.
        num_before.append(np.count_nonzero(similarity_BS >= mate_B[:, None], axis=1))
        top_other.append(similarity_BS.max(axis=1))
    return Searched(
        is_mated_B=is_mated_B,
        mate_B=np.concatenate(mate),
        num_before_B=np.concatenate(num_before),
        top_other_B=np.concatenate(top_other),
        subject_B=probes.subject_E,
    )


def _similarities(
    vectors_TD: NDArray[np.float32], failed_T: NDArray[np.bool_], gallery: Enrolled, probes: Enrolled
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the index of the first of some probes, and their cosine similarity [B, S] to each subject."""
    order_E = np.argsort(gallery.subject_E, kind="stable")
    template_E = gallery.template_E[order_E]
    starts_S = np.flatnonzero(np.diff(gallery.subject_E[order_E], prepend=-1))
    for start in range(0, len(probes.template_E), _CHUNK_PROBES):
        template_B = probes.template_E[start : start + _CHUNK_PROBES]
        similarity_BE = vectors_TD[template_B] @ vectors_TD[template_E].T
        similarity_BE[:, failed_T[template_E]] = _NEVER
        similarity_BE[failed_T[template_B]] = _NEVER
        yield start, np.maximum.reduceat(similarity_BE, starts_S, axis=1)


def open_set_figures(
    searched: Searched, protocol: Protocol, times_B: NDArray[np.float64] | None = None
) -> dict[str, float | None]:
    """Return the rank and TPIR figures of a search. A figure with too few probes is None.

    `times_B` says how often each probe counts.
    """
    times_B = np.ones(len(searched.mate_B)) if times_B is None else times_B
    mated_B = times_B * searched.is_mated_B
    num_mated, others = float(mated_B.sum()), np.flatnonzero(~searched.is_mated_B)
    is_found_B = np.isfinite(searched.mate_B)

    def share(hit_B: NDArray[np.bool_]) -> float | None:
        return float(mated_B @ (hit_B & is_found_B)) / num_mated if num_mated else None

    figures = {f"rank_{rank}": share(searched.num_before_B < rank) for rank in RANKS}
    others = others[np.argsort(-searched.top_other_B[others], kind="stable")]
    passed_O = np.cumsum(times_B[others])
    needed = 1 if protocol == "insightface" else MIN_FALSE_ACCEPTS
    for fpir in FPIRS:
        allowed = fpir * float(passed_O[-1]) * (1 + 1e-9) if len(others) else 0.0
        at = int(np.searchsorted(passed_O, allowed, side="right"))
        threshold = searched.top_other_B[others[at]] if at < len(others) else _NEVER
        figures[tpir_key(fpir)] = share(searched.mate_B > threshold) if allowed >= needed else None
    return figures


def intervals(searched: Searched, protocol: Protocol, *, seed: int) -> dict[str, Any]:
    """Return 95 % percentile intervals of the figures, from resampling the probes' subjects."""
    subjects_I, subject_B = np.unique(searched.subject_B, return_inverse=True)
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = {}
    for _ in range(NUM_RESAMPLES):
        times_I = np.bincount(rng.integers(len(subjects_I), size=len(subjects_I)), minlength=len(subjects_I))
        for name, value in open_set_figures(searched, protocol, times_I[subject_B].astype(np.float64)).items():
            found.setdefault(name, []).append(np.nan if value is None else value)
    return {
        "level": CONFIDENCE,
        "num_resamples": NUM_RESAMPLES,
        **{name: percentiles(values) for name, values in found.items()},
    }


def together(vectors_TD: NDArray[np.float32], failed_T: NDArray[np.bool_], one: IjbSet) -> dict[str, Any]:
    """Return the figures of one gallery of all subjects, over the probes whose subject is in it."""
    assert one.probes is not None
    parts = list(one.galleries.values())
    gallery = Enrolled(
        template_E=np.concatenate([part.template_E for part in parts]),
        subject_E=np.concatenate([part.subject_E for part in parts]),
    )
    is_mated_B = np.isin(one.probes.subject_E, gallery.subject_E)
    probes = Enrolled(template_E=one.probes.template_E[is_mated_B], subject_E=one.probes.subject_E[is_mated_B])
    num = len(probes.template_E)
    figures: dict[str, Any] = {"num_subjects": len(np.unique(gallery.subject_E)), "num_mated_probes": num}
    if not num:
        return figures | {f"rank_{rank}": None for rank in RANKS} | {tpir_key(fpir): None for fpir in FPIRS}
    searched = search(vectors_TD, failed_T, gallery, probes)
    is_found_B = np.isfinite(searched.mate_B)
    figures |= {f"rank_{rank}": float(np.mean((searched.num_before_B < rank) & is_found_B)) for rank in RANKS}
    wanted = [math.ceil(num * fpir) for fpir in FPIRS]
    place_B = np.searchsorted(np.unique(gallery.subject_E), probes.subject_E)
    highest = np.empty(0, np.float32)
    for start, similarity_BS in _similarities(vectors_TD, failed_T, gallery, probes):
        similarity_BS[np.arange(len(similarity_BS)), place_B[start : start + len(similarity_BS)]] = _NEVER
        highest = np.sort(np.concatenate([highest, similarity_BS.ravel()]))[::-1][: max(wanted)]
    for fpir, number in zip(FPIRS, wanted, strict=True):
        threshold = highest[number - 1] if number <= len(highest) else _NEVER
        figures[tpir_key(fpir)] = float(np.mean(searched.mate_B > threshold))
    return figures
