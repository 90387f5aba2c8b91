"""Intervals of a mean: of few values, and of seeds crossed with test examples."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Interval = tuple[float, float, float]  # mean, low, high
LEVEL = 0.95


def student_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Return the mean of two values or more and Student's interval: (mean, low, high)."""
    taken = np.asarray(values, dtype=np.float64)
    mean, count = float(taken.mean()), len(taken)
    reach = float(stdtrit(count - 1, (1 + level) / 2) * taken.std(ddof=1)) / count**0.5
    return mean, mean - reach, mean + reach


def crossed_interval(values: NDArray[np.float64], level: float = LEVEL) -> Interval:
    """Return the mean over seeds and examples and its interval, as if both were drawn anew.

    The two are crossed: every seed is measured on the same examples. The variance of the mean is
    (M_seeds + M_examples − M_rest) / cells, of the mean squares of a two-way analysis of variance
    without replication, its degrees of freedom Satterthwaite's; it is not taken below that of
    either factor alone.

    Args:
        values: Of every seed on every group of examples [S, G], S and G at least 2.
        level: Of the interval.
    """
    seeds, groups = values.shape
    mean = float(values.mean())
    by_seed, by_group = values.mean(axis=1) - mean, values.mean(axis=0) - mean
    rest = values - mean - by_seed[:, None] - by_group[None]
    freedom = np.array([seeds - 1, groups - 1, (seeds - 1) * (groups - 1)])
    squares = np.array([groups * (by_seed**2).sum(), seeds * (by_group**2).sum(), (rest**2).sum()])
    squares /= freedom
    both = squares[0] + squares[1] - squares[2]
    if both > squares[:2].max():
        spread, df = both, both**2 / (squares**2 / freedom).sum()
    else:
        larger = int(squares[:2].argmax())
        spread, df = squares[larger], freedom[larger]
    reach = float(stdtrit(df, (1 + level) / 2) * np.sqrt(spread / values.size))
    return mean, mean - reach, mean + reach
