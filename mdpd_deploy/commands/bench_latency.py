"""`mdpd bench-latency`: time a deployed model against its bare backbone and its rivals."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdpd_deploy.commands.subject import (
    Subject,
    default_folder,
    inputs_of,
    open_subject,
    source_of,
)
from mdpd_deploy.commands.torch_defaults import torch_defaults
from mdpd_deploy.commands.verb import Json, Overwrite, print_json, takes
from mdpd_deploy.errors import UserError, unknown

if TYPE_CHECKING:
    from mdpd_deploy.runtimes.tensorrt.runner import TrtRunner
    from mdpd_deploy.serve.latency.benchmark import Grid
    from mdpd_deploy.serve.latency.cells import Plan
    from mdpd_deploy.serve.latency.variants import Variant

log = logging.getLogger(__name__)

REPORT_FILE = "latency.json"


@torch_defaults()
def bench_latency(
    run_or_bundle: Annotated[
        Path | str | None,
        typer.Argument(metavar="RUN|BUNDLE", help="Default: the newest run."),
    ] = None,
    *,
    rivals: Annotated[
        Sequence[str] | None,
        typer.Option(
            help="bare, full, side networks, sherl-multi, lora, lora-unmerged, prompt, …. Default: "
            "bare,unipt,sherl; bare alone where no side network fits."
        ),
    ] = None,
    runtime: Annotated[
        Sequence[str] | None,
        typer.Option(
            help="onnx, openvino, torch, and trt for a bundle with an engine, whose rivals are built "
            "alike. Default: onnx,torch; for a bundle without its run the one it was proved in."
        ),
    ] = None,
    batch: Annotated[Sequence[int], typer.Option(help="Batch sizes.")] = (
        1,
        8,
        32,
    ),
    seconds: Annotated[
        float | None,
        typer.Option(
            help="Time per cell, all openings together. Default: 100 rounds and 10 s, at most 20 s."
        ),
    ] = None,
    openings: Annotated[
        int,
        typer.Option(
            help="Times every model is opened anew, each for its part of the time; at least 3."
        ),
    ] = 5,
    out: Annotated[
        Path | str | None, typer.Option(help="Default: RUN/latency, numbered if taken.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(help="Inside one operator. Default: the CPU quota.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of inputs, order and bootstrap.")] = 0,
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Time the deployed model against its rivals, in turn, and say what the times allow.

    Writes latency.json (with every raw time), latency.svg and latency.png.

    Example:
        >>> from mdpd_deploy import bench_latency
        >>> words = dict(rivals=["bare"], runtime=["onnx"], batch=[1], seconds=0.2)
        >>> report = bench_latency(folder / "run", out=folder / "latency", **words)
        >>> [ratio["variant"] for ratio in report["ratios"] if not ratio["control"]]
        ['bare']

    Returns:
        latency.json as a dict without the raw times, and `folder`, where it was written.

    Raises:
        UserError: For a wrong path, name, number or device.
        WorkFailed: If a model cannot be exported or the disk is full.
    """
    from mdpd_deploy.artifacts.bundle import is_bundle
    from mdpd_deploy.artifacts.folders import atomic_folder, refuse_nonempty
    from mdpd_deploy.serve.latency.benchmark import run_benchmark
    from mdpd_deploy.serve.latency.chart import write_chart

    subject = open_subject(None if run_or_bundle is None else Path(run_or_bundle))
    plan = _plan(seconds, openings)
    grid = _grid(subject, runtime, batch, plan, device, threads, seed)
    variants = _variants(subject, rivals)
    folder = default_folder(subject) if out is None else Path(out)
    if any(is_bundle(parent) for parent in (folder.resolve(), *folder.resolve().parents)):
        raise UserError(
            f"--out {folder} lies in a bundle, whose files are all listed: choose a folder outside."
        )
    refuse_nonempty(folder, overwrite=overwrite, ours=_is_report, needed=(subject.path,))
    inputs = inputs_of(subject)
    with tempfile.TemporaryDirectory(prefix="mdpd-latency-") as graphs:
        place = Path(graphs)
        engine_of = _engines(subject, place) if "trt" in grid.runtimes else None
        report = run_benchmark(
            variants, inputs, grid, source=source_of(subject), folder=place, engine_of=engine_of
        )
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        report.write(temporary / REPORT_FILE)
        write_chart(report, temporary)
    return {**report.to_dict(raw=False), "folder": str(folder)}


@takes(bench_latency)
def command(json: Json = False, **asked: Any) -> None:
    found = bench_latency(**asked)
    if json:
        print_json(found)
        return
    from pydantic import TypeAdapter

    from mdpd_deploy.report.terminal import Console
    from mdpd_deploy.serve.latency.report import LatencyReport
    from mdpd_deploy.serve.latency.table import render

    console = Console(highlight=False, soft_wrap=True)
    console.print(render(TypeAdapter(LatencyReport).validate_python(found)))
    console.print(f"report and chart: {found['folder']}")


