"""The whole benchmark: build the variants, time them cell by cell, say what the times allow.

A cell is runtime × batch. A runtime's sessions are dropped before the next one starts, so that the
thread pools of PyTorch and ONNX Runtime never compete; ratios are only ever taken between calls of
one round, inside one opening of one cell.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mdpd_deploy
from mdpd_deploy.graphs.signature import same_structure
from mdpd_deploy.graphs.trace import export_onnx
from mdpd_deploy.machine import describe, output_of
from mdpd_deploy.runtimes.tensorrt.runner import TrtRunner
from mdpd_deploy.serve.latency.cells import CellTimes, Plan
from mdpd_deploy.serve.latency.contention import Counters
from mdpd_deploy.serve.latency.estimate import (
    MARGIN,
    control_words,
    paired_ratio,
    percentiles_ms,
    statistic,
    verdict,
)
from mdpd_deploy.serve.latency.gpu_state import gpu_state
from mdpd_deploy.serve.latency.inputs import InputSource, size_of
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
    OpenVinoSession,
    Session,
    TorchSession,
    TrtSession,
    copy_times_ms,
    measure_openings,
    torch_threads,
)
from mdpd_deploy.serve.latency.variants import BARE, Variant
from mdpd_deploy.serve.operations import count_flops, count_nodes, count_operators

log = logging.getLogger(__name__)

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
        precision: Of every variant, by runtime; fp32 where none is named.
    """

    runtimes: tuple[str, ...]
    batches: tuple[int, ...]
    device: str
    threads: int
    plan: Plan
    seed: int
    precision: Mapping[str, str] = field(default_factory=dict)

    def precision_in(self, runtime: str) -> str:
        """Return what every variant is computed in."""
        return self.precision.get(runtime, "fp32")


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
    bench = _Benchmark(variants, inputs, grid, report, folder, engine_of)
    report.variants = [
        VariantNote(v.name, v.what, not bench.built[v.name].trained, bench.built[v.name].parameters)
        for v in variants
    ]
    report.identity = bench.identity()
    report.machine = {**describe(), "git_commit": _git_commit(), "gpu_state_before": gpu_state()}
    before = Counters.now()
    for runtime in grid.runtimes:
        bench.time(runtime)
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
        "openvino": "OpenVINO, one stream, latency hint",
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
    words = ("-C", str(root), "describe", "--always", "--dirty", "--abbrev=40")
    return output_of("git", *words).strip() or None


