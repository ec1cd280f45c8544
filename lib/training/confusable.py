"""Which people the model confuses: the identities whose mean features are nearest to each other.

Nobody holds the means of all people. Each worker reduces a range of identities to means, in blocks that Ray shares
between the processes of a node. Once an epoch, each worker looks up the neighbours of the people whom it will ask for,
one block after the other. So a batch costs no search.

Shape suffixes: N photos (rows of the features), D dimensions of a feature, I identities of a range, J seeds, T
neighbours of a seed.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy import sparse

from lib.neighbour_index import neighbour_index, widen
from lib.training.mining import NO_ROW, Bools, Floats, Ints

if TYPE_CHECKING:
    import torch

BLOCK_PEOPLE = 1 << 18
"""Identities of a block: 134 MB of means of 128 dimensions."""

MIN_RECALL = 0.95
"""Share of the nearest people that a search finds. Up to 50,000 people and on GPUs it finds all."""

ROWS_AT_ONCE = 1 << 16
"""Features summed at once: a copy of 34 MB of 128 dimensions."""

_QUERIES_AT_ONCE = 4096

Block = tuple[int, Callable[[], Floats]]
"""The first identity of a block, and what returns the block's means [I, D]."""


def identity_sums(
    features_ND: Floats, labels_N: Ints, *, first: int, stop: int, filled_N: Bools | None = None
) -> tuple[Floats, Ints]:
    """Return the sum [I, D] and the number [I] of the filled features of the identities from `first` to before `stop`.

    The features may be float16. Sums and numbers of several shards add up to those of all photos.
    """
    taken_N = (labels_N >= first) & (labels_N < stop)
    rows = np.flatnonzero(taken_N if filled_N is None else taken_N & filled_N)
    local_M = labels_N[rows] - first
    sums_ID = np.zeros((stop - first, features_ND.shape[1]), np.float32)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        places = (local_M[start : start + ROWS_AT_ONCE], np.arange(len(some)))
        ones = np.ones(len(some), np.float32)
        sums_ID += sparse.csr_array((ones, places), (stop - first, len(some))) @ features_ND[some].astype(
            np.float32, copy=False
        )
    return sums_ID, np.bincount(local_M, minlength=stop - first)


def identity_means(sums_ID: Floats, counts_I: Ints) -> Floats:
    """Return the mean feature of each identity [I, D]; NaN for one without features."""
    return np.where(counts_I[:, None] > 0, sums_ID / np.maximum(counts_I, 1).astype(np.float32)[:, None], np.nan)


def confusable_people(
    seeds_J: Ints,
    blocks: Sequence[Block],
    *,
    num_neighbours: int,
    device: "torch.device | None" = None,
    among_I: Bools | None = None,
) -> npt.NDArray[np.int32]:
    """Return for each seed identity the `num_neighbours` others with the nearest mean features, nearest first [J, T].

    A batch of them shows the model the people whom it confuses. `NO_ROW` fills the places if too few identities have
    features, and all places of a seed without features. One block at a time is in memory. With `among_I` the others are
    of these identities.
    """
    found_JT = np.full((len(seeds_J), num_neighbours), NO_ROW, np.int32)
    squared_JT = np.full(found_JT.shape, np.inf, np.float32)
    seeds_JD = _means_of(seeds_J, blocks)
    known_J = np.flatnonzero(~np.isnan(seeds_JD).any(axis=1))
    for first, means in blocks:
        means_ID = means()
        is_known_I = ~np.isnan(means_ID).any(axis=1)
        if among_I is not None:
            is_known_I &= among_I[first : first + len(means_ID)]
        known_I = np.flatnonzero(is_known_I)
        if not len(known_I) or not len(known_J):
            continue
        # One more than asked for: a seed finds itself.
        num = min(num_neighbours + 1, len(known_I))
        found, squared = _search(seeds_JD[known_J], np.ascontiguousarray(means_ID[known_I]), num, device)
        people = (known_I[found] + first).astype(np.int32)
        squared = np.where((people == seeds_J[known_J, None]) | (found < 0), np.inf, squared)
        people = np.concatenate([found_JT[known_J], people], axis=1)
        squared = np.concatenate([squared_JT[known_J], squared], axis=1)
        order = np.lexsort((people, squared), axis=1)[:, :num_neighbours]
        found_JT[known_J] = np.take_along_axis(people, order, axis=1)
        squared_JT[known_J] = np.take_along_axis(squared, order, axis=1)
    return np.where(np.isfinite(squared_JT), found_JT, np.int32(NO_ROW))


def _means_of(seeds_J: Ints, blocks: Sequence[Block]) -> Floats:
    """Return the means of the seeds [J, D], NaN for one that no block holds."""
    seeds_JD: Floats | None = None
    for first, means in blocks:
        means_ID = means()
        if seeds_JD is None:
            seeds_JD = np.full((len(seeds_J), means_ID.shape[1]), np.nan, np.float32)
        mine = np.flatnonzero((seeds_J >= first) & (seeds_J < first + len(means_ID)))
        seeds_JD[mine] = means_ID[seeds_J[mine] - first]
    return np.empty((len(seeds_J), 0), np.float32) if seeds_JD is None else seeds_JD


def _search(
    queries_BD: Floats, points_ND: Floats, num: int, device: "torch.device | None"
) -> tuple[npt.NDArray[np.int64], Floats]:
    """Return the positions and the squared distances of the nearest points of each query [B, K]; -1 for none."""
    if device is not None and device.type == "cuda":
        return search_on_device(queries_BD, points_ND, num, device)
    index = neighbour_index(points_ND)
    widen(index, points_ND, queries_BD, num, MIN_RECALL)
    squared_BK, found_BK = index.search(queries_BD, num)
    return found_BK, squared_BK


def search_on_device(
    queries_BD: Floats, points_ND: Floats, num: int, device: "torch.device"
) -> tuple[npt.NDArray[np.int64], Floats]:
    """Return what `_search` does, exactly, by matrix products on a device."""
    import torch  # takes seconds, which a job that computes nothing need not wait

    points = torch.from_numpy(points_ND).to(device)
    squares_N = points.square().sum(dim=1)
    found, squared = [], []
    for start in range(0, len(queries_BD), _QUERIES_AT_ONCE):
        queries = torch.from_numpy(queries_BD[start : start + _QUERIES_AT_ONCE]).to(device)
        distances_BN = torch.addmm(squares_N, queries, points.T, alpha=-2)
        nearest = distances_BN.topk(num, dim=1, largest=False)
        found.append(nearest.indices.cpu().numpy())
        squared.append((nearest.values + queries.square().sum(dim=1, keepdim=True)).cpu().numpy())
    return np.concatenate(found), np.concatenate(squared)
