"""An index for the nearest of very many vectors: exact where that is cheap, else an inverted file or a graph of faiss.

An inverted file (IVF) is made quickly. A graph (HNSW) takes longer to make, finds more in the same time, and a search
takes longer only with the logarithm of the number of points: it is for as many queries as points.

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
_LINKS, _TRIED_LINKS, _SEEN = 16, 40, 16
"""Links of a point of the graph, points that are tried for them, and points that a search keeps in view at first."""
_MOST_SEEN = 1024
_TRIED_QUERIES = 256


def neighbour_index(points_ND: Floats, *, many_queries: bool = False) -> Any:
    """Return an index for searches by squared Euclidean distance: exact, or of many points an inverted file.

    With `many_queries`, it is a graph of many points.
    """
    import faiss  # its import takes a moment, and most processes never search

    num, dim = points_ND.shape
    index: Any
    if num <= EXACT_UP_TO:
        index = faiss.IndexFlatL2(dim)
    elif many_queries:
        index = faiss.IndexHNSWFlat(dim, _LINKS)
        index.hnsw.efConstruction, index.hnsw.efSearch = _TRIED_LINKS, _SEEN
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
    """Let an index look at more points until it finds this share of the `num` nearest; return the share.

    It is measured on some of the queries against an exact search. With `within`, only neighbours up to this distance
    count. An exact index stays as it is.
    """
    import faiss

    is_graph = isinstance(index, faiss.IndexHNSW)
    if not (is_graph or hasattr(index, "nprobe")) or not len(queries_BD):
        return 1.0

    tried_BD = queries_BD[:: max(1, len(queries_BD) // _TRIED_QUERIES)]
    squared_BK, exact_BK = faiss.knn(tried_BD, points_ND, num)
    counts_BK = np.ones(exact_BK.shape, bool) if within is None else squared_BK <= within**2
    while True:
        found_BK = index.search(tried_BD, num)[1]
        is_found_BK = np.array([np.isin(exact_K, found_K) for exact_K, found_K in zip(exact_BK, found_BK, strict=True)])
        share = float(is_found_BK[counts_BK].mean()) if counts_BK.any() else 1.0
        if share >= recall or (index.hnsw.efSearch >= _MOST_SEEN if is_graph else index.nprobe >= index.nlist):
            return share
        if is_graph:
            index.hnsw.efSearch *= 2
        else:
            index.nprobe = min(2 * index.nprobe, index.nlist)
