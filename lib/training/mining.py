"""Mining: which photo is the negative of an anchor. Plain functions on arrays, which the feature store uses too.

Shape suffixes: B anchors of a batch, N photos (rows of the features), P candidates drawn from them, D dimensions of a
feature, X pairs of an anchor and a candidate, S parts of a search.

A search is one float32 matrix product. The nearest candidate has the highest score `q.c - |c|^2 / 2`, which is
`(|q|^2 - |q - c|^2) / 2`, whether vectors are normalised or not. The distance of the nearest is then computed from the
difference. So it is exact, and can be compared between chunks and shards. Of equal scores the lower row wins.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lib.nearest import squared_norms

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.integer]
Bools = npt.NDArray[np.bool_]

NO_ROW = -1
"""In place of a row: this anchor has no negative, or this neighbour does not exist."""

CHUNK_ROWS = 4096
"""Rows scored at once in a search of all photos: 4 MB of scores for 256 anchors."""

NUM_SPARES = 16
"""Extra candidates. They replace those that show the anchor's own person."""

MAX_SUSPECTS = 1024
"""Suspect pairs kept from one search, most similar first. With a collapsed model every pair is suspect."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs of an anchor and a candidate, by their positions."""

    anchors: Ints
    """Position in the batch [X]."""
    candidates: Ints
    """Position among the candidates [X]."""


@dataclass(frozen=True, kw_only=True)
class CandidatePool:
    """Candidates that the anchors of a batch share."""

    rows: Ints
    """Their rows, ascending and distinct [P]."""
    blocked: Pairs
    """Forbidden pairs: the candidate shows the anchor's person, or is an extra that this anchor does not need."""


@dataclass(frozen=True, kw_only=True)
class Suspects:
    """Pairs of different identities that are too similar for negatives: probably wrong labels or duplicates."""

    anchors: Ints
    """Position in the batch [X]."""
    rows: Ints
    """Row of the candidate [X]."""
    similarities: Floats
    """Cosine of the two [X]."""


NO_SUSPECTS = Suspects(anchors=np.empty(0, np.int64), rows=np.empty(0, np.int64), similarities=np.empty(0, np.float32))


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """The answer of a search."""

    rows: Ints
    """Row of each anchor's negative; `NO_ROW` if no candidate was allowed [B]."""
    squared_distances: Floats
    """Squared Euclidean distance of anchor and negative; infinite if there is none [B]."""
    suspects: Suspects


def random_negatives(
    labels_B: Ints, labels_N: Ints, *, rng: np.random.Generator, filled_N: Bools | None = None
) -> Ints:
    """Return for each anchor a random photo of another identity, `NO_ROW` if there is none."""
    rows_B = rng.integers(len(labels_N), size=len(labels_B))
    for _ in range(32):
        wrong_B = labels_N[rows_B] == labels_B
        if filled_N is not None:
            wrong_B |= ~filled_N[rows_B]
        if not wrong_B.any():
            return rows_B
        rows_B[wrong_B] = rng.integers(len(labels_N), size=np.count_nonzero(wrong_B))
    for anchor, label in enumerate(labels_B):  # redraws rarely help: an identity or a gap is very large
        others = np.flatnonzero((labels_N != label) if filled_N is None else (labels_N != label) & filled_N)
        rows_B[anchor] = rng.choice(others) if len(others) else NO_ROW
    return rows_B


def draw_candidates(
    labels_B: Ints, labels_N: Ints, *, num_candidates: int, rng: np.random.Generator, filled_N: Bools | None = None
) -> CandidatePool:
    """Draw one pool with `num_candidates` random photos of other identities for every anchor.

    The pool is a random order of photos. An anchor's candidates are its first `num_candidates` photos of other people;
    without the own photos, the order of the others is still random. An anchor gets fewer only if fewer exist.
    """
    num_photos = len(labels_N) if filled_N is None else np.count_nonzero(filled_N)
    photos = len(labels_N) if filled_N is None else np.flatnonzero(filled_N)
    rows_P = rng.choice(photos, min(num_candidates + NUM_SPARES, num_photos), replace=False)
    while True:
        own = own_pairs(labels_B, labels_N[rows_P])
        ends_B = _candidate_ends(own, len(labels_B), num_candidates)
        num_needed = int(ends_B.max(initial=0))
        if num_needed <= len(rows_P) or len(rows_P) == num_photos:
            break
        rest_N = np.ones(len(labels_N), bool) if filled_N is None else filled_N.copy()
        rest_N[rows_P] = False
        rest = np.flatnonzero(rest_N)
        rows_P = np.concatenate([rows_P, rng.choice(rest, min(num_needed, len(rest)), replace=False)])

    rows_P = rows_P[:num_needed]
    inside_X = own.candidates < num_needed
    unneeded_anchors, unneeded = _true_pairs(np.arange(num_candidates, len(rows_P)) >= ends_B[:, None])
    blocked_rows = rows_P[np.concatenate([own.candidates[inside_X], num_candidates + unneeded])]
    rows_P.sort()  # reading the features in order is faster, and ties then go to the lower row
    blocked = Pairs(
        anchors=np.concatenate([own.anchors[inside_X], unneeded_anchors]),
        candidates=np.searchsorted(rows_P, blocked_rows),
    )
    return CandidatePool(rows=rows_P, blocked=blocked)


