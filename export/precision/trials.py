"""`--precision auto`: every valid precision is tried, timed against fp32, and the fastest is kept.

Kept is only what passed its gates; with `--parity warn` one that missed some is a row of the table.

Timing belongs to another room, so it is handed in as a function.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mdpd_deploy.errors import UserError, WorkFailed
from mdpd_deploy.export.precision.convert import Candidate
from mdpd_deploy.export.precision.forms import Form

logger = logging.getLogger(__name__)

FASTER = "faster"
UNCLEAR = "cannot-tell"


class Timing(Protocol):
    """What was measured of one graph against fp32, in rounds that time each of them once."""

    @property
    def median(self) -> float:
        """Time / time of fp32, from rounds that time both."""
        ...

    @property
    def ci95(self) -> tuple[float, float]: ...

    @property
    def p50_ms(self) -> float: ...

    @property
    def verdict(self) -> str:
        """`faster` only when the interval excludes 1 and the spread of fp32 against itself."""
        ...

    @property
    def words(self) -> str: ...


@dataclass(frozen=True)
class Race:
    """Times of several graphs.

    Attributes:
        timings: By the names of forms; fp32 against itself is the control.
        settings: Batch, rounds, threads and the like, for the manifest.
    """

    timings: Mapping[str, Timing]
    settings: dict[str, Any]


TimeGraphs = Callable[[Mapping[str, Candidate]], Race]  # by the names of their forms


@dataclass(frozen=True)
class Trials:
    """What was tried, and which one was kept."""

    chosen: Candidate
    table: dict[str, Any]


def try_all(
    forms: Sequence[Form], make: Callable[[Form], Candidate], time_graphs: TimeGraphs
) -> Trials:
    """Make every form, time those that pass their gates, and choose.

    Args:
        forms: What to try; the first is fp32, which is kept unless another is faster.
        make: Converts and verifies one form. One that fails in any way, or that lacks what it
            needs, is a row of the table.
        time_graphs: Times graphs or engines against fp32.

    Raises:
        UserError, WorkFailed: If fp32 itself cannot be made.
    """
    base, *others = forms
    candidates = {base.name: make(base)}
    failed: dict[str, str] = {}
    for form in others:
        try:
            candidates[form.name] = make(form)
        except (UserError, WorkFailed) as err:
            failed[form.name] = str(err)
            logger.info("%s is out: %s", form.name, err)
    race = time_graphs(candidates)
    warned = [name for name, made in candidates.items() if made.warned]
    chosen = choose(base.name, race.timings, barred=warned)
    rows = [_row(f, candidates.get(f.name), failed.get(f.name), race) for f in forms]
    told = _recommendation(base.name, chosen, race, warned, list(failed))
    table = {
        "chosen": chosen,
        "recommendation": told,
        "settings": race.settings,
        "trials": rows,
    }
    return Trials(candidates[chosen], table)


def choose(base: str, timings: Mapping[str, Timing], *, barred: Collection[str] = ()) -> str:
    """Return the fastest form that is really faster than `base`, else `base`.

    Args:
        base: What is kept otherwise.
        timings: By the names of forms.
        barred: Those that missed a gate; `--parity warn` is no reason to prefer them.
    """
    open_to = {name: timing for name, timing in timings.items() if name not in {base, *barred}}
    faster = {name: t.median for name, t in open_to.items() if t.verdict == FASTER}
    return min(faster, key=lambda name: faster[name], default=base)


def _row(
    form: Form, candidate: Candidate | None, failure: str | None, race: Race
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": form.name,
        "precision": form.precision,
        "runtime": form.runtime,
        "note": form.note,
    }
    if candidate is None:
        return row | {"verdict": "failed", "reason": failure}
    timing = race.timings[form.name]
    parity, metric = candidate.gates.get("parity"), candidate.gates.get("metric")
    return row | {
        "verdict": "warned" if candidate.warned else "passed",
        "bytes": candidate.graph.stat().st_size,
        "scaled_diff": parity.details["scaled_diff"] if parity else None,
        "drop": metric.details.get("drop") if metric else None,
        "p50_ms": timing.p50_ms,
        "ratio": timing.median,
        "ci95": list(timing.ci95),
        "timing": timing.verdict,
        "words": timing.words,
    }


def _recommendation(
    base: str, chosen: str, race: Race, warned: Collection[str], failed: Sequence[str]
) -> str:
    timing = race.timings[chosen]
    low, high = timing.ci95
    timed = [name for name in race.timings if name not in {base, *warned}]
    unclear = [name for name in timed if race.timings[name].verdict == UNCLEAR]
    others = " and ".join(name for name in timed if name not in unclear)
    if chosen != base:
        told = (
            f"{chosen} is kept: the fastest that passes its gates, {timing.median:.2f} "
            f"[{low:.2f}, {high:.2f}] of {base}'s time"
        )
    elif others:
        told = f"{others} did not pay here: {base} is kept"
    else:
        told = f"{base} is kept"
    if unclear:
        told = f"{told}; whether {' and '.join(unclear)} pays, this machine cannot tell"
    if warned:
        told = f"{told}; {' and '.join(warned)} missed a gate and cannot be chosen"
    return f"{told}; {' and '.join(failed)} failed" if failed else told
