"""Finds photos that are the same picture: near in embedding, with the same rough pattern of light and dark.

Shapes: N faces, M others, P pairs, K neighbours, D dimension.
"""

from collections.abc import Iterable, Sequence

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
MAX_DIFFERENCE = 0.16
"""Two crops are one picture if at most this share of the bits of their patterns differs."""
_NEIGHBOURS = 8
_PATTERN_SIDE = 16


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


def light_pattern(crop: bytes) -> NDArray[np.bool_]:
    """Return whether each of 16 x 16 places of a crop is lighter than the one to its left [256].

    This is the difference hash of Krawetz, "Kind of like that" (2013). Size and compression hardly change it.
    """
    luma = cv2.imdecode(np.frombuffer(crop, np.uint8), cv2.IMREAD_GRAYSCALE)
    small = cv2.resize(luma, (_PATTERN_SIDE + 1, _PATTERN_SIDE), interpolation=cv2.INTER_AREA)
    return np.asarray(small[:, 1:] > small[:, :-1]).ravel()


def duplicates(
    pairs_P2: Ints, distances_P: Floats, photos: Sequence[str], identity_N: Ints, crops: Iterable[tuple[str, bytes]]
) -> list[Proposal]:
    """Return a proposal for each pair whose crops are one picture: the second photo loses its identity.

    If the two have different identities, at most one of these is right, and a person has to decide.

    Args:
        crops: photo and JPEG of each face in the pairs that has one. They are read once, one after the other.
    """
    row_of = {photos[n]: n for n in np.unique(pairs_P2).tolist()}
    place_N = np.full(len(photos), -1)
    patterns: list[NDArray[np.bool_]] = []
    for photo, crop in crops:
        place_N[row_of[photo]] = len(patterns)
        patterns.append(light_pattern(crop))
    known_P = (place_N[pairs_P2] >= 0).all(axis=1)
    pairs_P2, distances_P = pairs_P2[known_P], distances_P[known_P]
    found = []
    for (a, b), distance in zip(pairs_P2.tolist(), distances_P.tolist(), strict=True):
        difference = float(np.mean(patterns[place_N[a]] != patterns[place_N[b]]))
        if difference <= MAX_DIFFERENCE:
            found.append(
                Proposal(
                    kind=DUPLICATE,
                    certainty=1 - difference / MAX_DIFFERENCE,
                    faces=np.array([b]),
                    identity=int(identity_N[b]),
                    to=NOBODY,
                    evidence=np.array([a]),
                    distance=distance,
                )
            )
    return found
