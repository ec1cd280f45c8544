"""Vectors of templates: the images of one person that belong together, averaged within each media.

Shapes: N images, R rows (an image in a template), T templates, D embedding dimension.
"""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from lib import storage
from lib.evaluation.ijb_files import IjbSet
from lib.faces import table
from lib.recognition.encoded_crops import unit_vectors
from lib.threads import ahead

_READERS, _FILES_AHEAD = 4, 8


def template_vectors(
    one: IjbSet, files: Sequence[str], *, by_score: bool
) -> tuple[NDArray[np.float32], NDArray[np.bool_], Counter[str]]:
    """Return the vector of each template [T, D] of length 1, which templates have none [T], and the failed images.

    The images of each media are averaged. The vector of a template is the sum of these means, divided by its length.
    With `by_score`, each image is first multiplied by its detector's score. Images that cannot be read are left out.
    `files` hold the embeddings in the order of the images. Only a few of them are in memory at a time.
    """
    statuses: list[str] = []
    with ThreadPoolExecutor(_READERS) as pool:
        for read in ahead(pool, _statuses, files, num_ahead=_FILES_AHEAD):
            statuses += read
        is_there_N = np.array([status == table.ALIGNED for status in statuses])
        weight_R = row_weights(one, is_there_N, by_score=by_score)
        order_R = np.argsort(one.image_R, kind="stable")
        sum_TD, first = None, 0
        for vectors_ND in ahead(pool, _embeddings, files, num_ahead=_FILES_AHEAD):
            if sum_TD is None:
                sum_TD = np.zeros((len(one.templates_T), vectors_ND.shape[1]))
            ends = np.searchsorted(one.image_R, [first, first + len(vectors_ND)], sorter=order_R)
            rows_R = order_R[slice(*ends)]
            touched, place_R = np.unique(one.template_R[rows_R], return_inverse=True)
            weights = csr_array(
                (weight_R[rows_R], (place_R, one.image_R[rows_R] - first)), shape=(len(touched), len(vectors_ND))
            )
            sum_TD[touched] += weights @ vectors_ND.astype(np.float64)
            first += len(vectors_ND)
    assert sum_TD is not None
    assert first == len(one.images)
    failed_T = np.bincount(one.template_R, weights=is_there_N[one.image_R], minlength=len(one.templates_T)) == 0
    failed = Counter(status for status in statuses if status != table.ALIGNED)
    return unit_vectors(sum_TD).astype(np.float32), failed_T, failed


def row_weights(one: IjbSet, is_there_N: NDArray[np.bool_], *, by_score: bool) -> NDArray[np.float64]:
    """Return the weight of each image in its template [R]: one over the number of images of its media there."""
    is_there_R = is_there_N[one.image_R]
    media_R = np.unique(one.media_R, return_inverse=True)[1]
    group_R = np.unique(one.template_R * (int(media_R.max()) + 1) + media_R, return_inverse=True)[1]
    count_R = np.bincount(group_R, weights=is_there_R)[group_R]
    weight_R = np.where(is_there_R, 1 / np.maximum(count_R, 1), 0.0)
    return weight_R * one.score_N[one.image_R] if by_score else weight_R


def _statuses(url: str) -> list[str]:
    statuses: list[str] = storage.read_parquet(url, table.columns("status"))["status"].to_pylist()
    return statuses


def _embeddings(url: str) -> NDArray[np.float32]:
    """Return the embeddings [N, D] of a file, with zeros for failed images."""
    column = storage.read_parquet(url).column("embedding").combine_chunks()
    vectors_ND = np.zeros((len(column), column.type.list_size), np.float32)
    vectors_ND[column.is_valid().to_numpy(zero_copy_only=False)] = (
        column.flatten().to_numpy().reshape(-1, column.type.list_size)
    )
    return vectors_ND
