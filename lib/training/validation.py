"""Validation of an epoch: fixed photos of people who are not trained on, in fixed pairs, triplets and batches.

Every photo is embedded once an epoch; all figures are computed from these embeddings.

Shape suffixes: V validation photos, P pairs, T triplets, D dimensions of an embedding.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lib.errors import UserError
from lib.evaluation.curves import far_key
from lib.evaluation.metrics import pair_distances, verification_figures
from lib.evaluation.pairs import Pairs, made_pairs
from lib.training import mining
from lib.training.epoch_choice import INTERVAL, Difference, difference, pair_scores
from lib.training.face_cache import FaceCache
from lib.training.face_names import chosen_people
from lib.training.losses import triplet_margin_loss
from lib.training.objective import people_loss
from lib.training.settings import TrainConfig
from lib.training.triplets import IdentityBatchSampler, PhotoIndex, Triplets, draw_triplets

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.integer]

NUM_FOLDS = 10
REPORTED_FAR = 1e-3
ENOUGH_PEOPLE = 200
"""With fewer validation people a run warns that its figures mean little."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The validation figures of an epoch's model."""

    row: dict[str, Any]
    """For the history."""
    loss: float
    """With the epoch's own policy of negatives; NaN without validation people."""
    loss_random: float
    """With random negatives, for any policy."""
    variance: float
    """Variance of the embeddings, summed over the dimensions; near 0 if all are alike."""
    metrics: dict[str, Any]
    """Of the verification, as `lib.evaluation.metrics.verification_figures` names them; empty without pairs."""
    scores_P: Floats | None = None
    """Each pair's part in the metric of `--best-by`; None if that is no metric of pairs."""


