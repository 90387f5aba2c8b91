"""Two forwards side by side, output by output: the core of every parity. No torch here.

Differences are scaled by the spread of the expected outputs: a fixed absolute tolerance makes
harmless misses noise on a head with large logits, and hides real ones on a head with small logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.artifacts.certificate import one_or_all
from mdpd_deploy.checks.policy import Agreement, agreement_of_all, spreads_of
from mdpd_deploy.runtimes.base import Arrays, Forward, Outputs


@dataclass(frozen=True, eq=False)
class Case:
    """One batch with the outputs it must give.

    Attributes:
        name: What is special about it, e.g. `batch 1, 128 tokens`.
        arrays: Inputs by name.
        expected: Outputs by name; None = they need only be finite.
    """

    name: str
    arrays: Arrays
    expected: Outputs | None


@dataclass(frozen=True)
class Limits:
    """What outputs are held to; differences in standard deviations of the outputs.

    Attributes:
        tolerance: Largest difference of an output; infinite = it is only reported.
        drift: Difference that a prediction need not survive.
        agreement: Share of predictions that must stay, where the margin exceeds the drift; 0 = they
            are not counted.
    """

    tolerance: float
    drift: float = 0.0
    agreement: float = 0.0


@dataclass(frozen=True)
class Gap:
    """One output of one case.

    Attributes:
        name: The case's.
        output: The output's.
        max_abs_diff: Largest absolute difference of a value; infinite unless `finite`.
        finite: Whether every value was finite, and the shapes equal.
    """

    name: str
    output: str
    max_abs_diff: float
    finite: bool


@dataclass(frozen=True)
class Parity:
    """How far the outputs of all cases are from the expected ones.

    Attributes:
        cases: Every output of every case.
        spread: Standard deviation of each expected output over all cases.
        scaled_diff: Largest difference of any case over its output's spread.
        limits: What was held to.
        agreement: Share of rows with the same class, among those whose margin exceeds the drift;
            of scores: within the drift.
    """

    cases: tuple[Gap, ...]
    spread: Mapping[str, float]
    scaled_diff: float
    limits: Limits
    agreement: float = 1.0

    @property
    def tolerance(self) -> float:
        """What `scaled_diff` may be."""
        return self.limits.tolerance

    @property
    def passed(self) -> bool:
        """Whether all outputs are finite, close enough, and their classes the same."""
        close = self.scaled_diff <= self.tolerance
        return self.finite and close and self.agreement >= self.limits.agreement

    @property
    def finite(self) -> bool:
        """Whether every output was finite and of the expected shape."""
        return all(gap.finite for gap in self.cases)

    @property
    def worst(self) -> Gap:
        """The case that is farthest off."""
        return max(self.cases, key=lambda gap: (not gap.finite, self.scaled(gap)))

    def scaled(self, gap: Gap) -> float:
        """Return a difference in standard deviations of its output."""
        return gap.max_abs_diff / self.spread[gap.output]

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers; no tolerance is None there."""
        cases = [asdict(gap) for gap in self.cases]
        if len(self.spread) == 1:
            cases = [{key: gap[key] for key in gap if key != "output"} for gap in cases]
        plain = {
            "cases": cases,
            "spread": one_or_all(self.spread),
            "scaled_diff": self.scaled_diff,
            "tolerance": None if np.isinf(self.tolerance) else self.tolerance,
            "passed": self.passed,
        }
        wanted = self.limits.agreement
        return plain | ({"agreement": self.agreement, "wanted_agreement": wanted} if wanted else {})


def compare(run: Forward, cases: Sequence[Case], limits: Limits) -> Parity:
    """Run every case, at least one of them with expected outputs, and say how far off it is."""
    spread = spreads_of([case.expected for case in cases if case.expected is not None])
    gaps: list[Gap] = []
    same = Agreement(0, 0, 0, 0)
    for case in cases:
        outputs = run(case.arrays)
        own = [_gap(case, name, outputs.get(name)) for name in spread]
        gaps += own
        if limits.agreement and case.expected is not None and all(gap.finite for gap in own):
            same += agreement_of_all(case.expected, outputs, limits.drift, spread)
    worst = max(gap.max_abs_diff / spread[gap.output] for gap in gaps)
    return Parity(tuple(gaps), spread, worst, limits, same.share)


def _gap(case: Case, output: str, found: NDArray[np.float32] | None) -> Gap:
    if found is None or not np.isfinite(found).all():
        return Gap(case.name, output, np.inf, finite=False)
    if case.expected is None:
        return Gap(case.name, output, 0.0, finite=True)
    expected = case.expected[output]
    if found.shape != expected.shape or not np.isfinite(expected).all():
        return Gap(case.name, output, np.inf, finite=False)
    return Gap(case.name, output, float(np.abs(found.astype(np.float64) - expected).max()), True)
