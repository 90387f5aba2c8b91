"""`mdpd compare`: methods × learning rates × seeds on one task or a suite, read side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdpd_deploy.errors import UserError

if TYPE_CHECKING:
    from mdpd_deploy.config import Config
    from mdpd_deploy.study import Ask, Latency, Plan, Results

METHODS = "probe,norms,bitfit,lora,full,unipt,mdpd:unipt"
FACTORS = "0.3,1,3"
FLAGS = ("data", "eval_data", "text", "image", "label", "backbone", "steps", "epochs", "batch",
         "device")  # fmt: skip
CLASSES = 2  # that a forecast takes where no data are named; they hardly matter
WIDTH = 140  # of the tables where lines do not end at a window
SECONDS = 5.0  # of latency measurement


def command(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG.yaml")] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="METHOD[:SIDE][+option=value…] with commas, or all. "
            f"Default: {METHODS.replace(',', ', ')}."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Tasks with commas, or glue, vtab, vtab-full for all.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="File, folder or hub:NAME; for glue and vtab their root.")
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="Separate evaluation data.")] = None,
    text: Annotated[str | None, typer.Option(help="Text column, or two: A,B.")] = None,
    image: Annotated[str | None, typer.Option(help="Column of image paths.")] = None,
    label: Annotated[str | None, typer.Option(help="Label column.")] = None,
    backbone: Annotated[
        str | None, typer.Option(help="timm:NAME, hf:NAME[@revision] or a local folder.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of each training.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data; default 10.")] = None,
    batch: Annotated[int | None, typer.Option(help="Examples per step; default 32.")] = None,
    seeds: Annotated[int | None, typer.Option(help="How many; default 1.")] = None,
    lr_factors: Annotated[
        str | None,
        typer.Option(
            help=f"Of each method's own learning rate; swept on the first seed. Default: {FACTORS}."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    jobs: Annotated[int, typer.Option(help="Trainings at a time.")] = 1,
    threads: Annotated[
        int | None, typer.Option(help="Of each training; default: the processors ÷ jobs.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local, or ray: a cluster with a shared folder.")
    ] = "local",
    latency_seconds: Annotated[
        float, typer.Option(help="Measuring time of inference; 0 leaves it out.")
    ] = SECONDS,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder; one of an earlier comparison is added to. Default: runs/…"),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Any option, for all methods that read it."),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this comparison.")] = None,
    forecast: Annotated[
        bool, typer.Option("--forecast", help="Only forecast each method's memory; no training.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
) -> None:
    """Train every method on the same data, and say what each buys and costs.

    CONFIG.yaml and --set hold what all trainings share; a method that does not read an option is
    trained without it. Interrupted, the same command goes on; finished trainings are not repeated. Writes compare.json,
    compare.md and report.html.
    """
    flags = {
        "data": data,
        "eval_data": eval_data,
        "text": text,
        "image": image,
        "label": label,
        "backbone": backbone,
        "steps": steps,
        "epochs": epochs,
        "batch": batch,
        "device": device,
    }
    words = None if methods is None else _words(methods)
    tasks = None if task is None else _words(task)
    if forecast:
        _print_forecast(config, words, tasks, set_ or (), flags, as_json=json)
        return
    results, folder = _compare(
        config,
        methods=words,
        tasks=tasks,
        seeds=seeds,
        lr_factors=None if lr_factors is None else _factors(lr_factors),
        jobs=jobs,
        threads=threads,
        engine=engine,
        latency_seconds=latency_seconds,
        out=out,
        set=set_ or (),
        resume=resume,
        flags=flags,
    )
    if json:
        from json import dumps

        print(dumps({**results.to_dict(), "folder": str(folder)}))
    else:
        _print(results, folder)
    if any(row.score is None for row in results.rows):
        raise typer.Exit(1)


def compare(
    config: Path | str | Config | None = None,
    *,
    methods: Sequence[str] | None = None,
    task: str | Sequence[str] | None = None,
    seeds: int | None = None,
    lr_factors: Sequence[float] | None = None,
    jobs: int = 1,
    threads: int | None = None,
    engine: str = "local",
    latency_seconds: float = SECONDS,
    out: Path | str | None = None,
    set: Sequence[str] = (),
    resume: Path | str | None = None,
    **flags: Any,
) -> dict[str, Any]:
    """Train methods on the same data and return what each reached and cost.

    Args:
        config: A YAML file or a `Config` with what all trainings share.
        methods: METHOD, METHOD:SIDE, or a side network alone; each may carry options of its own,
            as in "mdpd:unipt+loss.logits=1". None takes a usual selection, ["all"] all there are.
        task: One task, several, or a suite: glue, vtab, vtab-full.
        seeds: How many, from `train.seed` on; None is 1.
        lr_factors: Of each method's own learning rate, swept on the first seed; None is 0.3, 1, 3.
        jobs: Trainings at a time, each in a process of its own.
        threads: Of each training; None divides the processors.
        engine: local, or ray.
        latency_seconds: Measuring time of inference; 0 leaves it out.
        out: Folder; one of an earlier comparison with the same options is added to.
        set: Assignments as after `--set`.
        resume: Go on with this folder; nothing that describes the trainings may be given.
        **flags: data, eval_data, text, image, label, backbone, steps, epochs, batch, device.

    Returns:
        compare.json as a dict, and `folder`, where it was written.

    Raises:
        UserError: For bad input. A training that fails is a row that says so.
    """
    results, folder = _compare(
        config,
        methods=methods,
        tasks=[task] if isinstance(task, str) else task,
        seeds=seeds,
        lr_factors=lr_factors,
        jobs=jobs,
        threads=threads,
        engine=engine,
        latency_seconds=latency_seconds,
        out=None if out is None else Path(out),
        set=set,
        resume=None if resume is None else Path(resume),
        flags=flags,
    )
    return {**results.to_dict(), "folder": str(folder)}


def _compare(
    config: Path | str | Config | None,
    *,
    methods: Sequence[str] | None,
    tasks: Sequence[str] | None,
    seeds: int | None,
    lr_factors: Sequence[float] | None,
    jobs: int,
    threads: int | None,
    engine: str,
    latency_seconds: float,
    out: Path | None,
    set: Sequence[str],
    resume: Path | None,
    flags: dict[str, Any],
) -> tuple[Results, Path]:
    from mdpd_deploy.files import claimed, write_json, write_text
    from mdpd_deploy.machine import cpu_count
    from mdpd_deploy.study import ENGINES, build_engine, collect, markdown, run_trials, write_page

    ENGINES.get_or_raise(engine)
    for name, value in (("--seeds", seeds), ("--jobs", jobs), ("--threads", threads)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: give at least 1.")
    factors = _factors(FACTORS) if lr_factors is None else tuple(lr_factors)
    if not factors or not all(0 < factor < float("inf") for factor in factors):
        raise UserError(f"--lr-factors {factors}: give numbers above 0, as in {FACTORS}.")
    each = threads or max(1, cpu_count() // jobs)
    if resume is not None:
        asked = (config, methods, tasks, seeds, lr_factors, out, *flags.values())
        if set or any(value is not None for value in asked):
            raise UserError("--resume goes on with what was asked for: give no other option.")
        folder, plan = resume, _stored_plan(resume)
    else:
        base, task = _base(config, set, flags)
        folder = _folder(out)
        plan = _asked_plan(folder, base, methods, tasks or [task], seeds or 1, factors)
    with claimed(folder, by="comparison"):
        _store(folder, plan)
        gpus = 1 if _on_gpu(plan.base) else 0
        with build_engine(engine, jobs=jobs, threads=each, gpus=gpus) as running:
            cells = run_trials(plan, folder, running, threads=each, say=_say)
        latency: dict[str, Latency] = {}
        setting = ""
        if latency_seconds:
            latency, setting = _latency(cells, folder, latency_seconds)
        results = collect(
            cells, latency=latency, latency_setting=setting, facts=_facts(plan, jobs, each)
        )
        write_json(folder / "compare.json", results.to_dict())
        write_text(folder / "compare.md", markdown(results))
        write_page(folder / "report.html", results)
    return results, folder


def _base(
    config: Path | str | Config | None, sets: Sequence[str], flags: dict[str, Any]
) -> tuple[Config, str]:
    """Return what all trials share, and the task that the config names.

    A method and a side network in it give way to each trial's.
    """
    from mdpd_deploy.commands.train import build_config
    from mdpd_deploy.config import Config
    from mdpd_deploy.errors import unknown

    for name in flags:
        if name not in FLAGS:
            raise unknown("compare", name, FLAGS)
    plain = Config()
    base = build_config(config, sets, flags)
    side = base.side.model_copy(update={"name": plain.side.name})
    own = {"task": plain.task, "method": plain.method, "side": side, "out": None}
    return base.model_copy(update=own), base.task


def _asked_plan(
    folder: Path,
    base: Config,
    methods: Sequence[str] | None,
    tasks: Sequence[str],
    seeds: int,
    lr_factors: tuple[float, ...],
) -> Plan:
    from mdpd_deploy.files import refuse_nonempty
    from mdpd_deploy.study import Ask, read_plan
    from mdpd_deploy.study.plan import PLAN

    earlier: tuple[Ask, ...] = ()
    if (folder / PLAN).is_file():
        stored, earlier = read_plan(folder)
        _refuse_difference(folder, stored, base)
    else:
        refuse_nonempty(folder)
    labels = list(_configs(base, _labels(methods))[0])
    first = base.train.seed
    ask = Ask(
        tuple(_tasks(tasks, base)),
        tuple(labels),
        lr_factors,
        tuple(range(first, first + seeds)),
    )
    asks = earlier if ask in earlier else (*earlier, ask)
    return _plan(base, asks)


def _labels(words: Sequence[str] | None) -> list[str]:
    """Return the words that name methods; none names the usual ones, `all` all there are."""
    from mdpd_deploy.train import default_entries

    chosen = list(words) if words else _words(METHODS)
    return [entry.label for entry in default_entries()] if chosen == ["all"] else chosen


def _tasks(words: Sequence[str], base: Config) -> list[str]:
    from mdpd_deploy.study import expand_tasks

    return expand_tasks(words, base, _say)


def _stored_plan(folder: Path) -> Plan:
    from mdpd_deploy.study import read_plan

    base, asks = read_plan(folder)
    return _plan(base, asks)


def _plan(base: Config, asks: tuple[Ask, ...]) -> Plan:
    from mdpd_deploy.study import Plan

    labels = dict.fromkeys(method for ask in asks for method in ask.methods)
    return Plan(base, asks, *_configs(base, list(labels)))


def _configs(base: Config, words: Sequence[str]) -> tuple[dict[str, Config], dict[str, float]]:
    """Return label → config and label → learning rate of the methods that the words name."""
    from mdpd_deploy.commands.train import build_config
    from mdpd_deploy.train import apply_entry, parse_entry

    configs: dict[str, Config] = {}
    rates: dict[str, float] = {}
    for word in words:
        name, *options = word.split("+")
        entry = parse_entry(name)
        label = "+".join((entry.label, *options))
        configs[label] = build_config(apply_entry(base, entry), options, {})
        rates[label] = configs[label].optim.lr or entry.default_lr
    return configs, rates


def _refuse_difference(folder: Path, stored: Config, base: Config) -> None:
    before, now = _flat(stored.model_dump()), _flat(base.model_dump())
    for name, value in now.items():
        if before.get(name) != value:
            raise UserError(
                f"--out {folder} holds a comparison with {name}={before.get(name)}, and this one "
                f"has {name}={value}: choose another folder."
            )


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in plain.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _folder(out: Path | None) -> Path:
    from datetime import datetime

    from mdpd_deploy.files import free_path

    if out is not None:
        return out.expanduser().resolve()
    return free_path(Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-compare").resolve()


def _store(folder: Path, plan: Plan) -> None:
    from mdpd_deploy.study import write_plan

    write_plan(folder, plan.base, plan.asks)


def _on_gpu(base: Config) -> bool:
    import torch

    return base.train.device != "cpu" and torch.cuda.is_available()


def _latency(cells: Any, folder: Path, seconds: float) -> tuple[dict[str, Latency], str]:
    """Time the deployed models of one task against each other, interleaved in one run.

    What is deployed as backbone + head is one graph whatever trained it, so that one of these is
    timed for all; the others are what they are at inference.
    """
    from mdpd_deploy.run import Run

    found: dict[str, dict[str, Run]] = {}
    for outcome in cells:
        runs = [o.run for o in outcome.seeds.values() if o.summary is not None]
        if runs:
            found.setdefault(outcome.cell.task, {})[outcome.cell.method] = Run.open(runs[0])
    if not found:
        return {}, ""
    task = max(found, key=lambda name: len(found[name]))
    return _time(task, found[task], folder / "latency", seconds)


def _time(
    task: str, runs: dict[str, Any], folder: Path, seconds: float
) -> tuple[dict[str, Latency], str]:
    import tempfile

    from mdpd_deploy.commands.bench_latency import input_source
    from mdpd_deploy.files import atomic_folder
    from mdpd_deploy.machine import cpu_count
    from mdpd_deploy.serve import (
        Grid,
        Plan,
        choose_device,
        run_benchmark,
        variants_of_methods,
        write_chart,
    )
    from mdpd_deploy.study import Latency

    faded = {label: run for label, run in runs.items() if run.keeps is None}
    first = next(iter(faded.values()), next(iter(runs.values())))
    kept = {label: run for label, run in runs.items() if label not in faded}
    same = Latency(1.0, None, "backbone + head: the same graph")
    latency = dict.fromkeys(faded, same)
    runtime = "onnx" if _has_onnxruntime() else "torch"
    device = choose_device("auto", (runtime,))
    grid = Grid((runtime,), (1,), device, cpu_count(), Plan(seconds=seconds), 0)
    setting = f"{runtime} on {device}, batch 1, {task}, {seconds:g} s interleaved"
    if not kept:
        return latency, setting
    with tempfile.TemporaryDirectory(prefix="mdpd-compare-") as graphs:
        report = run_benchmark(
            variants_of_methods(first, kept),
            input_source(first),
            grid,
            source={"kind": "comparison", "task": task, "backbone": first.config.backbone.name},
            folder=Path(graphs),
        )
    with atomic_folder(folder, overwrite=True) as temporary:
        report.write(temporary / "latency.json")
        write_chart(report, temporary)
    for ratio in report.ratios:
        if ratio.variant in kept:
            latency[ratio.variant] = Latency(ratio.median, ratio.ci95, ratio.words)
    return latency, setting


def _has_onnxruntime() -> bool:
    from importlib.util import find_spec

    return find_spec("onnxruntime") is not None


_PLACES: Any = {"data": {"path", "eval_path"}, "backbone": {"name", "weights"}}  # nobody's business


def _facts(plan: Plan, jobs: int, threads: int) -> dict[str, Any]:
    from mdpd_deploy.machine import describe

    base, machine = plan.base, describe()
    name = base.backbone.name
    length = (
        f"{base.train.steps} steps"
        if base.train.steps is not None
        else f"{base.train.epochs or 10:g} epochs"
    )
    factors = dict.fromkeys(factor for ask in plan.asks for factor in ask.factors)
    device = machine["gpu"][0]["name"] if _on_gpu(base) and machine["gpu"] else machine["cpu"]
    return {
        "backbone": Path(name).name if name.startswith("/") else name,
        "length": length,
        "batch": base.train.batch * base.train.accumulate,
        "rates": f"{', '.join(f'×{factor:g}' for factor in factors)} of its own default",
        "machine": f"{device}, {jobs} training{'s' * (jobs > 1)} at a time, "
        f"{threads} thread{'s' * (threads > 1)} each",
        "config": base.model_dump(mode="json", exclude_defaults=True, exclude=_PLACES),
        "details": machine,
    }


def _print_forecast(
    config: Path | None,
    methods: Sequence[str] | None,
    tasks: Sequence[str] | None,
    sets: Sequence[str],
    flags: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Print what each method would need; the data are read only for their number of classes."""
    from dataclasses import asdict
    from json import dumps

    from rich.console import Console

    from mdpd_deploy.commands.train import print_memory
    from mdpd_deploy.data import load_task
    from mdpd_deploy.train import forecast_methods

    base, task = _base(config, sets, flags)
    outputs, kind = CLASSES, "classify"
    if tasks or base.data.path is not None:
        first = _tasks(tasks or [task], base)[0]
        data = load_task(first, base.data, seed=base.train.seed)
        outputs, kind = data.outputs, data.kind
    configs = _configs(base, _labels(methods or ["all"]))[0]
    rows = forecast_methods(configs, outputs=outputs, kind=kind)
    if as_json:
        print(dumps([asdict(row) for row in rows]))
        return
    what = f"{outputs} classes" if kind == "classify" else "regression"
    where = f"· {base.backbone.name}, batch {base.train.batch}, {base.train.precision}, {what}"
    print_memory(Console(), rows, where)


def _print(results: Results, folder: Path) -> None:
    from rich.console import Console

    from mdpd_deploy.study import render

    console = Console(highlight=False, soft_wrap=True)
    console.print(render(results), width=max(console.width, WIDTH))
    for name in ("report.html", "compare.md", "compare.json"):
        console.print(str(folder / name))


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _factors(text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(word) for word in _words(text)))
    except ValueError:
        raise UserError(
            f"--lr-factors {text}: give numbers with commas, as in {FACTORS}."
        ) from None
