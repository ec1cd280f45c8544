"""The table of the original project: counts and rates at one threshold.

Shapes: P pairs.
"""

from typing import Any

import numpy as np

from lib.evaluation.curves import BoolArray, FloatArray


def original_table(
    distances_P: FloatArray, same_P: BoolArray, tolerance: float, *, beta: float = 1.0
) -> dict[str, Any]:
    """Return the table of the original project, at the threshold that it calls tolerance.

    F-beta is van Rijsbergen's: recall weighs `beta` times as much as precision. Means leave out failed photos. A metric
    with an empty denominator is None, such as precision when no pair is called the same.
    """
    called_P = distances_P <= tolerance
    true_positives = int(np.count_nonzero(called_P & same_P))
    false_positives = int(np.count_nonzero(called_P & ~same_P))
    false_negatives = int(np.count_nonzero(~called_P & same_P))
    finite_P = np.isfinite(distances_P)
    return {
        "processed_rows": len(same_P),
        "accuracy_percent": 100 * (1 - (false_positives + false_negatives) / len(same_P)),
        "false_positives": false_positives,
        "false_negatives": false_negatives,
        "precision": _ratio(true_positives, true_positives + false_positives),
        "recall": _ratio(true_positives, true_positives + false_negatives),
        "f_beta": _ratio(
            (1 + beta**2) * true_positives,
            (1 + beta**2) * true_positives + beta**2 * false_negatives + false_positives,
        ),
        "beta": beta,
        "mean_distance_same": _mean(distances_P[finite_P & same_P]),
        "mean_distance_different": _mean(distances_P[finite_P & ~same_P]),
        "tolerance": tolerance,
    }


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _mean(values: FloatArray) -> float | None:
    return float(values.mean()) if len(values) else None
