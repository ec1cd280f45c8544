"""Finds photos that are the same picture: near in embedding, alike in light and dark, and equal when aligned.

Shapes: N faces, M others, P pairs, U faces in pairs, K neighbours, B bytes, D dimension.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from lib.curation.neighbour_graph import MIN_RECALL
from lib.curation.proposals import DUPLICATE, NOBODY, Proposal
from lib.neighbour_index import neighbour_index, widen

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

NEAR_SHARE = 0.6
"""Copies of one photo are within this share of the threshold, even if they were resized and compressed again."""
MAX_DIFFERENCE = 0.3
"""Two crops are compared pixel by pixel if at most this share of the bits of their patterns differs."""
MIN_CORRELATION = 0.99
"""They are one picture if, moved onto each other, they correlate as much. docs/measurements.md has the figures."""
_NEIGHBOURS = 8
_PATTERN_SIDE, _PATCH_SIDE, _EDGE = 16, 48, 4
_STOP = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 20, 1e-3)

CropsOf = Callable[[Iterable[str]], Iterable[tuple[str, bytes]]]
"""Yields photo and JPEG of each of these photos that has a crop."""


def near_pairs(vectors_ND: Floats, others_MD: Floats, limit: float) -> tuple[Ints, Floats]:
    """Return the pairs [P, 2] of a face and one of the others within `limit` of it, and their distances [P].

    A face is paired only with its nearest few.
    """
    if not len(vectors_ND) or not len(others_MD):
        return np.empty((0, 2), np.int64), np.empty(0, np.float32)
    points_MD, queries_ND = (np.ascontiguousarray(each, np.float32) for each in (others_MD, vectors_ND))
    num = min(_NEIGHBOURS, len(points_MD))
    index = neighbour_index(points_MD)
    widen(index, points_MD, queries_ND, num, MIN_RECALL, within=limit)
    squared_NK, at_NK = index.search(queries_ND, num)
    distance_NK = np.sqrt(np.maximum(squared_NK, 0))
    taken_NK = (at_NK >= 0) & (distance_NK <= limit)
    return np.stack([np.nonzero(taken_NK)[0], at_NK[taken_NK]], axis=1), distance_NK[taken_NK]


def light_pattern(crop: bytes) -> NDArray[np.uint8]:
    """Return whether each of 16 x 16 places of a crop is lighter than the one to its left, as bits [32].

    This is the difference hash of Krawetz, "Kind of like that" (2013). Size and compression hardly change it.
    """
    small = cv2.resize(_luma(crop), (_PATTERN_SIDE + 1, _PATTERN_SIDE), interpolation=cv2.INTER_AREA)
    return np.packbits(small[:, 1:] > small[:, :-1])


def patch(crop: bytes) -> NDArray[np.float32]:
    """Return the luma of a crop, 48 x 48."""
    small = cv2.resize(_luma(crop), (_PATCH_SIDE, _PATCH_SIDE), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32)


def correlation(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return the correlation of two patches after the affine map that makes it highest; 0 if none is found.

    A copy that was cut or scaled is aligned a little differently. The map is found as in Evangelidis and Psarakis,
    "Parametric image alignment using enhanced correlation coefficient maximization" (2008).
    """
    if np.array_equal(one, other):
        return 1.0
    inner = np.zeros(one.shape, np.uint8)
    inner[_EDGE:-_EDGE, _EDGE:-_EDGE] = 1
    try:
        found = cv2.findTransformECC(one, other, np.eye(2, 3, dtype=np.float32), cv2.MOTION_AFFINE, _STOP, inner, 3)
    except cv2.error:  # it does not converge: these are two pictures
        return 0.0
    return float(found[0])


def _luma(crop: bytes) -> NDArray[np.uint8]:
    return np.asarray(cv2.imdecode(np.frombuffer(crop, np.uint8), cv2.IMREAD_GRAYSCALE), np.uint8)


def duplicates(
    pairs_P2: Ints, distances_P: Floats, photos: Sequence[str], identity_N: Ints, crops_of: CropsOf
) -> list[Proposal]:
    """Return a proposal for each pair whose crops are one picture: the second photo loses its identity.

    If the two have different identities, at most one of these is right, and a person has to decide. Crops are read
    twice, one after the other: first for their patterns, then those whose patterns are alike.
    """
    patterns_U, known_P, at_P2 = _of_faces(pairs_P2, photos, crops_of, light_pattern)
    if not known_P.any():
        return []
    pairs_P2, distances_P = pairs_P2[known_P], distances_P[known_P]
    patterns_UB = np.stack(patterns_U)
    alike_P = np.bitwise_count(patterns_UB[at_P2[:, 0]] ^ patterns_UB[at_P2[:, 1]]).sum(axis=1) <= (
        MAX_DIFFERENCE * _PATTERN_SIDE**2
    )
    pairs_P2, distances_P = pairs_P2[alike_P], distances_P[alike_P]
    patches_U, _, at_P2 = _of_faces(pairs_P2, photos, crops_of, patch)
    found = []
    for (a, b), (a_at, b_at), distance in zip(pairs_P2.tolist(), at_P2.tolist(), distances_P.tolist(), strict=True):
        likeness = correlation(patches_U[a_at], patches_U[b_at])
        if likeness >= MIN_CORRELATION:
            found.append(
                Proposal(
                    kind=DUPLICATE,
                    certainty=1 - (1 - min(1.0, likeness)) / (1 - MIN_CORRELATION),
                    faces=np.array([b]),
                    identity=int(identity_N[b]),
                    to=NOBODY,
                    evidence=np.array([a]),
                    distance=distance,
                )
            )
    return found


def _of_faces(
    pairs_P2: Ints, photos: Sequence[str], crops_of: CropsOf, measure: Callable[[bytes], NDArray[Any]]
) -> tuple[list[NDArray[Any]], NDArray[np.bool_], Ints]:
    """Return the measures of the crops of pairs, which pairs have both crops, and where the measures of these are."""
    row_of = {photos[n]: n for n in np.unique(pairs_P2).tolist()}
    place_N = np.full(len(photos), -1)
    measures: list[NDArray[Any]] = []
    for photo, crop in crops_of(row_of) if row_of else ():
        place_N[row_of[photo]] = len(measures)
        measures.append(measure(crop))
    known_P = np.asarray((place_N[pairs_P2] >= 0).all(axis=1))
    return measures, known_P, place_N[pairs_P2[known_P]]
