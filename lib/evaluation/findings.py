"""The photos behind the metrics: worst pairs, probable wrong labels and duplicates, and groups of photos.

Shapes: N photos, D embedding, P pairs, K suspects.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from lib.csv_text import read_csv
from lib.errors import UserError
from lib.evaluation.curves import RocCurve, auc, point_at, roc_curve
from lib.evaluation.metrics import KFoldAccuracy
from lib.evaluation.pairs import Pairs
from lib.nearest import nearest_own_and_other
from lib.storage import read_bytes

MAX_SEARCHED = 50_000
"""Largest number of photos that are searched for suspects. Of a larger number, this many are drawn."""
DUPLICATE_QUANTILE = 0.01
"""Two people's photos count as duplicates if they are nearer than all but this share of the same pairs."""
MAX_SLICES = 200

WRONG_LABEL, DUPLICATE = "wrong_label", "duplicate"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Two photos to show: indices into the list of photos, and the distance of their embeddings."""

    a: int
    b: int
    distance: float


@dataclass(frozen=True, kw_only=True)
class Suspect(Finding):
    """A photo `a` with a probably wrong label, and the photo `b` of someone else that suggests it."""

    kind: str
    """`wrong_label`: all other photos of its person are beyond the threshold, and someone else's photo is nearer.
    `duplicate`: someone else's photo is nearer than the two photos of nearly every same pair."""
    own_distance: float | None
    """Distance to the nearest other photo of its own person; None if there is none."""


def worst_pairs(
    distances_P: NDArray, pairs: Pairs, threshold: float, num: int
) -> tuple[tuple[list[Finding], int], tuple[list[Finding], int]]:
    """Return the false matches, the nearest first, and the false non-matches, the farthest first.

    Returns the first `num` of each kind, and how many there are. Pairs with a failed photo are left out, because the
    model did not judge them.
    """
    finite_P = np.isfinite(distances_P)
    matches = np.flatnonzero(finite_P & ~pairs.same_P & (distances_P <= threshold))
    non_matches = np.flatnonzero(finite_P & pairs.same_P & (distances_P > threshold))

    def findings(found: NDArray, sign: int) -> tuple[list[Finding], int]:
        order = found[np.argsort(sign * distances_P[found], kind="stable")][:num]
        worst = [Finding(a=int(pairs.a_P[p]), b=int(pairs.b_P[p]), distance=float(distances_P[p])) for p in order]
        return worst, len(found)

    return findings(matches, 1), findings(non_matches, -1)


def suspects(
    embeddings_ND: NDArray[np.floating],
    identity_N: NDArray[np.int64],
    usable_N: NDArray[np.bool_],
    same_distances: NDArray[np.floating],
    threshold: float,
    *,
    seed: int = 0,
) -> list[Suspect]:
    """Return probable wrong labels and duplicates, the most certain of each kind first.

    Args:
        identity_N: of the same photos, as numbers.
        usable_N: photos that have an embedding and an identity.
        same_distances: distances of same pairs. They show how near photos of one person are.
    """
    chosen = np.flatnonzero(usable_N)
    if len(chosen) > MAX_SEARCHED:
        chosen = np.sort(np.random.default_rng(seed).permutation(chosen)[:MAX_SEARCHED])
    if len(chosen) < 2:
        return []
    vectors_ND, people_N = embeddings_ND[chosen], identity_N[chosen]
    own_N, other_N, other_at_N = nearest_own_and_other(vectors_ND, people_N)
    finite = same_distances[np.isfinite(same_distances)]
    duplicate_at = float(np.quantile(finite, DUPLICATE_QUANTILE)) if len(finite) else 0.0

    found = []
    for k in np.argsort(other_N, kind="stable"):
        other = int(other_at_N[k])
        if np.isfinite(other_N[k]) and other_N[k] <= min(duplicate_at, threshold):
            first = other_at_N[other] != k or k < other  # two photos that point at each other are one finding
            if first:
                found.append(_suspect(chosen, DUPLICATE, int(k), other, other_N, own_N))
    wrong = np.flatnonzero(np.isfinite(own_N) & (own_N > threshold) & (other_N <= threshold))
    surest = wrong[np.argsort((other_N - own_N)[wrong], kind="stable")]
    return found + [_suspect(chosen, WRONG_LABEL, int(k), int(other_at_N[k]), other_N, own_N) for k in surest]


