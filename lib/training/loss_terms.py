"""The names of losses, and sums of them as `--loss` gives them."""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

from lib.errors import UserError

BatchLossName = Literal["softmax", "semihard", "triplet"]
CentreLossName = Literal["arcface", "cosface", "adaface"]

CENTRE_MARGINS: Mapping[CentreLossName, float] = {"arcface": 0.5, "cosface": 0.35, "adaface": 0.4}
"""Margins of the papers."""

BATCH_LOSSES: tuple[BatchLossName, ...] = get_args(BatchLossName)
EXAMPLES = "softmax, arcface, or a sum such as arcface+softmax or arcface+0.5*softmax"


class BatchTerm(NamedTuple):
    """A loss over the pairs and triplets of a batch, and its weight in the sum."""

    name: BatchLossName
    weight: float


class CentreTerm(NamedTuple):
    """A loss over the centres of all identities, and its weight in the sum."""

    name: CentreLossName
    weight: float


class LossTerms(NamedTuple):
    """The losses of a sum, at least one."""

    centre: CentreTerm | None
    batch: BatchTerm | None


def loss_terms(loss: str) -> LossTerms:
    """Return the losses that `--loss` names.

    Raises:
        UserError: a name that is no loss, a weight that is not above 0, or two losses of one kind.
    """
    centres: list[CentreTerm] = []
    batches: list[BatchTerm] = []
    for text in loss.split("+"):
        factor, mark, name = (part.strip() for part in text.rpartition("*"))
        weight = _weight(factor) if mark else 1.0
        if name in CENTRE_MARGINS and 0 < weight < math.inf:
            centres.append(CentreTerm(name, weight))  # type: ignore[arg-type]
        elif name in BATCH_LOSSES and 0 < weight < math.inf:
            batches.append(BatchTerm(name, weight))
        else:
            names = ", ".join((*BATCH_LOSSES, *CENTRE_MARGINS))
            raise UserError(f"--loss is {loss!r}: {EXAMPLES}; losses are {names}, weights are above 0")
    if len(centres) > 1 or len(batches) > 1:
        raise UserError(f"--loss {loss}: a sum has one loss over centres and one over the batch, such as {EXAMPLES}")
    return LossTerms(centres[0] if centres else None, batches[0] if batches else None)


def _weight(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