def own_pairs(labels_B: Ints, labels_P: Ints) -> Pairs:
    """Return every pair of an anchor and a candidate of the same identity, without a comparison of all pairs."""
    known_B = np.sort(labels_B)
    nearest_P = np.searchsorted(known_B, labels_P).clip(max=len(known_B) - 1)
    shown_X = np.flatnonzero(known_B[nearest_P] == labels_P)
    anchors_X, shown_positions_X = _true_pairs(labels_B[:, None] == labels_P[shown_X])
    return Pairs(anchors=anchors_X, candidates=shown_X[shown_positions_X])


def _candidate_ends(own: Pairs, num_anchors: int, num_candidates: int) -> Ints:
    """Return how many photos of the pool each anchor needs, from its start, to have `num_candidates` of others."""
    ends_B = np.full(num_anchors, num_candidates)
    while True:
        before_X = own.candidates < ends_B[own.anchors]
        longer_B = num_candidates + np.bincount(own.anchors[before_X], minlength=num_anchors)
        if (longer_B == ends_B).all():
            return ends_B
        ends_B = longer_B


def search(
    queries_BD: Floats,
    candidates_PD: Floats,
    rows_P: Ints,
    blocked: Pairs,
    *,
    beyond_squared_B: Floats | None = None,
    ceiling: float | None = None,
    filled_P: Bools | None = None,
) -> Negatives:
    """Return for each query the nearest candidate that is allowed, has a feature, and is at most `ceiling` similar.

    With `beyond_squared_B` it is the nearest of those with a larger squared distance. If there is none, it is the
    farthest of all, which is closest to semi-hard.
    """
    if not len(rows_P):
        return no_negatives(len(queries_BD))
    half_squares_P = 0.5 * squared_norms(candidates_PD)
    scores_BP = queries_BD @ candidates_PD.T
    scores_BP[blocked.anchors, blocked.candidates] = -np.inf
    if filled_P is not None:
        scores_BP[:, ~filled_P] = -np.inf
    suspects = NO_SUSPECTS
    if ceiling is not None:
        suspects = _remove_suspects(scores_BP, queries_BD, half_squares_P, rows_P, ceiling)
    scores_BP -= half_squares_P
    if beyond_squared_B is None:
        best_B = scores_BP.argmax(axis=1)
    else:
        best_B = _semihard_positions(scores_BP, squared_norms(queries_BD) - beyond_squared_B)
    found_B = scores_BP[np.arange(len(best_B)), best_B] > -np.inf
    squared_B = squared_norms(queries_BD - candidates_PD[best_B])
    return Negatives(
        rows=np.where(found_B, rows_P[best_B], NO_ROW),
        squared_distances=np.where(found_B, squared_B, np.float32(np.inf)),
        suspects=suspects,
    )


def _semihard_positions(scores_BP: Floats, twice_bounds_B: Floats) -> Ints:
    """Return the position of the highest score below the bound, or of the lowest score if none is below."""
    below_BP = scores_BP.copy()
    np.copyto(below_BP, -np.inf, where=scores_BP >= 0.5 * twice_bounds_B[:, None])
    best_B = below_BP.argmax(axis=1)
    none = np.flatnonzero(below_BP[np.arange(len(best_B)), best_B] == -np.inf)
    allowed = np.where(scores_BP[none] > -np.inf, scores_BP[none], np.inf)
    best_B[none] = allowed.argmin(axis=1)
    return best_B


