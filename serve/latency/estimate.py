"""From raw times to a sentence: medians of per-round ratios, their interval, and what it allows.

Every round times each variant once, so a slow moment of the machine slows all of them and cancels
in the ratio. An opening of a model may be some per cent slower than another one for as long as it
lives, which rounds cannot average out: the interval is therefore that of the mean over openings,
each of which counts as one observation, whatever its rounds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from mdpd_deploy.report.intervals import student_interval

P99_NEEDS = 1000  # calls; below that the 99th percentile is a handful of samples
MARGIN = {"cpu": 0.05, "cuda": 0.02}  # how near 1 the whole interval must be for "same speed"

Code = Literal["same", "slower", "faster", "cannot-tell"]


@dataclass(frozen=True)
class Ratio:
    """A ratio of times with its 95 % interval.

    Attributes:
        median: Median over the rounds of an opening; their geometric mean over several openings.
        rounds: Of all openings.
        openings: The median of each.
    """

    median: float
    low: float
    high: float
    rounds: int
    openings: tuple[float, ...] = ()

    @property
    def spread(self) -> float:
        """How far the interval reaches from 1, as a factor ≥ 1 (either direction)."""
        return math.exp(max(abs(math.log(self.low)), abs(math.log(self.high))))


@dataclass(frozen=True)
class Verdict:
    """What a ratio allows to be said about the variant, seen from the deployed model."""

    code: Code
    words: str


def paired_ratio(
    times: NDArray[np.int64],
    over: NDArray[np.int64],
    *,
    openings: Sequence[int] = (),
    seed: int,
    resamples: int = 2000,
) -> Ratio:
    """Return the median of per-round ratios `times / over` with a 95 % interval.

    With several openings, Student's interval of the mean of their log medians; with one, which
    cannot say how far openings differ, the bootstrap interval over rounds.

    Args:
        times: Nanoseconds of the variant, one per round [R].
        over: Nanoseconds of the model it is compared with, of the same rounds [R].
        openings: Rounds of each opening, in order; none = all R rounds are of one.
        seed: Of the bootstrap; equal times and seed give an equal interval.
        resamples: Bootstrap samples.
    """
    logs = np.log(times / over)
    parts = np.split(logs, np.cumsum(openings)[:-1]) if len(openings) > 1 else [logs]
    medians = np.array([np.median(part) for part in parts])
    if len(medians) > 1:
        middle, low, high = student_interval(medians.tolist())
    else:
        middle = float(medians[0])
        found = bootstrap(  # in slices: there may be tens of thousands of rounds
            (logs,), np.median, n_resamples=resamples, batch=100, method="percentile", rng=seed
        )
        low, high = found.confidence_interval
    return Ratio(
        median=math.exp(middle),
        low=math.exp(min(low, middle)),
        high=math.exp(max(high, middle)),
        rounds=len(logs),
        openings=tuple(np.exp(medians).tolist()),
    )


def statistic(openings: int) -> str:
    """Say in a report what `paired_ratio` computes from that many openings."""
    median = "median over rounds of per-round time ratios"
    if openings == 1:
        return f"{median}, bootstrap 95 % interval"
    return f"{median}, geometric mean over {openings} openings with Student's 95 % interval"


def verdict(ratio: Ratio, control: Ratio, margin: float) -> Verdict:
    """Say what the interval allows, and nothing more.

    Args:
        ratio: time(variant) / time(deployed).
        control: The A/A ratio of the same cell: the deployed model against itself.
        margin: Relative distance from 1 within which speeds count as the same, e.g. 0.05.

    Returns:
        `same` when the whole interval lies within the margin; `slower` or `faster` (the variant)
        when it excludes 1 and lies outside the A/A spread; else `cannot-tell`.
    """
    spread = control.spread
    above = ratio.low > max(1.0, spread)
    below = ratio.high < min(1.0, 1 / spread)
    if 1 - margin <= ratio.low and ratio.high <= 1 + margin:
        return Verdict("same", _same_words(ratio, margin, differs=above or below))
    if above:
        return Verdict("slower", f"slower than deployed, {factor(ratio.median)} its time")
    if below:
        return Verdict("faster", f"faster than deployed, {factor(ratio.median)} its time")
    return Verdict(
        "cannot-tell",
        f"cannot tell on this machine: {factor(ratio.low)} to {factor(ratio.high)}, and one model "
        f"against itself scatters by ±{spread - 1:.1%}",
    )


def _same_words(ratio: Ratio, margin: float, *, differs: bool) -> str:
    same = f"same speed within ±{margin:.0%}"
    if not differs:
        return same
    word = "slower" if ratio.median > 1 else "faster"
    return f"{same} ({abs(ratio.median - 1):.1%} {word} measured)"


def control_words(control: Ratio, margin: float) -> str:
    """Say how far the machine itself scatters: the deployed model timed against itself."""
    off = control.spread - 1
    if off <= margin:
        return f"control: same speed, as it must be (A/A spread ±{off:.1%})"
    return f"control: this machine scatters by ±{off:.1%}, differences below that cannot be seen"


def factor(ratio: float) -> str:
    """Write a ratio with the digits it deserves: 1.04×, 12.3×, 1752×."""
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.1f}×" if ratio < 100 else f"{ratio:.0f}×"


def milliseconds(value: float) -> str:
    """Write a time with the digits it deserves: 2.678, 17.8, 1343."""
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


class Percentiles(TypedDict):
    """Milliseconds; p99 is None below `P99_NEEDS` calls."""

    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float | None


def percentiles_ms(times: NDArray[np.int64]) -> Percentiles:
    """Return p50, p90, p95 and (only from `P99_NEEDS` calls on) p99 of nanoseconds, in ms."""
    p50, p90, p95, p99 = (float(v) / 1e6 for v in np.percentile(times, (50, 90, 95, 99)))
    return {
        "p50_ms": p50,
        "p90_ms": p90,
        "p95_ms": p95,
        "p99_ms": p99 if len(times) >= P99_NEEDS else None,
    }
