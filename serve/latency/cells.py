"""The measuring core: warm up, then rounds that time every variant once, in random order.

Nothing here knows of models or runtimes: a variant is a callable that does one whole call on the
prepared input number `index` and returns when its result is there. A clock that tests can replace
is the only other input.

Two openings of one model can differ by some per cent for as long as they live, which no number of
rounds averages out. So a cell is measured in several openings of every variant, each of which gets
its share of the time (`Plan.share`), and the shares are put together (`join`).
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Clock = Callable[[], int]  # nanoseconds
FEWEST_OPENINGS = 3  # of two, Student's interval is 13 times as wide as they lie apart


class TimedCall(Protocol):
    """One whole call on input `index`; it must not return before the result is there."""

    def __call__(self, index: int, /) -> object: ...


@dataclass(frozen=True)
class Plan:
    """How long a cell is warmed up and measured.

    Attributes:
        openings: How often every variant is opened anew; the times below are those of all together.
        seconds: Measure exactly this long; None = until `min_rounds` and `min_seconds` are
            reached, at most `max_seconds`.
        fewest_rounds: Measured whatever the time, so that an interval exists at all.
        warmup_calls: Least calls per variant before anything is measured.
        warmup_seconds: Least time per variant before anything is measured.
        warmup_cap: Longest warm-up of one variant, in seconds; with `seconds` below it, that long
            or 2 s, so that a short benchmark stays short.
        agreement: Two neighbouring warm-up windows agree when their medians differ by less; 0 =
            they need not.
    """

    openings: int = 5
    seconds: float | None = None
    min_rounds: int = 100
    min_seconds: float = 10.0
    max_seconds: float = 20.0
    fewest_rounds: int = 10
    warmup_calls: int = 10
    warmup_seconds: float = 1.0
    warmup_cap: float = 30.0
    agreement: float = 0.05

    @property
    def longest_warmup(self) -> float:
        """Seconds after which a variant is measured although its times still drift."""
        if self.seconds is None:
            return self.warmup_cap
        return min(self.warmup_cap, max(2.0, self.seconds))

    def done(self, rounds: int, elapsed: float) -> bool:
        """Whether a cell that ran `rounds` in `elapsed` seconds has measured enough."""
        if rounds < self.fewest_rounds:
            return False
        if self.seconds is not None:
            return elapsed >= self.seconds
        return self.reached(rounds, elapsed) or elapsed >= self.max_seconds

    def reached(self, rounds: int, elapsed: float) -> bool:
        """Whether the rule of 100 rounds and 10 s was met."""
        return rounds >= self.min_rounds and elapsed >= self.min_seconds

    def share(self, opening: int) -> "Plan":
        """Return the plan of one opening: its part of the time, and from the second on a short
        warm-up, since the machine itself is warm by then."""
        parts = self.openings
        plan = replace(
            self,
            openings=1,
            seconds=None if self.seconds is None else self.seconds / parts,
            min_rounds=-(-self.min_rounds // parts),
            min_seconds=self.min_seconds / parts,
            max_seconds=self.max_seconds / parts,
            fewest_rounds=-(-self.fewest_rounds // parts),
        )
        if opening == 0:
            return plan
        return replace(
            plan, warmup_calls=2, warmup_seconds=min(0.2, self.warmup_seconds), agreement=0
        )


@dataclass(frozen=True)
class Warmup:
    """What the warm-up of one variant took."""

    calls: int
    seconds: float
    settled: bool  # two windows agreed before the cap


@dataclass(frozen=True)
class CellTimes:
    """Raw times of one cell.

    Attributes:
        times: Variant → nanoseconds per round [R]; index r is the same round for all.
        warmup: Variant → its warm-up.
        elapsed: Seconds of the measured part.
        reached: Whether the plan's least rounds and seconds were met.
        openings: Rounds of each opening, in order; they sum up to R.
        device_ms: Variant → device time of every round, where its call knows that; else empty.
    """

    times: dict[str, NDArray[np.int64]]
    warmup: dict[str, Warmup]
    elapsed: float
    reached: bool
    openings: tuple[int, ...]
    device_ms: dict[str, list[float]] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        return len(next(iter(self.times.values())))


def measure(
    calls: Mapping[str, TimedCall],
    *,
    inputs: int,
    plan: Plan,
    seed: int,
    clock: Clock = time.perf_counter_ns,
) -> CellTimes:
    """Time the variants of one cell, in one opening, against each other.

    Args:
        calls: Variant name → its call; all do the same work on the same inputs.
        inputs: How many prepared inputs the calls know; rounds rotate through them.
        plan: Warm-up and length.
        seed: Of the order of the variants within each round.
        clock: Monotonic nanoseconds.
    """
    warmup = {
        name: warm_up(call, inputs=inputs, plan=plan, clock=clock) for name, call in calls.items()
    }
    names = list(calls)
    rng = np.random.default_rng(seed)
    rounds: list[list[int]] = []
    start = clock()
    elapsed = 0.0
    while not plan.done(len(rounds), elapsed):
        taken = [0] * len(names)
        index = len(rounds) % inputs
        for position in rng.permutation(len(names)):
            taken[position] = _time_once(calls[names[position]], index, clock)
        rounds.append(taken)
        elapsed = (clock() - start) / 1e9
    table = np.array(rounds, dtype=np.int64)
    times = {name: table[:, column] for column, name in enumerate(names)}
    count = len(rounds)
    device_ms = {name: getattr(call, "device_ms", [])[-count:] for name, call in calls.items()}
    return CellTimes(times, warmup, elapsed, plan.reached(count, elapsed), (count,), device_ms)


def join(shares: Sequence[CellTimes]) -> CellTimes:
    """Put the openings of one cell together, in order."""
    first = shares[0]

    def warmed(name: str) -> Warmup:
        taken = [share.warmup[name] for share in shares]
        return Warmup(
            sum(w.calls for w in taken),
            sum(w.seconds for w in taken),
            all(w.settled for w in taken),
        )

    return CellTimes(
        {name: np.concatenate([share.times[name] for share in shares]) for name in first.times},
        {name: warmed(name) for name in first.warmup},
        sum(share.elapsed for share in shares),
        all(share.reached for share in shares),
        tuple(rounds for share in shares for rounds in share.openings),
        {
            name: [ms for share in shares for ms in share.device_ms[name]]
            for name in first.device_ms
        },
    )


def warm_up(call: TimedCall, *, inputs: int, plan: Plan, clock: Clock) -> Warmup:
    """Call until the least calls and time are done and two windows agree, or the cap is reached.

    A window is a multiple of the rotation, so that both hold the same inputs; one call where
    windows need not agree.
    """
    window = inputs * max(1, -(-5 // inputs)) if plan.agreement else 1
    taken: list[int] = []
    start = clock()
    while True:
        for _ in range(window):
            taken.append(_time_once(call, len(taken) % inputs, clock))
        elapsed = (clock() - start) / 1e9
        settled = not plan.agreement or (
            len(taken) >= 2 * window and _agree(taken, window, plan.agreement)
        )
        enough = len(taken) >= plan.warmup_calls and elapsed >= plan.warmup_seconds
        late = len(taken) >= plan.warmup_calls and elapsed >= plan.longest_warmup
        if late or (enough and settled):
            return Warmup(len(taken), elapsed, settled)


def _agree(taken: list[int], window: int, agreement: float) -> bool:
    last = statistics.median(taken[-window:])
    before = statistics.median(taken[-2 * window : -window])
    return abs(last - before) <= agreement * before


def _time_once(call: TimedCall, index: int, clock: Clock) -> int:
    begin = clock()
    call(index)
    return max(1, clock() - begin)  # a ratio of a call below the clock's step must stay finite
