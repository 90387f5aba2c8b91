"""Several graphs of one model against each other, in the runtimes of a CPU or as engines.

The rounds and the estimator are the latency benchmark's; the first graph is the one that the others
are compared with, and it runs a second time as its own A/A control.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mdpd_deploy.machine import cpu_count, describe
from mdpd_deploy.runtimes.tensorrt.cuda import current_gpu
from mdpd_deploy.serve.latency.cells import Plan
from mdpd_deploy.serve.latency.estimate import (
    MARGIN,
    control_words,
    paired_ratio,
    percentiles_ms,
    statistic,
    verdict,
)
from mdpd_deploy.serve.latency.inputs import InputSource, size_of
from mdpd_deploy.serve.latency.runtimes import Session, measure_openings


@dataclass(frozen=True)
class GraphTiming:
    """One graph against the first.

    Attributes:
        median: Time / time of the first graph, as `estimate.Ratio`.
        ci95: Its 95 % interval.
        p50_ms: Median time of a call.
        verdict: As `estimate.verdict`; `control` for the first graph itself.
        words: The same as a sentence.
    """

    median: float
    ci95: tuple[float, float]
    p50_ms: float
    verdict: str
    words: str


@dataclass(frozen=True)
class GraphRace:
    """What was measured, and how."""

    timings: dict[str, GraphTiming]
    settings: dict[str, Any]


def race_graphs(
    openers: Mapping[str, Callable[[], Session]],
    inputs: InputSource,
    *,
    batch: int,
    plan: Plan,
    device: str = "cpu",
    seed: int = 0,
) -> GraphRace:
    """Time graphs in interleaved rounds.

    Args:
        openers: Name → what opens the graph or engine; all take the same inputs.
        inputs: What they are fed.
        batch: Examples per call.
        plan: Warm-up and length.
        device: "cpu" or "cuda", where all of them run.
        seed: Of inputs, order and bootstrap.
    """
    base = next(iter(openers))
    control = f"{base} again"
    sets = inputs.batches(batch, seed=seed)
    cell = measure_openings({**openers, control: openers[base]}, {batch: sets}, plan, seed)[batch]
    ratios = {
        name: paired_ratio(times, cell.times[base], openings=cell.openings, seed=seed)
        for name, times in cell.times.items()
    }
    itself = ratios.pop(control)
    timings = {}
    for name, ratio in {**ratios, base: itself}.items():
        said = verdict(ratio, itself, MARGIN[device])
        code: str = said.code
        words = said.words.replace("deployed", base)
        if name == base:
            code, words = "control", control_words(itself, MARGIN[device])
        p50_ms = percentiles_ms(cell.times[name])["p50_ms"]
        ci95 = ratio.low, ratio.high
        timings[name] = GraphTiming(ratio.median, ci95, p50_ms, code, words)
    settings = {
        "batch": batch,
        "size": size_of(sets),
        "rounds": cell.rounds,
        "seconds": round(cell.elapsed, 1),
        "inputs": inputs.what,
        **({"gpu": current_gpu().name} if device == "cuda" else {"threads": cpu_count()}),
        "cpu": describe()["cpu"],
        "openings": plan.openings,
        "statistic": statistic(plan.openings),
        "control_spread": itself.spread,
    }
    return GraphRace(timings, settings)
