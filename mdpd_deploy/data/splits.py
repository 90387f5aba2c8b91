"""Split names, seeded splits and subsets.

The legacy `RandomState` is used on purpose: NumPy guarantees its stream for ever, so a seed makes
the same split on every machine and version.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.data.examples import Indices, Lazy, Raw, Split

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def hold_out(n: int, fraction: float) -> int:
    """Return how many of n examples a fraction means: at least one, and one stays."""
    return min(max(1, round(n * fraction)), n - 1)


def random_split(n: int, held: int, seed: int) -> tuple[Indices, Indices]:
    """Split range(n) at random into (kept, held), both in rising order."""
    order = np.random.RandomState(seed).permutation(n)
    return np.sort(order[held:]), np.sort(order[:held])


def stratified_split(labels: NDArray[np.int64], held: int, seed: int) -> tuple[Indices, Indices]:
    """Split examples so that every class has its share in both parts.

    Shares are rounded by largest remainder, so exactly `held` examples are held out, and every
    class keeps at least one example.

    Args:
        labels: Class indices [n].
        held: How many examples to hold out; lowered if the classes cannot spare as many.
        seed: Seed of the choice.

    Returns:
        Indices (kept, held), both in rising order.
    """
    classes, counts = np.unique(labels, return_counts=True)
    spare = counts - 1
    held = min(held, int(spare.sum()))
    exact = counts * (held / len(labels))
    quota = np.minimum(np.floor(exact).astype(np.int64), spare)
    while quota.sum() < held:
        lack = np.where(quota < spare, exact - quota, -np.inf)
        quota[np.argmax(lack)] += 1
    random = np.random.RandomState(seed)
    taken = [
        random.permutation(np.flatnonzero(labels == cls))[:number]
        for cls, number in zip(classes, quota, strict=True)
    ]
    held_out = np.sort(np.concatenate(taken))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def subset(split: Split, indices: Indices) -> Split:
    """Return the examples at `indices`, in that order; lazy inputs stay lazy."""
    inputs: Sequence[Raw] = (
        [split.inputs[i] for i in indices]
        if isinstance(split.inputs, list)
        else Lazy(split.inputs.__getitem__, indices)
    )
    return Split(inputs, split.labels[indices])
