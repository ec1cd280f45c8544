"""Intervals of figures that were computed on resampled people.

Shape: R resamples.
"""

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95


def percentiles(values_R: ArrayLike) -> list[float] | None:
    """Return the two ends of the percentile interval; None if no resample has a finite value."""
    all_R = np.asarray(values_R, np.float64)
    finite_R = all_R[np.isfinite(all_R)]
    tail = (1 - CONFIDENCE) / 2
    return [float(value) for value in np.quantile(finite_R, [tail, 1 - tail])] if len(finite_R) else None