def _engines(subject: Subject, folder: Path) -> Callable[[str, Path], TrtRunner]:
    """Return what opens the engine of a variant: the bundle's own, or one built like it."""
    from mdpd_deploy.export.tensorrt.install import build_alike
    from mdpd_deploy.runtimes.tensorrt.cache import open_bundle_engine
    from mdpd_deploy.serve.latency.report import CONTROL, DEPLOYED

    bundle = subject.bundle
    assert bundle is not None

    def engine_of(name: str, graph: Path) -> TrtRunner:
        if name in (DEPLOYED, CONTROL):
            return open_bundle_engine(bundle.path, bundle.manifest)
        plan = folder / f"{name}.plan"
        if not plan.is_file():
            log.info("building the engine of %s", name)
        return build_alike(bundle, graph, plan)

    return engine_of


def _is_report(folder: Path) -> bool:
    return (folder / REPORT_FILE).is_file()


def _plan(seconds: float | None, openings: int) -> Plan:
    from mdpd_deploy.serve.latency.cells import FEWEST_OPENINGS, Plan

    if seconds is not None and not 0 < seconds < float("inf"):
        raise UserError(f"--seconds {seconds}: give a time above 0.")
    if openings < FEWEST_OPENINGS:
        raise UserError(
            f"--openings {openings}: give at least {FEWEST_OPENINGS}; fewer cannot say how far one "
            "opening of a model differs from the next, and so no ratio has an interval."
        )
    return Plan(openings=openings, seconds=seconds)


def _grid(
    subject: Subject,
    runtime: Sequence[str] | None,
    batch: Sequence[int],
    plan: Plan,
    device: str,
    threads: int | None,
    seed: int,
) -> Grid:
    from mdpd_deploy.machine import cpu_count
    from mdpd_deploy.serve.latency.benchmark import Grid
    from mdpd_deploy.serve.latency.runtimes import DEFAULT_RUNTIMES, RUNTIMES, choose_device

    bundle = subject.bundle
    default: tuple[str, ...] = DEFAULT_RUNTIMES
    if bundle is not None and (subject.run is None or bundle.runtime != "onnx"):
        default = (bundle.runtime,)
    runtimes = default if runtime is None else tuple(dict.fromkeys(runtime))
    if not runtimes:
        raise UserError(f"--runtime: name at least one of {', '.join(RUNTIMES)}.")
    for name in runtimes:
        if name not in RUNTIMES:
            raise unknown("--runtime", name, RUNTIMES)
    if "torch" in runtimes and subject.run is None:
        raise UserError(
            f"--runtime torch: {subject.path} is a bundle without its run, and a bundle holds no "
            "PyTorch model. Name the run instead, or use --runtime onnx."
        )
    if "trt" in runtimes:
        _require_engine(subject)
    batches = tuple(dict.fromkeys(batch))
    if min(batches, default=0) < 1:
        raise UserError(f"--batch {','.join(map(str, batches))}: a batch holds at least 1 example.")
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads}: give at least 1.")
    if seed < 0:
        raise UserError(f"--seed {seed}: give 0 or a positive whole number.")
    chosen = choose_device(device, runtimes)
    precision = {} if bundle is None else {name: bundle.precision_in(name) for name in runtimes}
    if bundle is not None and "bf16" in precision.values() and chosen == "cpu":
        for name in {"onnx", "openvino"} & set(runtimes):
            bundle.runner(chosen, runtime=name)  # raises where it cannot, with the mend
    return Grid(runtimes, batches, chosen, threads or cpu_count(), plan, seed, precision)


def _require_engine(subject: Subject) -> None:
    from mdpd_deploy.runtimes.tensorrt.cache import read_key

    if subject.bundle is None:
        raise UserError(
            f"--runtime trt: {subject.path} is a run, and engines belong to bundles: name a bundle "
            "for which `mdpd build-engine` has built one."
        )
    if read_key(subject.bundle.path, subject.bundle.manifest) is None:
        raise UserError(
            f"--runtime trt: {subject.path} holds no TensorRT engine: build one on the GPU machine "
            f"with `mdpd build-engine {quote(str(subject.path))}`."
        )


def _variants(subject: Subject, rivals: Sequence[str] | None) -> list[Variant]:
    from mdpd_deploy.artifacts.manifest import MODEL_FILE
    from mdpd_deploy.serve.latency.variants import (
        DEFAULT_RIVALS,
        rival_names,
        variants_of_bundle,
        variants_of_run,
    )

    graph = None if subject.bundle is None else subject.bundle.path / MODEL_FILE
    if subject.run is not None:
        if rivals is None:
            rivals = DEFAULT_RIVALS
            if not subject.run.summary["backbone"].get("taps", True):
                log.info("no side network stands beside this backbone: timed against bare alone")
                rivals = ("bare",)
        names = rival_names(rivals)
        return variants_of_run(subject.run, names, graph=graph)
    assert subject.bundle is not None and graph is not None
    names = rival_names(("bare",) if rivals is None else rivals)
    return variants_of_bundle(graph, subject.bundle.write_bare_graph, names)
