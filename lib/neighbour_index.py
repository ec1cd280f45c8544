"""An index for the nearest of very many vectors: exact where that is cheap, else an inverted file (faiss's IVF).

Shapes: N points, B queries, K matches, D dimension.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

EXACT_UP_TO = 50_000
"""Points that are searched exactly. More are searched by an inverted file."""
_PROBED = 8
"""An inverted file looks into so many of its lists at first; `widen` makes them more."""
_TRAINED, _ROUNDS = 40, 10
"""Points for each list, and rounds, of k-means, which makes the lists."""
_TRIED_QUERIES = 256


def neighbour_index(points_ND: Floats) -> Any:
    """Return an index for searches by squared Euclidean distance: exact, or an inverted file of many points."""
    import faiss  # its import takes a moment, and most processes never search

    num, dim = points_ND.shape
    index: Any
    if num <= EXACT_UP_TO:
        index = faiss.IndexFlatL2(dim)
    else:
        num_lists = int(4 * num**0.5)
        index = faiss.index_factory(dim, f"IVF{num_lists},Flat")
        index.cp.max_points_per_centroid, index.cp.niter = _TRAINED, _ROUNDS
        index.train(points_ND[:: max(1, num // (_TRAINED * num_lists))])
        index.nprobe = _PROBED
    index.add(points_ND)
    return index


def widen(
    index: Any, points_ND: Floats, queries_BD: Floats, num: int, recall: float, *, within: float | None = None
) -> float:
    """Let an inverted file look into more lists until it finds this share of the `num` nearest; return the share.

    It is measured on some of the queries against an exact search. With `within`, only neighbours up to this distance
    count. An exact index stays as it is.
    """
    if not hasattr(index, "nprobe") or not len(queries_BD):
        return 1.0
    import faiss

    tried_BD = queries_BD[:: max(1, len(queries_BD) // _TRIED_QUERIES)]
    squared_BK, exact_BK = faiss.knn(tried_BD, points_ND, num)
    counts_BK = np.ones(exact_BK.shape, bool) if within is None else squared_BK <= within**2
    while True:
        found_BK = index.search(tried_BD, num)[1]
        is_found_BK = np.array([np.isin(exact_K, found_K) for exact_K, found_K in zip(exact_BK, found_BK, strict=True)])
        share = float(is_found_BK[counts_BK].mean()) if counts_BK.any() else 1.0
        if share >= recall or index.nprobe >= index.nlist:
            return share
        index.nprobe = min(2 * index.nprobe, index.nlist)
