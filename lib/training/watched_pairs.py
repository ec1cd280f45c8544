"""Watched pairs: each epoch is also measured on the pairs of files, such as LFW's.

Shape suffixes: M photos in pairs, P pairs, D dimensions of an embedding.
"""

import dataclasses
import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lib.errors import UserError
from lib.evaluation.metrics import failed_as_errors, pair_distances, verification_figures
from lib.recognition.model import EmbeddingModel
from lib.training import collective
from lib.training.embedding_passes import EmbeddingPass
from lib.training.epoch_choice import Difference, difference, pair_scores
from lib.training.face_cache import FaceCache
from lib.training.settings import TrainConfig
from lib.training.validation import Figures, figures_row
from lib.training.validation_sources import PairGroup

logger = logging.getLogger(__name__)

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.integer]


class WatchedPairs:
    """Measures the model of an epoch on the pairs of the files."""

    def __init__(self, groups: list[tuple[PairGroup, FaceCache]], config: TrainConfig, *, decide: bool) -> None:
        """Take the groups with a cache of the faces of each.

        Args:
            decide: whether the pairs of the first file decide which epoch is kept.
        """
        self._groups = [(group, cache, _rows(group.photos, cache)) for group, cache in groups]
        self._best_by = config.validation.best_by
        self._decide = decide and bool(groups)

    @property
    def decider(self) -> str:
        """Name of the file that decides which epoch is kept; empty if none does."""
        return self._groups[0][0].sets[0].name if self._decide else ""

    def added(self, figures: Figures, embedding: EmbeddingPass, model: EmbeddingModel) -> Figures:
        """Return the figures with those of the files. Every worker calls this; only the first gets them."""
        for group, cache, rows_M in self._groups:
            present_M = rows_M >= 0
            found = embedding.shared(rows_M[present_M], cache, model, mark_failed=True)
            if collective.rank():
                continue
            embeddings_MD = np.full((len(rows_M), found.shape[1]), np.nan, np.float32)
            embeddings_MD[present_M] = found
            figures = self._with_group(figures, group, embeddings_MD)
        return figures

    def _with_group(self, figures: Figures, group: PairGroup, embeddings_MD: Floats) -> Figures:
        failed_M = np.asarray(~np.isfinite(embeddings_MD).all(axis=1))
        embeddings_MD = np.where(failed_M[:, None], np.float32(0), embeddings_MD)
        for pair_set in group.sets:
            pairs = pair_set.pairs
            distances_P = failed_as_errors(pair_distances(embeddings_MD, pairs.a_P, pairs.b_P), pairs, failed_M)
            try:
                metrics = verification_figures(distances_P, pairs)
            except UserError as error:
                logger.warning("no accuracy of %s in this epoch: %s", pair_set.name, error)
                continue
            row = {f"{pair_set.name}_{name}": value for name, value in figures_row(metrics).items()}
            figures = dataclasses.replace(figures, row={**figures.row, **row})
            if pair_set.name == self.decider:
                figures = self._deciding(figures, metrics, distances_P, pair_set.pairs)
        return figures

    def _deciding(self, figures: Figures, metrics: dict[str, Any], distances_P: npt.NDArray, pairs: Any) -> Figures:
        scores_P = None if self._best_by == "loss" else pair_scores(distances_P, pairs, self._best_by)
        row = {**figures.row, **figures_row(metrics)}
        return dataclasses.replace(figures, row=row, metrics=metrics, scores_P=scores_P)

    def ahead(self, scores_P: Floats, earlier_P: Floats) -> Difference:
        """Return how far an epoch's scores on the deciding pairs are ahead of an earlier one's."""
        group = self._groups[0][0]
        return difference(scores_P, earlier_P, group.sets[0].pairs, group.people_M)


def _rows(photos: pa.Array, cache: FaceCache) -> Ints:
    """Return the row of each photo in the cache, -1 if there is none."""
    rows: Ints = pc.fill_null(pc.index_in(photos, cache.photos.combine_chunks()), -1).to_numpy()
    return rows.astype(np.int64)
