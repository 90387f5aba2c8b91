"""Does an engine compute what the bundle says? Measured on the device itself, without torch.

The policy is that of the graph's own parity: differences are scaled by the spread of the reference
outputs. TF32 has the mantissa of FP16, so an engine that may use it is held to FP16's tolerance. A
quantised engine may be off by what golden vectors may be anywhere: `allowed_again`, twice what its
graph was off by at the export. Which rows must keep their class never depends on what the engine
gave: those whose margin exceeds the policy's drift.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.artifacts.certificate import one_or_all
from mdpd_deploy.artifacts.golden import Golden
from mdpd_deploy.checks.policy import (
    POLICIES,
    Agreement,
    agreement_of_all,
    allowed_again,
    spreads_of,
)
from mdpd_deploy.runtimes.base import Arrays, Outputs, Runtime, run_cut


@dataclass(frozen=True, eq=False)
class Case:
    """One batch with the outputs it must give.

    Attributes:
        name: What is special about it.
        arrays: Inputs by name.
        expected: Outputs by name; None = they need only be finite.
    """

    name: str
    arrays: Arrays
    expected: Outputs | None


@dataclass(frozen=True)
class EngineParity:
    """What was found.

    Attributes:
        cases: Largest absolute difference by case, and by output where there are several; infinite
            for another shape or values that are not finite.
        spread: Standard deviation of each expected output.
        scaled_diff: The largest difference over its output's spread.
        tolerance: What it may be.
        agreement: Share of rows with the same class, among those whose margin exceeds the drift;
            of scores: within the drift.
        wanted_agreement: What that share may not fall below.
    """

    cases: Mapping[str, float]
    spread: Mapping[str, float]
    scaled_diff: float
    tolerance: float
    agreement: float
    wanted_agreement: float

    @property
    def passed(self) -> bool:
        """Whether all outputs are finite, close enough, and their classes the same."""
        finite = bool(np.isfinite(self.scaled_diff))
        close = self.scaled_diff <= self.tolerance
        return finite and close and self.agreement >= self.wanted_agreement

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers; only of a parity that passed, since JSON knows no infinity."""
        return {**asdict(self), "spread": one_or_all(self.spread), "passed": self.passed}


@dataclass(frozen=True)
class Limits:
    """What an engine is held to; differences in standard deviations of the outputs.

    Attributes:
        tolerance: Largest difference of an output.
        drift: Difference that a prediction need not survive.
        agreement: Share of predictions that must stay, where the margin exceeds the drift.
    """

    tolerance: float
    drift: float
    agreement: float


def limits(precision: str, *, tf32: bool, known: float) -> Limits:
    """Return what an engine is held to.

    Args:
        precision: `manifest.precision`.
        tf32: Whether FP32 products may use TF32.
        known: How far the graph's own golden outputs are from PyTorch's, in standard deviations.
    """
    policy = POLICIES["fp16" if precision == "fp32" and tf32 else precision]
    tolerance = policy.scaled_diff
    if tolerance is None:
        tolerance = allowed_again(known, on_cpu=False)
    return Limits(tolerance, policy.drift, policy.agreement)


def compare_engine(runner: Runtime, cases: Sequence[Case], held_to: Limits) -> EngineParity:
    """Run every case; batches beyond the runner's largest are cut.

    Args:
        runner: The engine.
        cases: At least one with expected outputs.
        held_to: What it is held to.
    """
    spread = spreads_of([case.expected for case in cases if case.expected is not None])
    found: dict[str, float] = {}
    worst, same = 0.0, Agreement(0, 0, 0, 0)
    for case in cases:
        outputs = run_cut(runner, case.arrays)
        gaps = {name: _difference(outputs.get(name), case.expected, name) for name in spread}
        worst = max(worst, *(gap / spread[name] for name, gap in gaps.items()))
        for name, gap in gaps.items():
            found[case.name if len(gaps) == 1 else f"{case.name}, {name}"] = gap
        if case.expected is not None and np.isfinite(list(gaps.values())).all():
            same += agreement_of_all(case.expected, outputs, held_to.drift, spread)
    return EngineParity(found, spread, worst, held_to.tolerance, same.share, held_to.agreement)


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


def _difference(outputs: NDArray[np.float32] | None, expected: Outputs | None, name: str) -> float:
    if outputs is None:
        return float("inf")
    if expected is None:
        return 0.0 if np.isfinite(outputs).all() else float("inf")
    if outputs.shape != expected[name].shape:
        return float("inf")
    gap = float(np.abs(outputs.astype(np.float64) - expected[name]).max())
    return gap if np.isfinite(gap) else float("inf")
