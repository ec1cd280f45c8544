"""All metrics of one model on given photos and pairs.

Shapes: N photos, P pairs, D embedding.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib import storage
from lib.errors import UserError
from lib.evaluation.metrics import (
    best_threshold,
    failed_as_errors,
    pair_distances,
    verification_figures,
    verification_report,
)
from lib.evaluation.original_table import original_table
from lib.evaluation.pairs import Pairs, original_pairs
from lib.recognition.embedder import Embedder
from lib.recognition.embeddings_table import Embeddings
from lib.recognition.face_source import Source

logger = logging.getLogger(__name__)

MAX_ORIGINAL_PAIRS = 20_000_000
"""Largest number of pairs for the original's protocol, which grows with the square of a person's photos."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Photos:
    """The photos that the pairs index, the same for every model.

    Attributes:
        people_N: the person on each photo, as a number. Each photo without an identity has a number of its own.
    """

    names: list[str]
    identities: list[str | None]
    splits: list[str]
    people_N: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """A model and its results."""

    name: str
    embedder: Embedder
    source: Source
    vectors_ND: NDArray[np.float32]
    failed_N: NDArray[np.bool_]
    statuses: list[str]
    distances_P: NDArray[np.float64]
    figures: dict[str, Any]


def photos_of(names: list[str], identities: list[str | None], splits: list[str]) -> Photos:
    """Return the photos with their people as numbers."""
    known = [f"\0{n}" if identity is None else identity for n, identity in enumerate(identities)]
    people_N = np.unique(np.asarray(known, object), return_inverse=True)[1].astype(np.int64)
    return Photos(names=names, identities=identities, splits=splits, people_N=people_N)


def check_embedded(made: Embeddings, folder: str) -> None:
    """Raise UserError if no photo has an embedding, for example because the photos were moved during the job."""
    if made.failed_N.all():
        reasons = ", ".join(f"{count} {status}" for status, count in Counter(made.statuses).most_common())
        raise UserError(
            f"none of the {len(made.statuses)} photos has an embedding ({reasons}): correct the photos or --photos, "
            f"remove {storage.shown(folder)}, and run the same command again"
        )


def measure(
    name: str,
    embedder: Embedder,
    source: Source,
    made: Embeddings,
    photos: Photos,
    pairs: Pairs,
    *,
    tolerance: float | None,
    with_original: bool,
    seed: int,
    at_far: float | None = None,
) -> Measured:
    """Return all metrics of a model whose embeddings were `made`.

    Args:
        tolerance: threshold of the original's table; None means the model's own, else the best one.
        with_original: whether to apply the original's protocol too.
        at_far: FAR of the operating point to choose, if one is wanted.

    Raises:
        UserError: too few folds, or a fold of one kind; a FAR that the pairs cannot tell.
    """
    vectors_ND, failed_N, statuses = of_photos(made, photos)
    distances_P = failed_as_errors(pair_distances(vectors_ND, pairs.a_P, pairs.b_P), pairs, failed_N)
    best = best_threshold(distances_P, pairs.same_P)[0]
    used = next(each for each in (tolerance, embedder.threshold, best) if each is not None)
    figures = verification_report(
        vectors_ND, photos.people_N, pairs, failed_N=failed_N, tolerance=used, seed=seed, at_far=at_far
    )
    about = {
        "name": name,
        "model": storage.redacted(embedder.url),
        "digest": embedder.digest,
        "flip": embedder.flip,
        "model_threshold": embedder.threshold,
        "fingerprint": made.fingerprint,
        **_failed(photos, pairs, failed_N, statuses),
        "original": _original(photos, vectors_ND, failed_N, used, seed) if with_original else None,
    }
    return Measured(
        name=name,
        embedder=embedder,
        source=source,
        vectors_ND=vectors_ND,
        failed_N=failed_N,
        statuses=statuses,
        distances_P=distances_P,
        figures={**about, **figures},
    )


def of_photos(made: Embeddings, photos: Photos) -> tuple[NDArray[np.float32], NDArray[np.bool_], list[str]]:
    """Return the embeddings of these photos, which of them failed, and their statuses."""
    row_of = {photo: row for row, photo in enumerate(made.photos)}
    rows_N = np.array([row_of[photo] for photo in photos.names])
    return made.embeddings_ND[rows_N], made.failed_N[rows_N], [made.statuses[row] for row in rows_N]


def _failed(photos: Photos, pairs: Pairs, failed_N: NDArray[np.bool_], statuses: list[str]) -> dict[str, Any]:
    """Return the failed photos that are in pairs: their number by status, and their names."""
    in_pairs_N = np.zeros(len(photos.names), bool)
    in_pairs_N[np.concatenate([pairs.a_P, pairs.b_P])] = True
    failed = np.flatnonzero(failed_N & in_pairs_N)
    return {
        "failed_photos": dict(Counter(statuses[n] for n in failed)),
        "failed_photo_names": [photos.names[n] for n in failed],
    }


def _original(
    photos: Photos, vectors_ND: NDArray, failed_N: NDArray[np.bool_], tolerance: float, seed: int
) -> dict[str, Any] | None:
    """Return the original project's table by its own protocol, which knows only photos with a face."""
    usable = [n for n in np.flatnonzero(~failed_N) if photos.identities[n] is not None]
    identities = [str(photos.identities[n]) for n in usable]
    num_same = sum(count * (count - 1) // 2 for count in Counter(identities).values())
    if not 0 < 2 * num_same <= MAX_ORIGINAL_PAIRS or len(set(identities)) < 2:
        logger.warning("skipping the original's protocol: it would have %d pairs here", 2 * num_same)
        return None
    pairs = original_pairs([photos.names[n] for n in usable], identities, seed=seed)
    distances_P = pair_distances(vectors_ND[usable], pairs.a_P, pairs.b_P)
    return {
        "at_tolerance": original_table(distances_P, pairs.same_P, tolerance),
        **({} if len(np.unique(pairs.fold_P)) < 2 else verification_figures(distances_P, pairs)),
    }


def chosen_threshold(figures: Mapping[str, Any]) -> float:
    """Return the threshold to keep in a model: that of the operating point if there is one, else the best one."""
    return float((figures["operating_point"] or figures)["threshold"])