class _Benchmark:
    """The variants, built for the grid, and the report that their times go into."""

    def __init__(
        self,
        variants: Sequence[Variant],
        inputs: InputSource,
        grid: Grid,
        report: LatencyReport,
        folder: Path,
        engine_of: EngineOf | None,
    ) -> None:
        self.inputs = inputs
        self.grid = grid
        self.report = report
        self.folder = folder
        self.engine_of = engine_of
        self.variants = {variant.name: variant for variant in variants}
        self.batches = {batch: inputs.batches(batch, seed=grid.seed) for batch in grid.batches}
        self.built = {v.name: self._build(v) for v in variants if v.name != CONTROL}
        self.built[CONTROL] = self.built[DEPLOYED]

    def _build(self, variant: Variant) -> _Built:
        log.info("preparing %s", variant.name)
        result = _Built()
        for_identity = variant.name in (DEPLOYED, BARE)
        graph_wanted = for_identity or {"onnx", "openvino", "trt"} & set(self.grid.runtimes)
        if variant.graph is not None and graph_wanted:
            result.graph = variant.graph(self.folder)
        if variant.load is not None:
            model, result.trained = variant.load()
            result.parameters = sum(p.numel() for p in model.parameters())
            sets = {batch: arrays[0] for batch, arrays in self.batches.items()}
            result.flops = {batch: count_flops(model, arrays) for batch, arrays in sets.items()}
            result.nodes["torch"] = count_operators(model, sets[self.grid.batches[0]])
            if result.graph is None and graph_wanted:
                result.graph = export_onnx(model, self.folder / f"{variant.name}.onnx").path
        if result.graph is not None:
            result.nodes["onnx"] = result.nodes["openvino"] = count_nodes(result.graph)
        return result

    def identity(self) -> Identity | None:
        """Compare the deployed graph with the bare one, where there is one."""
        if BARE not in self.built:
            return None
        deployed, bare = self.built[DEPLOYED].graph, self.built[BARE].graph
        assert deployed is not None and bare is not None
        differences = same_structure(deployed, bare)
        nodes = self.built[DEPLOYED].nodes["onnx"]
        return Identity((DEPLOYED, BARE), nodes, not differences, differences)

    def time(self, runtime: str) -> None:
        """Measure the cells of one runtime and put them into the report."""
        grid = self.grid
        openers = {name: partial(self._open, name, runtime) for name in self.variants}
        what = f"{runtime} on {grid.device}, batch {', '.join(map(str, self.batches))}"
        with torch_threads(grid.threads if runtime == "torch" else 1):
            cells = measure_openings(openers, self.batches, grid.plan, grid.seed, what)
        for batch, cell in cells.items():
            self._add_cell(runtime, batch, cell)
            self._add_ratios(runtime, batch, cell)

    def _open(self, name: str, runtime: str) -> Session:
        graph, load = self.built[name].graph, self.variants[name].load
        if runtime == "torch":
            assert load is not None
            names = self.inputs.preprocess.input_names
            return TorchSession(load()[0], names, device=self.grid.device)
        assert graph is not None
        if runtime == "onnx":
            return OnnxSession(graph, device=self.grid.device, threads=self.grid.threads)
        if runtime == "openvino":
            precision = self.grid.precision_in(runtime)
            return OpenVinoSession(graph, threads=self.grid.threads, precision=precision)
        assert self.engine_of is not None
        runner = self.engine_of(name, graph)
        self.built[name].nodes["trt"] = runner.engine.num_layers
        return TrtSession(runner)

    def _add_cell(self, runtime: str, batch: int, cell: CellTimes) -> None:
        sets = self.batches[batch]
        on_gpu = self.grid.device == "cuda" and torch.cuda.is_available()
        copies = copy_times_ms(sets[0], self.inputs.outputs) if on_gpu else None
        how = cell.rounds, cell.elapsed, cell.reached, list(cell.openings)
        self.report.cells.append(CellNote(runtime, batch, *how, copies))
        for name, times in cell.times.items():
            device_ms = cell.device_ms[name]
            row = Row(
                variant=name,
                **self._place(runtime, batch),
                size=size_of(sets),
                n=cell.rounds,
                **percentiles_ms(times),
                items_per_s=batch * cell.rounds / (int(times.sum()) / 1e9),
                device_p50_ms=float(np.median(device_ms)) if device_ms else None,
                nodes=self.built[name].nodes.get(runtime),
                flops=self.built[name].flops.get(batch),
                warmup=asdict(cell.warmup[name]),
            )
            self.report.rows.append(row)
            self.report.raw.append(Raw(runtime, batch, name, times.tolist()))

    def _add_ratios(self, runtime: str, batch: int, cell: CellTimes) -> None:
        ratios = {
            name: paired_ratio(
                times, cell.times[DEPLOYED], openings=cell.openings, seed=self.grid.seed
            )
            for name, times in cell.times.items()
            if name != DEPLOYED
        }
        control, base = ratios[CONTROL], self.built[DEPLOYED]
        for name, ratio in ratios.items():
            said, built = verdict(ratio, control, self.report.margin), self.built[name]
            is_control = name == CONTROL
            row = RatioRow(
                variant=name,
                over=DEPLOYED,
                **self._place(runtime, batch),
                median=ratio.median,
                ci95=(ratio.low, ratio.high),
                rounds=ratio.rounds,
                openings=list(ratio.openings),
                control=is_control,
                verdict=said.code,
                words=control_words(control, self.report.margin) if is_control else said.words,
                nodes_ratio=_share(built.nodes.get(runtime), base.nodes.get(runtime)),
                flops_ratio=_share(built.flops.get(batch), base.flops.get(batch)),
            )
            self.report.ratios.append(row)

    def _place(self, runtime: str, batch: int) -> dict[str, Any]:
        grid = self.grid
        return {
            "runtime": runtime,
            "precision": grid.precision_in(runtime),
            "device": grid.device,
            "batch": batch,
        }


def _share(value: int | None, over: int | None) -> float | None:
    return value / over if value is not None and over else None
