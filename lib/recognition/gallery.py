"""Identification: the nearest faces of a gallery.

Exact search needs no index; its cost grows with probes x gallery faces. A graph (HNSW, Malkov and Yashunin 2018)
answers a probe ten times faster in a gallery of 100,000, but building it costs as much as some ten or twenty thousand
exact probes, whatever the size: docs/measurements.md.

Shapes: B probes, G gallery faces, K matches, D embedding dimension.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lib import nearest as exact
from lib.errors import UserError

APPROXIMATE_GALLERY, APPROXIMATE_PROBES = 2_000_000, 20_000
"""Number of gallery faces and of probes from which `auto` builds the graph."""

HNSW_LINKS, HNSW_BUILD, HNSW_SEARCH = 16, 60, 128
"""Links per face, and faces visited when a face is added and when one is searched."""

Search = Literal["auto", "exact", "approximate"]


def nearest(
    probes_BD: NDArray[np.float32], gallery_GD: NDArray[np.float32], num: int, search: Search = "exact"
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the indices [B, K] and Euclidean distances [B, K] of the nearest gallery faces, the nearest first.

    K is `num`, or the size of a smaller gallery. Ties are in the order of the gallery. `approximate` can miss a few
    faces, but the distances it returns are exact. `auto` is exact unless the graph is faster.

    Raises:
        UserError: the gallery is empty, or the vectors have different lengths.
    """
    if not len(gallery_GD):
        raise UserError("the gallery is empty: embed photos with faces into it with jobs/embed.py")
    if probes_BD.shape[1] != gallery_GD.shape[1]:
        raise UserError(
            f"probes have {probes_BD.shape[1]} dimensions and the gallery {gallery_GD.shape[1]}: "
            "embed both with one model"
        )
    num = min(num, len(gallery_GD))
    if search == "auto":
        pays = len(gallery_GD) >= APPROXIMATE_GALLERY and len(probes_BD) >= APPROXIMATE_PROBES
        search = "approximate" if pays else "exact"
    if search == "exact":
        return exact.nearest(probes_BD, gallery_GD, num)
    return exact.by_distance(probes_BD, gallery_GD, _graph_search(probes_BD, gallery_GD, num))


def _graph_search(probes_BD: NDArray[np.float32], gallery_GD: NDArray[np.float32], num: int) -> NDArray[np.int64]:
    import faiss

    index = faiss.IndexHNSWFlat(gallery_GD.shape[1], HNSW_LINKS)
    index.hnsw.efConstruction, index.hnsw.efSearch = HNSW_BUILD, max(HNSW_SEARCH, 2 * num)
    index.add(gallery_GD)
    index_BK = index.search(np.ascontiguousarray(probes_BD), num)[1]
    # A graph can be disconnected when many faces are alike. A probe with too few matches is compared with all faces.
    short_B = (index_BK < 0).any(axis=1)
    index_BK[short_B] = exact.nearest(probes_BD[short_B], gallery_GD, num)[0]
    return index_BK
