"""What stands beside the scores of a comparison: its setting, and the time of inference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mdpd_deploy.artifacts.run import Run
    from mdpd_deploy.config import Config
    from mdpd_deploy.study.plan import Plan
    from mdpd_deploy.study.results import Latency
    from mdpd_deploy.study.schedule import CellOutcome

PLACES: Any = {"data": {"path", "eval_path"}, "backbone": {"name", "weights"}}  # nobody's business


def study_facts(plan: Plan, engine: str, jobs: int, threads: int) -> dict[str, Any]:
    """Return what a reader must know to judge the table, without a place of this machine."""
    from mdpd_deploy.machine import describe

    base, machine = plan.base, describe()
    name = base.backbone.name
    length = (
        f"{base.train.steps} steps"
        if base.train.steps is not None
        else f"{base.train.epochs or 10:g} epochs"
    )
    own = {name for options in plan.of_tasks.values() for name in options}
    if own & {"train.steps", "train.epochs"}:
        length += f", and as {base.recipe} has it for single tasks"
    rate = "its own default" if base.optim.lr is None else f"optim.lr={base.optim.lr:g}"
    if "optim.lr" in own:
        rate = f"the rate that {base.recipe} has for each task"
    running = f"{jobs} training{'s' * (jobs > 1)} of {threads} thread{'s' * (threads > 1)}"
    device = machine["gpu"][0]["name"] if on_gpu(base) and machine["gpu"] else machine["cpu"]
    return {
        "backbone": Path(name).name if name.startswith("/") else name,
        "length": length,
        "batch": base.train.step_size,
        "rate": rate,
        "machine": "a Ray cluster" if engine == "ray" else f"{device}, {running} at a time",
        "config": base.model_dump(mode="json", exclude_defaults=True, exclude=PLACES),
        "of_tasks": {task: dict(options) for task, options in plan.of_tasks.items()},
        "left_out": list(plan.left_out),
        "details": machine,
    }


def on_gpu(base: Config) -> bool:
    """Whether the trainings of this machine would use its GPU."""
    import torch

    return base.train.device == "cuda" or (
        base.train.device == "auto" and torch.cuda.is_available()
    )


def study_latency(
    cells: Sequence[CellOutcome], folder: Path, seconds: float, asked: str
) -> tuple[dict[str, Latency], str]:
    """Time the deployed models of one task against each other, interleaved in one run.

    What is deployed as backbone + head is one graph whatever trained it, so that one of these is
    timed for all; the others are what they are at inference.
    """
    from mdpd_deploy.artifacts.run import Run

    found: dict[str, dict[str, Run]] = {}
    for outcome in cells:
        runs = [o.run for o in outcome.seeds.values() if o.summary is not None]
        if runs:
            found.setdefault(outcome.cell.task, {})[outcome.cell.method] = Run.open(runs[0])
    if not found:
        return {}, ""
    task = max(found, key=lambda name: len(found[name]))
    return _time(task, found[task], folder / "latency", seconds, asked)


def _time(
    task: str, runs: dict[str, Run], folder: Path, seconds: float, asked: str
) -> tuple[dict[str, Latency], str]:
    import tempfile

    from mdpd_deploy.artifacts.folders import atomic_folder
    from mdpd_deploy.commands.subject import backbone_name, input_source
    from mdpd_deploy.machine import cpu_count
    from mdpd_deploy.serve.latency.benchmark import Grid, run_benchmark
    from mdpd_deploy.serve.latency.cells import Plan
    from mdpd_deploy.serve.latency.chart import write_chart
    from mdpd_deploy.serve.latency.runtimes import choose_device
    from mdpd_deploy.serve.latency.variants import variants_of_methods
    from mdpd_deploy.study.results import Latency

    faded = {label: run for label, run in runs.items() if run.keeps is None}
    first = next(iter(faded.values()), next(iter(runs.values())))
    kept = {label: run for label, run in runs.items() if label not in faded}
    same = Latency(1.0, None, "backbone + head: the same graph")
    latency = dict.fromkeys(faded, same)
    runtime = "onnx" if _has_onnxruntime() else "torch"
    device = choose_device(asked, (runtime,))
    grid = Grid((runtime,), (1,), device, cpu_count(), Plan(seconds=seconds), 0)
    setting = f"{runtime} on {device}, batch 1, {task}, {seconds:g} s interleaved"
    if not kept:
        return latency, setting
    with tempfile.TemporaryDirectory(prefix="mdpd-compare-") as graphs:
        report = run_benchmark(
            variants_of_methods(first, kept),
            input_source(first),
            grid,
            source={
                "kind": "comparison",
                "task": task,
                "backbone": backbone_name(first.summary["backbone"]),
            },
            folder=Path(graphs),
        )
    with atomic_folder(folder, overwrite=True) as temporary:
        report.write(temporary / "latency.json")
        write_chart(report, temporary)
    setting = "; ".join([setting, *report.warnings])
    for ratio in report.ratios:
        if ratio.variant in kept:
            latency[ratio.variant] = Latency(ratio.median, ratio.ci95, ratio.words)
    return latency, setting


def _has_onnxruntime() -> bool:
    from importlib.util import find_spec

    return find_spec("onnxruntime") is not None
