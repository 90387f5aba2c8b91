"""Does an engine compute what the bundle says? Measured on the device itself, without torch (D27).

The policy is that of the graph's own parity: differences are scaled by the spread of the reference
outputs. TF32 has the mantissa of FP16, so an engine that may use it is held to FP16's tolerance;
what a quantised engine may lose is a matter of the task metric, so its difference is only reported.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.golden import Golden
from mdpd_deploy.parity_policy import POLICIES, spread_of
from mdpd_deploy.runner import Runner

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Case:
    """One batch with the outputs it must give.

    Attributes:
        name: What is special about it.
        arrays: Inputs by name.
        expected: Outputs [B, C]; None = they need only be finite.
    """

    name: str
    arrays: Arrays
    expected: NDArray[np.float32] | None


@dataclass(frozen=True)
class EngineParity:
    """What was found.

    Attributes:
        cases: Largest absolute difference by case; infinite for another shape or values that are
            not finite.
        spread: Standard deviation of the expected outputs.
        scaled_diff: The largest difference over the spread.
        tolerance: What it may be; None = it is reported only.
        agreement: Share of rows with the same class, among those whose margin exceeds the drift.
        wanted_agreement: What that share may not fall below.
    """

    cases: Mapping[str, float]
    spread: float
    scaled_diff: float
    tolerance: float | None
    agreement: float
    wanted_agreement: float

    @property
    def passed(self) -> bool:
        """Whether all outputs are finite, close enough, and their classes the same."""
        close = self.scaled_diff <= (np.inf if self.tolerance is None else self.tolerance)
        finite = bool(np.isfinite(self.scaled_diff))
        return finite and close and self.agreement >= self.wanted_agreement

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers; only of a parity that passed, since JSON knows no infinity."""
        return {**asdict(self), "cases": dict(self.cases), "passed": self.passed}


def policy(precision: str, *, tf32: bool) -> tuple[float | None, float]:
    """Return the tolerance and the wanted agreement for an engine.

    Args:
        precision: `manifest.precision`.
        tf32: Whether FP32 products may use TF32.
    """
    held = POLICIES["fp16" if precision == "fp32" and tf32 else precision]
    return held.scaled_diff, held.agreement


def compare_engine(
    runner: Runner, cases: Sequence[Case], *, tolerance: float | None, agreement: float = 0.0
) -> EngineParity:
    """Run every case; batches beyond the runner's largest are cut.

    Args:
        runner: The engine.
        cases: At least one with expected outputs.
        tolerance: Largest difference in standard deviations of the outputs; None = any.
        agreement: Share of equal classes that is wanted.
    """
    expected = [case.expected for case in cases if case.expected is not None]
    values = np.concatenate([array.ravel() for array in expected]).astype(np.float64)
    spread = spread_of(values)
    found: dict[str, float] = {}
    same = rows = 0
    for case in cases:
        outputs = run_cut(runner, case.arrays)
        found[case.name] = _difference(outputs, case.expected)
        if case.expected is not None and np.isfinite(found[case.name]):
            counted, equal = _same_class(outputs, case.expected)
            rows, same = rows + counted, same + equal
    worst = max(found.values()) / spread
    return EngineParity(found, spread, worst, tolerance, same / rows if rows else 1.0, agreement)


def run_cut(runner: Runner, arrays: Arrays) -> NDArray[np.float32]:
    """Run a batch of any size in pieces that the runner takes; outputs [B, C]."""
    rows = len(next(iter(arrays.values())))
    size = runner.max_batch or rows
    parts = [
        runner({name: array[start : start + size] for name, array in arrays.items()})
        for start in range(0, rows, size)
    ]
    return np.concatenate(parts)


def shape_batches(
    golden: Golden, profiles: Mapping[str, Mapping[str, Sequence[int]]]
) -> Iterator[tuple[str, Arrays]]:
    """Yield batches at the corners of an engine's profile, made of the golden inputs' own values.

    Args:
        golden: Where token ids and pixels come from.
        profiles: `min`, `opt` and `max` shape of every input.
    """
    corners = {tuple(tuple(p[bound]) for p in profiles.values()): bound for bound in _BOUNDS}
    for shapes, bound in corners.items():
        yield f"{bound} shape", _batch(golden, dict(zip(profiles, shapes, strict=True)))
    first = next(iter(profiles.values()))
    if any(low != high for low, high in zip(first["min"][1:], first["max"][1:], strict=True)):
        crossed = {n: [p["min"][0], *p["max"][1:]] for n, p in profiles.items()}
        yield "min batch at the max length", _batch(golden, crossed)


_BOUNDS = ("max", "opt", "min")  # equal shapes keep the last name


def _batch(golden: Golden, shapes: Mapping[str, Sequence[int]]) -> Arrays:
    """Repeat golden values to the shapes wanted; masks keep whole first tokens in every row."""
    arrays = {}
    for name, shape in shapes.items():
        source = golden.arrays[name]
        if name == "attention_mask":
            arrays[name] = _mask(tuple(shape), source.dtype)
        else:
            arrays[name] = np.resize(source, tuple(shape))
    return arrays


def _mask(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Row i of several is padded from token 2 + i on; the last row is whole."""
    mask = np.ones(shape, dtype=dtype)
    for row in range(shape[0] - 1):
        mask[row, 2 + row :] = 0
    return mask


def _difference(outputs: NDArray[np.float32], expected: NDArray[np.float32] | None) -> float:
    if not np.isfinite(outputs).all():
        return float("inf")
    if expected is None:
        return 0.0
    if outputs.shape != expected.shape:
        return float("inf")
    return float(np.abs(outputs.astype(np.float64) - expected).max())


def _same_class(outputs: NDArray[np.float32], expected: NDArray[np.float32]) -> tuple[int, int]:
    """Return how many rows have a margin beyond the drift, and how many of them keep their class."""
    if expected.shape[1] == 1:
        return 0, 0
    ordered = np.sort(expected, axis=1)
    clear = ordered[:, -1] - ordered[:, -2] > np.abs(outputs - expected).max()
    equal = outputs.argmax(axis=1) == expected.argmax(axis=1)
    return int(clear.sum()), int((clear & equal).sum())