def figures_row(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of the history for a verification."""
    figures = {name: metrics[name] for name in ("accuracy", "accuracy_std", "auc", "eer")}
    return {**figures, "tar_at_far_1e-3": metrics["tar_at_far"][far_key(REPORTED_FAR)]}


class Validation:
    """The fixed photos, pairs, triplets and batches.

    Attributes:
        rows_V: rows of the cache to embed, ascending; empty if the split has too few people.
        problem: why there are no figures, or no verification; else empty.
        notice: warns that few people make the figures uncertain; else empty.
    """

    def __init__(self, cache: FaceCache | None, config: TrainConfig) -> None:
        """Choose whole people by the seed up to `--val-photos` photos, then pairs and triplets of them."""
        self._config = config
        self.problem = self.notice = ""
        self.rows_V: Ints = np.empty(0, np.int64)
        self._index: PhotoIndex | None = None
        self._pairs: Pairs | None = None
        if cache is None:
            self.problem = "no photo of a validation person is aligned"
            return
        people = chosen_people(cache.labels_N, config.validation.val_photos, config.run.seed)
        rows_V = np.flatnonzero(np.isin(cache.labels_N, people))
        try:
            self._index = PhotoIndex(cache.labels_N[rows_V])
            self.rows_V = rows_V
            photos = cache.photos.take(rows_V).to_pylist()
            identities = [cache.identities[label] for label in cache.labels_N[rows_V]]
            self._pairs = made_pairs(
                photos, identities, num_pairs=config.validation.num_pairs, num_folds=NUM_FOLDS, seed=config.run.seed
            )
            self.notice = _notice(len(set(identities)))
        except UserError as error:
            self.problem = f"the validation people are too few: {error}"
        if self._index is not None:
            self._triplets = draw_triplets(self._index, config.validation.val_triplets, seed=config.run.seed)
            self._batches = _fixed_batches(self._index, config)

    @property
    def has_pairs(self) -> bool:
        """Whether there are pairs of validation people. They then decide which epoch is kept."""
        return self._pairs is not None

    def figures(self, embeddings_VD: Floats, negatives: str) -> Figures:
        """Return the figures for the embeddings of `rows_V`."""
        if self._index is None:
            return Figures(row={}, loss=math.nan, loss_random=math.nan, variance=math.nan, metrics={})
        finite_V = np.isfinite(embeddings_VD).all(axis=1)
        if not finite_V.all():
            return Figures(row={}, loss=math.nan, loss_random=math.nan, variance=math.nan, metrics={})
        variance = float(embeddings_VD.var(axis=0).sum())
        loss_random = self._triplet_loss(embeddings_VD, self._triplets)
        if self._config.sampling.batch == "identities":
            loss = self._batch_loss(embeddings_VD)
        elif negatives == "random":
            loss = loss_random
        else:
            loss = self._triplet_loss(embeddings_VD, self._mined(embeddings_VD, negatives))
        metrics: dict[str, Any] = {}
        scores_P: Floats | None = None
        if self._pairs is not None:
            distances_P = pair_distances(embeddings_VD, self._pairs.a_P, self._pairs.b_P)
            metrics = verification_figures(distances_P, self._pairs)
            if self._config.validation.best_by != "loss":
                scores_P = pair_scores(distances_P, self._pairs, self._config.validation.best_by)
        row = {
            "val_loss": loss,
            "num_val_triplets": len(self._triplets),
            "val_loss_random": loss_random,
            "embedding_variance": variance,
            **(figures_row(metrics) if metrics else {}),
        }
        return Figures(
            row=row, loss=loss, loss_random=loss_random, variance=variance, metrics=metrics, scores_P=scores_P
        )

    def ahead(self, scores_P: Floats, earlier_P: Floats) -> Difference:
        """Return how far an epoch's scores are ahead of an earlier epoch's, with the error of that."""
        assert self._index is not None
        assert self._pairs is not None
        return difference(scores_P, earlier_P, self._pairs, self._index.labels_N)

    def _triplet_loss(self, embeddings_VD: Floats, triplets: Triplets) -> float:
        anchors, positives, negatives = (
            torch.from_numpy(embeddings_VD[rows]) for rows in (triplets.anchors, triplets.positives, triplets.negatives)
        )
        loss = triplet_margin_loss(
            anchors, positives, negatives, margin=self._config.objective.margin, squared=self._config.objective.squared
        )
        return loss.mean.item()

    def _batch_loss(self, embeddings_VD: Floats) -> float:
        assert self._index is not None
        total, count = 0.0, 0
        for rows in self._batches:
            loss = people_loss(
                torch.from_numpy(embeddings_VD[rows.ravel()]),
                torch.from_numpy(self._index.labels_N[rows.ravel()].astype(np.int64)),
                self._config,
            )
            # All batches have equally many pairs, but not semi-hard triplets.
            term = self._config.objective.terms.batch
            weight = int(loss.num_semihard.item()) if term is not None and term.name == "semihard" else 1
            total += loss.mean.item() * weight
            count += weight
        return total / count if count else 0.0

    def _mined(self, embeddings_VD: Floats, negatives: str) -> Triplets:
        """Return the fixed anchors and positives with the negatives that the policy finds among these photos."""
        assert self._index is not None
        fixed = self._triplets
        labels_V = self._index.labels_N
        queries_TD, labels_T = embeddings_VD[fixed.anchors], labels_V[fixed.anchors]
        if negatives == "exact":
            found = mining.exact_negatives(queries_TD, labels_T, embeddings_VD, labels_V)
        else:
            pool = mining.draw_candidates(
                labels_T,
                labels_V,
                num_candidates=self._config.mining.candidates,
                rng=np.random.default_rng(self._config.run.seed),
            )
            bounds = None
            if negatives == "semihard":
                bounds = mining.semihard_bounds(queries_TD, embeddings_VD[fixed.positives])
            found = mining.search(
                queries_TD, embeddings_VD[pool.rows], pool.rows, pool.blocked, beyond_squared_B=bounds
            )
        return Triplets(
            anchors=fixed.anchors,
            positives=fixed.positives,
            negatives=np.where(found.rows == mining.NO_ROW, fixed.negatives, found.rows),
        )


def _notice(num_people: int) -> str:
    """Return a warning if an accuracy of 90 % has an error of a few points."""
    if num_people >= ENOUGH_PEOPLE:
        return ""
    points = 100 * INTERVAL * math.sqrt(0.9 * 0.1 / num_people)
    return (
        f"only {num_people} validation people: an accuracy near 90 % is known to about ± {points:.0f} points, and a "
        "later epoch is kept unless it is worse by more than chance"
    )


def _fixed_batches(index: PhotoIndex, config: TrainConfig) -> list[Ints]:
    """Return batches with as many people as a training step, or with all people if they are fewer."""
    if config.sampling.batch != "identities":
        return []
    assert config.batch_size != "auto"
    num_people = min(config.batch_size // config.sampling.photos_per_person, len(index.pairable))
    if num_people < 2:
        return []
    sampler = IdentityBatchSampler(
        index=index, num_people=num_people, num_photos=config.sampling.photos_per_person, seed=config.run.seed
    )
    num_batches = max(1, config.validation.val_triplets // (num_people * config.sampling.photos_per_person))
    return list(sampler.batches(0, num_batches))
