"""Several graphs of one model against each other, in ONNX Runtime on the CPU or as engines.

The rounds and the estimator are the latency benchmark's; the first graph is the one that the others
are compared with, and it runs a second time as its own A/A control.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mdpd_deploy.machine import cpu_count, describe
from mdpd_deploy.runtimes.tensorrt.cuda import current_gpu
from mdpd_deploy.runtimes.tensorrt.runner import TrtRunner
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
from mdpd_deploy.serve.latency.runtimes import (
    OnnxSession,
    Session,
    TrtSession,
    measure_openings,
)


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
    graphs: Mapping[str, Path],
    inputs: InputSource,
    *,
    batch: int,
    plan: Plan,
    threads: int | None = None,
    seed: int = 0,
    engines: bool = False,
    host_code: bool = False,
) -> GraphRace:
    """Time graphs in interleaved rounds.

    Args:
        graphs: Name → `.onnx` file, or `.plan` file with `engines`; all take the same inputs.
        inputs: What they are fed.
        batch: Examples per call.
        plan: Warm-up and length.
        threads: Threads inside one operator; None = the CPU quota.
        seed: Of inputs, order and bootstrap.
        engines: The files are TensorRT engines that were built here.
        host_code: Those engines may carry code for the processor.

    Raises:
        UserError: If `engines` is asked for without TensorRT or a GPU.
    """
    used = threads or cpu_count()
    device = "cuda" if engines else "cpu"
    base = next(iter(graphs))
    control = f"{base} again"
    sets = inputs.batches(batch, seed=seed)

    def opened(path: Path) -> Session:
        if engines:
            return TrtSession(TrtRunner(path, host_code=host_code))
        return OnnxSession(path, device=device, threads=used)

    openers = {
        name: partial(opened, path) for name, path in {**graphs, control: graphs[base]}.items()
    }
    cell = measure_openings(openers, {batch: sets}, plan, seed)[batch]
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
        **({"gpu": current_gpu().name} if engines else {"threads": used}),
        "cpu": describe()["cpu"],
        "openings": plan.openings,
        "statistic": statistic(plan.openings),
        "control_spread": itself.spread,
    }
    return GraphRace(timings, settings)
