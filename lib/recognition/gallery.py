"""Who is it? The nearest faces of a gallery, as plain functions on arrays.

Exact search is a matrix product: it needs no index, and costs the same for each probe and each gallery face. A graph
(HNSW, Malkov and Yashunin 2018) answers a probe ten times sooner in a gallery of 100,000, but building it costs as much
as some ten or twenty thousand exact probes, whatever the size: docs/measurements.md.

Shapes: B probes (of one chunk where it says so), G gallery faces, K matches, D embedding dimension.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lib.errors import UserError

CHUNK_ELEMENTS = 1 << 24
"""Largest intermediate array: 64 MB in float32, so that a gallery of millions takes little beside itself."""
BLOCK_ROWS = 1 << 14
"""Gallery faces that are compared with a chunk of probes at once."""


APPROXIMATE_GALLERY, APPROXIMATE_PROBES = 2_000_000, 20_000
"""From so many gallery faces and probes on, `auto` builds the graph."""

HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 16, 60, 128
"""Links a face, and faces looked at when one is added and when one is looked for."""

Search = Literal["auto", "exact", "approximate"]


def nearest(
    probes_BD: NDArray[np.float32], gallery_GD: NDArray[np.float32], num: int, search: Search = "exact"
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the indices [B, K] and Euclidean distances [B, K] of the nearest gallery faces, the nearest first.

    K is `num`, or the size of a smaller gallery. Equally near ones stand in the order of the gallery. `approximate` may
    miss a few of them; the distances of those it finds are exact. `auto` is exact where the graph would not pay.

    Raises:
        UserError: an empty gallery, or vectors of another length than the gallery's.
    """
    if not len(gallery_GD):
        raise UserError("the gallery is empty: embed photos with faces into it with jobs/embed.py")
    if probes_BD.shape[1] != gallery_GD.shape[1]:
        raise UserError(
            f"the probes have {probes_BD.shape[1]} numbers and the gallery {gallery_GD.shape[1]}: "
            "embed both with one model"
        )
    num = min(num, len(gallery_GD))
    if search == "auto":
        pays = len(gallery_GD) >= APPROXIMATE_GALLERY and len(probes_BD) >= APPROXIMATE_PROBES
        search = "approximate" if pays else "exact"
    find = _graph_search if search == "approximate" else _all
    return _sorted(probes_BD, gallery_GD, find(probes_BD, gallery_GD, num))


def _graph_search(probes_BD: NDArray[np.float32], gallery_GD: NDArray[np.float32], num: int) -> NDArray[np.int64]:
    import faiss

    index = faiss.IndexHNSWFlat(gallery_GD.shape[1], HNSW_LINKS)
    index.hnsw.efConstruction, index.hnsw.efSearch = HNSW_BUILD, max(HNSW_SEARCH, 2 * num)
    index.add(gallery_GD)
    index_BK = index.search(np.ascontiguousarray(probes_BD), num)[1]
    # A graph may fall apart where many faces are alike: a probe that found too few is compared with all.
    short_B = (index_BK < 0).any(axis=1)
    index_BK[short_B] = _all(probes_BD[short_B], gallery_GD, num)
    return index_BK


def _all(probes_BD: NDArray[np.float32], gallery_GD: NDArray[np.float32], num: int) -> NDArray[np.int64]:
    """Return the nearest of all, a chunk of probes and a block of the gallery at a time, keeping the best so far."""
    step = max(1, CHUNK_ELEMENTS // BLOCK_ROWS)
    found_BK = np.empty((len(probes_BD), num), np.int64)
    for start in range(0, len(probes_BD), step):
        chunk_BD = probes_BD[start : start + step]
        best_BK = np.empty((len(chunk_BD), 0), np.float32)
        index_BK = np.empty((len(chunk_BD), 0), np.int64)
        for first in range(0, len(gallery_GD), BLOCK_ROWS):
            block_GD = gallery_GD[first : first + BLOCK_ROWS]
            # Farness orders as the distance does: squared distance, without the probe's own square.
            farness_BG = chunk_BD @ block_GD.T
            farness_BG *= -2
            farness_BG += np.einsum("gd,gd->g", block_GD, block_GD)
            taken = min(num, len(block_GD))
            at_BK = np.argpartition(farness_BG, taken - 1, axis=1)[:, :taken]
            best_BK = np.concatenate([best_BK, np.take_along_axis(farness_BG, at_BK, axis=1)], axis=1)
            index_BK = np.concatenate([index_BK, at_BK + first], axis=1)
            order_BK = np.lexsort((index_BK, best_BK), axis=1)[:, :num]
            best_BK = np.take_along_axis(best_BK, order_BK, axis=1)
            index_BK = np.take_along_axis(index_BK, order_BK, axis=1)
        found_BK[start : start + step] = index_BK
    return found_BK


def _sorted(
    probes_BD: NDArray[np.float32], gallery_GD: NDArray[np.float32], index_BK: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Order what was found by the distances of the vectors themselves: short cuts lose digits where two are alike."""
    distance_BK = np.empty(index_BK.shape, np.float32)
    for k in range(index_BK.shape[1]):
        difference_BD = probes_BD - gallery_GD[index_BK[:, k]]
        distance_BK[:, k] = np.sqrt(np.einsum("bd,bd->b", difference_BD, difference_BD))
    order_BK = np.lexsort((index_BK, distance_BK), axis=1)
    return np.take_along_axis(index_BK, order_BK, axis=1), np.take_along_axis(distance_BK, order_BK, axis=1)
