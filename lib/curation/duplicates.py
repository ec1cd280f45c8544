"""Finds photos that are the same picture: near in embedding, with the same rough pattern of light and dark.

Shapes: N faces, P pairs, D dimension.
"""

from collections.abc import Mapping

import cv2
import numpy as np
from numpy.typing import NDArray

from lib.curation.proposals import DUPLICATE, NOBODY, Proposal
from lib.neighbour_index import neighbour_index

Floats = NDArray[np.floating]
Ints = NDArray[np.int64]

NEAR_SHARE = 0.6
"""Copies of one photo are within this share of the threshold, even if they were resized and compressed again."""
MAX_DIFFERENCE = 0.16
"""Two crops are one picture if at most this share of the bits of their patterns differs."""
_NEIGHBOURS = 8
_PATTERN_SIDE = 16


def near_pairs(vectors_ND: Floats, limit: float, others_ND: Floats | None = None) -> tuple[Ints, Floats]:
    """Return the pairs [P, 2] of faces within `limit` of each other, and their distances [P].

    A face is paired only with its nearest few. With `others_ND`, the second face of a pair is one of the others.
    """
    candidates_ND = vectors_ND if others_ND is None else others_ND
    if not len(vectors_ND) or not len(candidates_ND):
        return np.empty((0, 2), np.int64), np.empty(0, np.float32)
    index = neighbour_index(np.ascontiguousarray(candidates_ND, np.float32))
    num = min(_NEIGHBOURS + 1, len(candidates_ND))
    squared_NK, at_NK = index.search(np.ascontiguousarray(vectors_ND, np.float32), num)
    a_P, b_P = np.repeat(np.arange(len(vectors_ND)), num), at_NK.ravel()
    distance_P = np.sqrt(np.maximum(squared_NK.ravel(), 0))
    taken_P = (b_P >= 0) & (distance_P <= limit)
    if others_ND is None:
        taken_P &= a_P != b_P
        a_P, b_P = np.minimum(a_P, b_P), np.maximum(a_P, b_P)
    pairs_P2, first = np.unique(np.stack([a_P[taken_P], b_P[taken_P]], axis=1), axis=0, return_index=True)
    return pairs_P2.astype(np.int64), distance_P[taken_P][first]


def light_pattern(crop: bytes) -> NDArray[np.bool_]:
    """Return whether each of 16 x 16 places of a crop is lighter than the one to its left [256].

    This is the difference hash of Krawetz, "Kind of like that" (2013). Size and compression hardly change it.
    """
    luma = cv2.imdecode(np.frombuffer(crop, np.uint8), cv2.IMREAD_GRAYSCALE)
    small = cv2.resize(luma, (_PATTERN_SIDE + 1, _PATTERN_SIDE), interpolation=cv2.INTER_AREA)
    return np.asarray(small[:, 1:] > small[:, :-1]).ravel()


def duplicates(
    pairs_P2: Ints, distances_P: Floats, photos: list[str], identity_N: Ints, crops: Mapping[str, bytes]
) -> list[Proposal]:
    """Return a proposal for each pair whose crops are one picture: the second photo loses its identity.

    If the two have different identities, at most one of these is right, and a person has to decide.
    """
    patterns = {n: light_pattern(crops[photos[n]]) for n in np.unique(pairs_P2).tolist() if photos[n] in crops}
    found = []
    for (a, b), distance in zip(pairs_P2.tolist(), distances_P.tolist(), strict=True):
        if a in patterns and b in patterns:
            difference = float(np.mean(patterns[a] != patterns[b]))
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