def _suspect(chosen: NDArray, kind: str, k: int, other: int, other_N: NDArray, own_N: NDArray) -> Suspect:
    own = float(own_N[k]) if np.isfinite(own_N[k]) else None
    return Suspect(a=int(chosen[k]), b=int(chosen[other]), distance=float(other_N[k]), kind=kind, own_distance=own)


def read_slices(url: str, photos: Sequence[str]) -> tuple[dict[str, NDArray[np.bool_]], int]:
    """Return which photos have each attribute of a CSV (columns photo, attribute), and how many photos are unknown.

    Raises:
        UserError: the columns are missing, none of its photos is here, or there are too many attributes.
    """
    try:
        rows = read_csv(read_bytes(url), text=["photo", "attribute"])
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"--slices {url}: cannot be read as CSV with the columns photo, attribute: {error}") from None
    absent = [name for name in ("photo", "attribute") if name not in rows.column_names]
    if absent:
        raise UserError(f"--slices {url}: no column {', '.join(absent)} among {', '.join(rows.column_names)}")
    index_N = pc.fill_null(pc.index_in(rows["photo"], pa.array(photos, pa.string())), -1).to_numpy()
    attributes = np.asarray(rows["attribute"].to_pylist(), object)
    names = sorted({name for name in attributes[index_N >= 0] if name})
    if not names:
        raise UserError(
            f"--slices {url}: none of its {len(rows)} photos was found: start the names at the photo folder"
        )
    if len(names) > MAX_SLICES:
        raise UserError(f"--slices {url}: {len(names)} attributes; at most {MAX_SLICES} are reported")
    masks = {}
    for name in names:
        masks[name] = np.zeros(len(photos), bool)
        masks[name][index_N[(attributes == name) & (index_N >= 0)]] = True
    return masks, int((index_N < 0).sum())


def slice_figures(
    slices: Mapping[str, NDArray[np.bool_]],
    distances_P: NDArray,
    pairs: Pairs,
    kfold: KFoldAccuracy,
    threshold: float,
    at_far: float | None = None,
) -> list[dict[str, Any]]:
    """Return for each attribute the metrics of the pairs in which both photos have it; None if there are none.

    Accuracy uses the thresholds of the folds. The two error rates use the threshold of all pairs. `own_threshold` is
    the threshold of these pairs alone at the FAR `at_far`, None if they are too few. It is reported and never applied.
    """
    rows = []
    for name, mask_N in slices.items():
        inside_P = mask_N[pairs.a_P] & mask_N[pairs.b_P]
        same_P, called_P = pairs.same_P[inside_P], distances_P[inside_P] <= threshold
        num_same, num = int(same_P.sum()), int(inside_P.sum())
        both = 0 < num_same < num
        curve = roc_curve(distances_P[inside_P], same_P) if both else None
        rows.append(
            {
                "attribute": name,
                "num_photos": int(mask_N.sum()),
                "num_same_pairs": num_same,
                "num_different_pairs": num - num_same,
                "accuracy": float(kfold.right_P[inside_P].mean()) if num else None,
                "false_match_rate": float(called_P[~same_P].mean()) if num > num_same else None,
                "false_non_match_rate": float(1 - called_P[same_P].mean()) if num_same else None,
                "auc": float(auc(curve.far_T, curve.tar_T)) if curve else None,
                **({} if at_far is None else {"own_threshold": _threshold_at(curve, at_far)}),
            }
        )
    return rows


def _threshold_at(curve: RocCurve | None, at_far: float) -> float | None:
    if curve is None:
        return None
    try:
        return float(curve.threshold_T[point_at(curve, at_far)])
    except UserError:  # too few pairs
        return None
