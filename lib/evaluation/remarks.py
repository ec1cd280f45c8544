"""Remarks of a report beside its figures: what limits them, and how far one model is ahead of another.

Shapes: F folds.
"""

import logging
from collections.abc import Sequence

import numpy as np

from lib.evaluation.model_metrics import Measured, Photos
from lib.evaluation.pairs import Pairs
from lib.recognition.face_source import FacesSource, Source

logger = logging.getLogger(__name__)


def accuracy_difference(measured: Sequence[Measured]) -> dict[str, float] | None:
    """Return the second model's accuracy minus the first's, and its standard error over the same folds."""
    if len(measured) < 2:
        return None
    first_F, second_F = (np.array(each.figures["fold_accuracies"]) for each in measured)
    gain_F = second_F - first_F
    return {"accuracy": float(gain_F.mean()), "std": float(gain_F.std(ddof=1) / np.sqrt(len(gain_F)))}


def notes_of(photos: Photos, pairs: Pairs, measured: Sequence[Measured], num_unknown: int) -> list[str]:
    """Log and return remarks about what limits these figures. `num_unknown` photos of --slices are in no pair."""
    notes = [pairs.note] if pairs.note else []
    for each in measured:
        failed = each.figures["failed_photos"]
        if failed:
            reasons = ", ".join(f"{count} {status}" for status, count in sorted(failed.items()))
            shown = ", ".join(each.figures["failed_photo_names"][:5])
            notes.append(
                f"{each.name}: {sum(failed.values())} photos have no embedding ({reasons}) and make every pair they "
                f"are in an error, such as {shown}; metrics.json names all"
            )
    notes += train_note(photos, [pairs], measured[0].source)
    if num_unknown:
        notes.append(f"{num_unknown:,} photos of --slices are in no pair")
    for note in notes:
        logger.warning("%s", note)
    return notes


def train_note(photos: Photos, lists: Sequence[Pairs], source: Source) -> list[str]:
    """Return a remark about photos in pairs that the model may have been trained on."""
    in_pairs = np.unique(np.concatenate([side_P for pairs in lists for side_P in (pairs.a_P, pairs.b_P)]))
    num_train = sum(photos.splits[n] == "train" for n in in_pairs)
    if not num_train or not isinstance(source, FacesSource):
        return []
    note = f"{num_train:,} of the {len(in_pairs):,} photos in pairs are of the split train"
    return [f"{note}: for a model trained on them the figures are too good"]
