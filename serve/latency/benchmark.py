"""The whole benchmark: build the variants, time them cell by cell, say what the times allow.

A cell is runtime × batch. A runtime's sessions are dropped before the next one starts, so that the
thread pools of PyTorch and ONNX Runtime never compete; ratios are only ever taken between calls of
one round, inside one opening of one cell.
"""

import gc
import logging
import subprocess
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mdpd_deploy
from mdpd_deploy.graphs.signature import same_structure
from mdpd_deploy.graphs.trace import export_onnx
from mdpd_deploy.machine import describe
from mdpd_deploy.runtimes.tensorrt.runner import TrtRunner
from mdpd_deploy.serve.latency.cells import CellTimes, Plan, join, measure
from mdpd_deploy.serve.latency.contention import Counters
from mdpd_deploy.serve.latency.estimate import (
    MARGIN,
    Ratio,
    control_words,
    paired_ratio,
    percentiles_ms,
    statistic,
    verdict,
)
from mdpd_deploy.serve.latency.gpu_state import gpu_state
from mdpd_deploy.serve.latency.inputs import Arrays, InputSource, size_of
from mdpd_deploy.serve.latency.report import (
    CONTROL,
    DEPLOYED,
    CellNote,
    Identity,
    LatencyReport,
    RatioRow,
    Raw,
    Row,
    VariantNote,
    write_claims,
)
from mdpd_deploy.serve.latency.runtimes import (
    OnnxSession,
    PreparedCall,
    Session,
    TorchSession,
    TrtSession,
    copy_times_ms,
    torch_threads,
)
from mdpd_deploy.serve.latency.variants import BARE, Variant
from mdpd_deploy.serve.operations import count_flops, count_nodes, count_operators

log = logging.getLogger(__name__)

PRECISION = "fp32"
EngineOf = Callable[[str, Path], TrtRunner]


@dataclass(frozen=True)
class Grid:
    """What is measured.

    Attributes:
        runtimes: Of `runtimes.RUNTIMES`.
        batches: Examples per call, one cell each per runtime.
        device: "cpu" or "cuda", the same for every runtime.
        threads: Threads inside one operator, for both runtimes.
        plan: Warm-up and length of a cell.
        seed: Of inputs, order and bootstrap.
        precision: Of every variant.
    """

    runtimes: tuple[str, ...]
    batches: tuple[int, ...]
    device: str
    threads: int
    plan: Plan
    seed: int
    precision: str = "fp32"


@dataclass
class _Built:
    """What one variant became before timing."""

    trained: bool = True
    parameters: int | None = None
    graph: Path | None = None
    nodes: dict[str, int] = field(default_factory=dict)  # by runtime
    flops: dict[int, int] = field(default_factory=dict)  # by batch


def run_benchmark(
    variants: Sequence[Variant],
    inputs: InputSource,
    grid: Grid,
    *,
    source: dict[str, Any],
    folder: Path,
    engine_of: EngineOf | None = None,
) -> LatencyReport:
    """Time the variants over the grid.

    Args:
        variants: From `variants_of_run` or `variants_of_bundle`; the first is `deployed`, the
            second its A/A control.
        inputs: What they are fed.
        grid: Cells and how each is measured.
        source: What the report says about the run or bundle.
        folder: An empty folder for graphs, which the caller removes.
        engine_of: Returns the TensorRT engine of a variant by its name and graph; needed for the
            runtime trt.
    """
    report = LatencyReport(
        source=source, settings=_settings(grid, inputs), margin=MARGIN[grid.device]
    )
    batches = {batch: inputs.batches(batch, seed=grid.seed) for batch in grid.batches}
    built = _build(variants, grid, batches, folder)
    report.variants = [
        VariantNote(v.name, v.what, not built[v.name].trained, built[v.name].parameters)
        for v in variants
    ]
    report.identity = _identity(built)
    report.machine = {**describe(), "git_commit": _git_commit(), "gpu_state_before": gpu_state()}
    before = Counters.now()
    for runtime in grid.runtimes:
        with torch_threads(grid.threads if runtime == "torch" else 1):
            cells = _measure_cells(variants, built, runtime, grid, inputs, batches, engine_of)
        for batch, cell in cells.items():
            _add_cell(report, cell, inputs, batches[batch], built, grid, runtime=runtime)
    report.machine["gpu_state_after"] = gpu_state()
    contention = before.until(Counters.now())
    report.machine["contention"] = asdict(contention)
    if contention.words:
        report.warnings.append(contention.words)
    report.claims = write_claims(report)
    return report