def _remove_suspects(
    dots_BP: Floats, queries_BD: Floats, half_squares_P: Floats, rows_P: Ints, ceiling: float
) -> Suspects:
    """Set the dot products of pairs above the ceiling to minus infinity, and return those pairs."""
    query_norms_B = np.sqrt(squared_norms(queries_BD))
    norms_P = np.sqrt(2 * half_squares_P)
    suspect_BP = dots_BP > np.multiply.outer(np.float32(ceiling) * query_norms_B, norms_P)
    anchors_X, positions_X = _true_pairs(suspect_BP)
    similarities_X = dots_BP[anchors_X, positions_X] / (query_norms_B[anchors_X] * norms_P[positions_X])
    dots_BP[anchors_X, positions_X] = -np.inf
    return _most_similar(Suspects(anchors=anchors_X, rows=rows_P[positions_X], similarities=similarities_X))


def _most_similar(suspects: Suspects) -> Suspects:
    """Return the `MAX_SUSPECTS` most similar pairs, most similar first."""
    order_X = np.lexsort((suspects.rows, suspects.anchors, -suspects.similarities))[:MAX_SUSPECTS]
    return Suspects(
        anchors=suspects.anchors[order_X],
        rows=suspects.rows[order_X],
        similarities=suspects.similarities[order_X],
    )


def no_negatives(num_queries: int) -> Negatives:
    """Return the answer of a search that finds nothing."""
    return Negatives(
        rows=np.full(num_queries, NO_ROW),
        squared_distances=np.full(num_queries, np.inf, np.float32),
        suspects=NO_SUSPECTS,
    )


def merge(parts: Sequence[Negatives], *, beyond_squared_B: Floats | None = None) -> Negatives:
    """Return the answer for all candidates from the answers for parts of them, in ascending order of rows."""
    squared_SB = np.stack([part.squared_distances for part in parts])
    best_B = squared_SB.argmin(axis=0)
    if beyond_squared_B is not None:
        found_SB = np.isfinite(squared_SB)
        beyond_SB = found_SB & (squared_SB > beyond_squared_B)
        nearest_B = np.where(beyond_SB, squared_SB, np.inf).argmin(axis=0)
        farthest_B = np.where(found_SB, squared_SB, -np.inf).argmax(axis=0)
        best_B = np.where(beyond_SB.any(axis=0), nearest_B, farthest_B)
    everyone = np.arange(len(best_B))
    return Negatives(
        rows=np.stack([part.rows for part in parts])[best_B, everyone],
        squared_distances=squared_SB[best_B, everyone],
        suspects=_most_similar(
            Suspects(
                anchors=np.concatenate([part.suspects.anchors for part in parts]),
                rows=np.concatenate([part.suspects.rows for part in parts]),
                similarities=np.concatenate([part.suspects.similarities for part in parts]),
            )
        ),
    )


def semihard_bounds(queries_BD: Floats, positives_BD: Floats) -> Floats:
    """Return the squared distance that a semi-hard negative exceeds: the positive's, plus the error of float32.

    Without this margin, chance would decide whether a copy of the positive under another identity is farther.
    """
    return 1.0001 * squared_norms(queries_BD - positives_BD) + 1e-6 * squared_norms(queries_BD)


def exact_negatives(
    queries_BD: Floats,
    labels_B: Ints,
    features_ND: Floats,
    labels_N: Ints,
    *,
    ceiling: float | None = None,
    filled_N: Bools | None = None,
    first_row: int = 0,
) -> Negatives:
    """Return for each anchor the nearest photo of all other identities, in chunks of bounded memory.

    The features may be float16. `first_row` is the row of the first feature, if the arrays are a part of all photos.
    """
    parts = [no_negatives(len(queries_BD))]
    for start in range(0, len(features_ND), CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        parts.append(
            search(
                queries_BD,
                features_ND[chunk].astype(np.float32, copy=False),
                first_row + np.arange(start, start + len(features_ND[chunk])),
                own_pairs(labels_B, labels_N[chunk]),
                ceiling=ceiling,
                filled_P=None if filled_N is None else filled_N[chunk],
            )
        )
    return merge(parts)


def _true_pairs(mask_BP: Bools) -> tuple[Ints, Ints]:
    """Return the same as `mask_BP.nonzero()`, several times faster."""
    return np.divmod(np.flatnonzero(mask_BP), max(mask_BP.shape[1], 1))
