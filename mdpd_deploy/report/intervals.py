"""Student's interval of a mean, for few values: openings of a model, seeds of a method."""

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit


def student_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of two values or more and its 95 % interval: (mean, low, high)."""
    taken = np.asarray(values, dtype=np.float64)
    mean, count = float(taken.mean()), len(taken)
    reach = float(stdtrit(count - 1, 0.975) * taken.std(ddof=1)) / count**0.5
    return mean, mean - reach, mean + reach
