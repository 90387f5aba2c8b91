"""How far a graph may be from PyTorch FP32, by precision: the one table. No torch here.

| check                                                 | fp32       | fp16, bf16 | int8       |
|-------------------------------------------------------|------------|------------|------------|
| largest output difference / spread of the outputs     | 1e-4       | 3e-2       | reported   |
| same class where the reference's margin exceeds drift | all        | 99.9 %     | 99 %       |
| drop of the primary metric, paired, on validation     | 0.1 points | 0.2 points | 0.5 points |
| finite outputs                                        | all        | all        | all        |

The drift is what the outputs may be off by; for int8, whose difference is only reported, it is what
sound int8 graphs were seen to be off by. One example may always count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.runtimes.base import Outputs
from mdpd_deploy.tasks.metrics import LOWER_IS_BETTER, compute

ParityMode = Literal["fail", "warn"]
RESAMPLES = 500
# Outputs can be nearly constant (a head that has not learnt); below this share of their size the
# difference would be float32's own rounding.
SPREAD_FLOOR = 1e-2


@dataclass(frozen=True)
class Policy:
    """What one precision is held to.

    Attributes:
        scaled_diff: Largest output difference, in standard deviations; None = it is reported only.
        drift: Difference that a prediction need not survive, in standard deviations.
        agreement: Share of predictions that must stay, where the margin exceeds the drift.
        metric_drop: Largest drop of the primary metric, as a fraction (0.002 = 0.2 points).
    """

    scaled_diff: float | None
    drift: float
    agreement: float
    metric_drop: float

    def to_json(self) -> dict[str, Any]:
        """Return the thresholds for `parity.json`."""
        return asdict(self)


_HALF = Policy(scaled_diff=3e-2, drift=3e-2, agreement=0.999, metric_drop=0.002)
_INT8 = Policy(scaled_diff=None, drift=0.2, agreement=0.99, metric_drop=0.005)
POLICIES: dict[str, Policy] = {
    "fp32": Policy(scaled_diff=1e-4, drift=1e-4, agreement=1.0, metric_drop=0.0),
    "fp16": _HALF,
    "bf16": _HALF,
    "int8-cpu": _INT8,
    "int8-trt": _INT8,
    "int8-openvino": _INT8,
}


# Of the outputs' spread: float32 on a CPU, and what TF32 or FP16 products on a GPU may differ by.
CPU_TOLERANCE, GPU_TOLERANCE = 1e-4, 3e-2


def allowed_again(known: float, *, on_cpu: bool) -> float:
    """Return how far golden outputs may be off when a bundle is run again, in standard deviations.

    Args:
        known: How far they were off at the export, where a reduced precision was accepted.
        on_cpu: Whether it runs on a CPU.
    """
    return max(CPU_TOLERANCE if on_cpu else GPU_TOLERANCE, 2 * known)


def spread_of(outputs: NDArray[np.floating[Any]]) -> float:
    """Return what differences of outputs are scaled by: their standard deviation, never 0."""
    floor = SPREAD_FLOOR * float(np.abs(outputs).max())
    return max(float(outputs.std()), floor, 1e-30)


def spreads_of(batches: Sequence[Outputs]) -> dict[str, float]:
    """Return `spread_of` each output over several batches."""
    return {
        name: spread_of(np.concatenate([part[name].ravel() for part in batches]).astype(np.float64))
        for name in batches[0]
    }


@dataclass(frozen=True)
class Agreement:
    """How many predictions stayed the same.

    Attributes:
        rows: Rows whose margin exceeds the drift; for scores: all.
        same: Of those, the ones with the reference's class; for scores: within the drift.
        all_rows: Every row.
        all_same: Of every row, the ones with the reference's class.
    """

    rows: int
    same: int
    all_rows: int
    all_same: int

    @property
    def share(self) -> float:
        """Of the rows that count; 1 where none does."""
        return self.same / self.rows if self.rows else 1.0

    def __add__(self, other: "Agreement") -> "Agreement":
        mine, its = astuple(self), astuple(other)
        return Agreement(*(one + two for one, two in zip(mine, its, strict=True)))


@dataclass(frozen=True)
class Drop:
    """Metric of the reference minus that of the graph, with a paired bootstrap 95 % interval."""

    value: float
    low: float
    high: float


def agreement(
    reference: NDArray[np.float32], outputs: NDArray[np.float32], drift: float
) -> Agreement:
    """Compare predictions.

    Args:
        reference: Logits [n, C], or scores [n, 1]; of further axes, each row is flattened.
        outputs: The same from the graph.
        drift: Absolute difference that an output may show.
    """
    count = len(reference)
    reference, outputs = reference.reshape(count, -1), outputs.reshape(count, -1)
    if reference.shape[1] == 1:
        same = int((np.abs(reference - outputs) <= drift).sum())
        return Agreement(count, same, count, same)
    ordered = np.sort(reference, axis=1)
    clear = ordered[:, -1] - ordered[:, -2] > 2 * drift  # each of two logits may drift
    equal = reference.argmax(axis=1) == outputs.argmax(axis=1)
    return Agreement(int(clear.sum()), int((equal & clear).sum()), count, int(equal.sum()))


def agreement_of_all(
    reference: Outputs, outputs: Outputs, drift: float, spread: Mapping[str, float]
) -> Agreement:
    """Return `agreement` over every output; the drift is in standard deviations of each."""
    return sum(
        (agreement(one, outputs[name], drift * spread[name]) for name, one in reference.items()),
        start=Agreement(0, 0, 0, 0),
    )


def label_spread(labels: NDArray[np.int64] | NDArray[np.float64]) -> float:
    """Return what errors in the labels' unit are scaled by: their standard deviation, never 0.

    Labels that are all the same have their size instead.
    """
    if np.ptp(labels):
        return float(np.std(labels))
    return float(np.abs(labels).max()) or 1.0


def paired_drop(
    metric: str,
    reference: NDArray[np.float32],
    outputs: NDArray[np.float32],
    labels: NDArray[np.int64] | NDArray[np.float64],
    *,
    seed: int = 0,
) -> Drop:
    """Return how much worse the graph's metric is than the reference's, on the same examples.

    Args:
        metric: A name of `METRICS`. Errors in the label's unit are divided by the labels' spread.
        reference: Outputs of PyTorch [n, C].
        outputs: Outputs of the graph [n, C].
        labels: [n].
        seed: Of the bootstrap, which draws examples.
    """
    scale = -1 / label_spread(labels) if metric in LOWER_IS_BETTER else 1.0

    def drop(rows: Sequence[int] | NDArray[np.int64] | slice) -> float:
        before, after = (
            compute([metric], found[rows], labels[rows])[metric] or 0.0  # undefined tells nothing
            for found in (reference, outputs)
        )
        return scale * (before - after)

    rng = np.random.default_rng(seed)
    drawn = [drop(rng.integers(len(labels), size=len(labels))) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Drop(drop(slice(None)), float(low), float(high))