def _settings(grid: Grid, inputs: InputSource) -> dict[str, Any]:
    return {
        "device": grid.device,
        "threads": grid.threads,
        "seed": grid.seed,
        "seconds_per_cell": grid.plan.seconds,
        "inputs": inputs.what,
        "clock": "time.perf_counter_ns, around the whole call",
        "torch": "eager mode, SDPA attention, inference_mode",
        "onnx": "ONNX Runtime, default graph optimisation, session.force_spinning_stop=1",
        "trt": "TensorRT engines, all built with the options of the bundle's own",
        "cuda": "the device is idle before and after every timed call; copies are timed apart",
        "openings": grid.plan.openings,
        "statistic": statistic(grid.plan.openings),
    }


def _git_commit() -> str | None:
    """Commit of the checkout this package runs from; None when it was installed otherwise."""
    root = Path(mdpd_deploy.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _build(
    variants: Sequence[Variant],
    grid: Grid,
    batches: dict[int, list[Arrays]],
    folder: Path,
) -> dict[str, _Built]:
    built: dict[str, _Built] = {}
    for variant in variants:
        if variant.name == CONTROL:
            built[CONTROL] = built[DEPLOYED]
            continue
        log.info("preparing %s", variant.name)
        result = built[variant.name] = _Built()
        graph_wanted = {"onnx", "trt"} & set(grid.runtimes) or variant.name in (
            DEPLOYED,
            BARE,
        )  # for identity
        if variant.graph is not None and graph_wanted:
            result.graph = variant.graph(folder)
        if variant.load is not None:
            model, result.trained = variant.load()
            result.parameters = sum(p.numel() for p in model.parameters())
            result.flops = {size: count_flops(model, sets[0]) for size, sets in batches.items()}
            result.nodes["torch"] = count_operators(model, batches[grid.batches[0]][0])
            if result.graph is None and graph_wanted:
                result.graph = export_onnx(model, folder / f"{variant.name}.onnx").path
        if result.graph is not None:
            result.nodes["onnx"] = count_nodes(result.graph)
    return built


def _identity(built: dict[str, _Built]) -> Identity | None:
    if BARE not in built:
        return None
    deployed, bare = built[DEPLOYED].graph, built[BARE].graph
    assert deployed is not None and bare is not None
    differences = same_structure(deployed, bare)
    return Identity((DEPLOYED, BARE), built[DEPLOYED].nodes["onnx"], not differences, differences)


@dataclass
class _Cell:
    """One cell while its openings are measured."""

    shares: list[CellTimes] = field(default_factory=list)
    device_ms: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


def _measure_cells(
    variants: Sequence[Variant],
    built: dict[str, _Built],
    runtime: str,
    grid: Grid,
    inputs: InputSource,
    batches: dict[int, list[Arrays]],
    engine_of: EngineOf | None,
) -> dict[int, _Cell]:
    """Open every variant several times, in random order, and give each opening its share."""
    cells = {batch: _Cell() for batch in batches}
    sizes = ", ".join(map(str, batches))
    for opening in range(grid.plan.openings):
        which = f"opening {opening + 1} of {grid.plan.openings}"
        log.info("timing %s on %s, batch %s: %s", runtime, grid.device, sizes, which)
        order = np.random.default_rng(grid.seed + opening).permutation(len(variants))
        opened = {
            variants[place].name: _open(variants[place], built, runtime, grid, inputs, engine_of)
            for place in order
        }
        for batch, sets in batches.items():
            calls: dict[str, PreparedCall] = {
                v.name: opened[v.name].prepare(sets) for v in variants
            }
            plan, seed = grid.plan.share(opening), grid.seed + opening
            share = measure(calls, inputs=len(sets), plan=plan, seed=seed)
            cells[batch].shares.append(share)
            for name, call in calls.items():
                cells[batch].device_ms[name] += call.device_ms[-share.rounds :]
            del calls
        del opened
        gc.collect()
    return cells


def _open(
    variant: Variant,
    built: dict[str, _Built],
    runtime: str,
    grid: Grid,
    inputs: InputSource,
    engine_of: EngineOf | None,
) -> Session:
    if runtime == "trt":
        graph = built[variant.name].graph
        assert graph is not None and engine_of is not None
        runner = engine_of(variant.name, graph)
        built[variant.name].nodes["trt"] = runner.engine.num_layers
        return TrtSession(runner)
    if runtime == "onnx":
        graph = built[variant.name].graph
        assert graph is not None
        return OnnxSession(graph, device=grid.device, threads=grid.threads)
    assert variant.load is not None
    return TorchSession(variant.load()[0], inputs.preprocess.input_names, device=grid.device)


def _add_cell(
    report: LatencyReport,
    measured: _Cell,
    inputs: InputSource,
    batches: list[Arrays],
    built: dict[str, _Built],
    grid: Grid,
    *,
    runtime: str,
) -> None:
    batch = len(next(iter(batches[0].values())))
    cell = join(measured.shares)
    on_gpu = grid.device == "cuda" and torch.cuda.is_available()
    copies = copy_times_ms(batches[0], inputs.outputs) if on_gpu else None
    report.cells.append(
        CellNote(
            runtime, batch, cell.rounds, cell.elapsed, cell.reached, list(cell.openings), copies
        )
    )
    for name, times in cell.times.items():
        device_ms = measured.device_ms[name]
        report.rows.append(
            Row(
                variant=name,
                runtime=runtime,
                precision=grid.precision,
                device=grid.device,
                batch=batch,
                size=size_of(batches),
                n=cell.rounds,
                **percentiles_ms(times),
                items_per_s=batch * cell.rounds / (int(times.sum()) / 1e9),
                device_p50_ms=float(np.median(device_ms)) if device_ms else None,
                nodes=built[name].nodes.get(runtime),
                flops=built[name].flops.get(batch),
                warmup=asdict(cell.warmup[name]),
            )
        )
        report.raw.append(Raw(runtime, batch, name, times.tolist()))
    _add_ratios(report, cell, built, grid, runtime=runtime, batch=batch)


def _add_ratios(
    report: LatencyReport,
    cell: CellTimes,
    built: dict[str, _Built],
    grid: Grid,
    *,
    runtime: str,
    batch: int,
) -> None:
    def ratio_of(name: str) -> Ratio:
        over, openings = cell.times[DEPLOYED], cell.openings
        return paired_ratio(cell.times[name], over, openings=openings, seed=grid.seed)

    control = ratio_of(CONTROL)
    for name in cell.times:
        if name == DEPLOYED:
            continue
        ratio = ratio_of(name)
        said = verdict(ratio, control, report.margin)
        is_control = name == CONTROL
        report.ratios.append(
            RatioRow(
                variant=name,
                over=DEPLOYED,
                runtime=runtime,
                precision=grid.precision,
                device=grid.device,
                batch=batch,
                median=ratio.median,
                ci95=(ratio.low, ratio.high),
                rounds=ratio.rounds,
                openings=list(ratio.openings),
                control=is_control,
                verdict=said.code,
                words=control_words(control, report.margin) if is_control else said.words,
                nodes_ratio=_share(
                    built[name].nodes.get(runtime), built[DEPLOYED].nodes.get(runtime)
                ),
                flops_ratio=_share(built[name].flops.get(batch), built[DEPLOYED].flops.get(batch)),
            )
        )


def _share(value: int | None, over: int | None) -> float | None:
    return value / over if value is not None and over else None
