"""`mdpd compare`: methods × learning rates × seeds on one task or a suite, read side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdpd_deploy.errors import MdpdError, UserError

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
    trained without it. Interrupted, it goes on by --resume FOLDER, or by the same command with the
    same --out; finished trainings are not repeated. Writes compare.json,
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
        for name, value in (("resume", resume), ("out", out), ("seeds", seeds),
                            ("lr-factors", lr_factors)):  # fmt: skip
            if value is not None:
                raise UserError(f"--forecast trains nothing: leave --{name} out.")
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
    from mdpd_deploy.files import claimed
    from mdpd_deploy.machine import cpu_count
    from mdpd_deploy.study import ENGINES, build_engine, collect, run_trials, write_plan

    ENGINES.get_or_raise(engine)
    for name, value in (("--seeds", seeds), ("--jobs", jobs), ("--threads", threads)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: give at least 1.")
    factors = tuple(float(f) for f in (_factors(FACTORS) if lr_factors is None else lr_factors))
    if not factors or not all(0 < factor < float("inf") for factor in factors):
        raise UserError(f"--lr-factors {factors}: give numbers above 0, as in {FACTORS}.")
    if not 0 <= latency_seconds < float("inf"):
        raise UserError(f"--latency-seconds {latency_seconds}: give 0 or a time above it.")
    if resume is not None:
        asked = (config, methods, tasks, seeds, lr_factors, out, *flags.values())
        if set or any(value is not None for value in asked):
            raise UserError("--resume goes on with what was asked for: give no other option.")
        folder = resume.expanduser().resolve()
        _stored_plan(folder)  # so that no other folder is locked
        shared = None
    else:
        shared = _base(config, set, flags)
        folder = _folder(out)
        _refuse_foreign(folder)
    with claimed(folder, by="comparison"), _ended_by_sigterm():
        if shared is None:
            plan = _stored_plan(folder)
        else:
            base, task = shared
            plan = _asked_plan(folder, base, methods, tasks or [task], seeds or 1, factors)
        gpu = _on_gpu(plan.base)
        if gpu and jobs > 1 and engine == "local":
            raise UserError(
                f"--jobs {jobs}: trainings at a time would share one GPU and spoil each other's "
                "figures; leave --jobs out, or use --engine ray, which gives each a GPU."
            )
        write_plan(folder, plan.base, plan.asks)
        _say(f"comparison: {folder}")
        each = threads or (1 if engine == "ray" else max(1, cpu_count() // jobs))
        with build_engine(engine, jobs=jobs, threads=each, gpus=int(gpu)) as running:
            cells = run_trials(plan, folder, running, threads=each, say=_say)
        facts = _facts(plan, engine, jobs, each)
        results = collect(cells, latency={}, latency_setting="", facts=facts)
        _write(results, folder)
        if latency_seconds:
            try:
                latency, setting = _latency(cells, folder, latency_seconds, plan.base.train.device)
            except MdpdError as err:
                latency, setting = {}, f"not measured ({err})"
            results = collect(cells, latency=latency, latency_setting=setting, facts=facts)
            _write(results, folder)
    return results, folder


def _write(results: Results, folder: Path) -> None:
    from mdpd_deploy.files import write_json, write_text
    from mdpd_deploy.study import markdown, write_page

    write_json(folder / "compare.json", results.to_dict())
    write_text(folder / "compare.md", markdown(results))
    write_page(folder / "report.html", results)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """End the children too when a scheduler ends this process; signals reach the main thread only."""
    import signal
    import threading

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _base(
    config: Path | str | Config | None, sets: Sequence[str], flags: dict[str, Any]
) -> tuple[Config, str]:
    """Return what all trials share, and the task that the config names."""
    from mdpd_deploy.commands.train import build_config
    from mdpd_deploy.config import Config
    from mdpd_deploy.errors import unknown

    for name in flags:
        if name not in FLAGS:
            raise unknown("compare", name, FLAGS)
    plain = Config()
    base = build_config(config, sets, flags)
    for name in ("method", "out", "side.name"):
        if base.flat()[name] != plain.flat()[name]:
            raise UserError(
                f"{name}={base.flat()[name]} is no option of all methods: leave it out, and name "
                "methods in --methods (METHOD:SIDE) and the folder in --out."
            )
    return base.model_copy(update={"task": plain.task}), base.task


def _asked_plan(
    folder: Path,
    base: Config,
    methods: Sequence[str] | None,
    tasks: Sequence[str],
    seeds: int,
    lr_factors: tuple[float, ...],
) -> Plan:
    from mdpd_deploy.study import Ask, read_plan
    from mdpd_deploy.study.plan import PLAN

    earlier: tuple[Ask, ...] = ()
    if (folder / PLAN).is_file():
        stored, earlier = read_plan(folder)
        _refuse_difference(folder, stored, base)
    labels = list(_configs(base, _labels(methods))[0])
    named = _tasks(tasks, base)
    full = [task for task in named if task.startswith("vtab-full/")]
    if full and (len(lr_factors) > 1 or base.train.keep != "last"):
        raise UserError(
            f"{full[0]} trains on its validation pictures too, so they can choose neither a rate "
            "nor the best weights: find the factor on vtab/NAME, then add --lr-factors FACTOR "
            "--set train.keep=last."
        )
    first = base.train.seed
    ask = Ask(
        tuple(named),
        tuple(labels),
        lr_factors,
        tuple(range(first, first + seeds)),
    )
    asks = earlier if ask in earlier else (*earlier, ask)
    return _plan(base, asks)


def _refuse_foreign(folder: Path) -> None:
    from mdpd_deploy.files import refuse_nonempty
    from mdpd_deploy.study.plan import PLAN

    if not (folder / PLAN).is_file():
        refuse_nonempty(folder)


def _labels(words: Sequence[str] | None) -> list[str]:
    """Return the words that name methods; none names the usual ones, `all` all there are."""
    from mdpd_deploy.train import default_entries

    chosen = _words(METHODS) if words is None else list(words)
    if not chosen:
        raise UserError("--methods names none: leave it out for the usual ones.")
    every = [entry.label for entry in default_entries()]
    return [label for word in chosen for label in (every if word == "all" else [word])]


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
    import re

    from mdpd_deploy.commands.train import build_config
    from mdpd_deploy.train import apply_entry, check_options, parse_entry

    configs: dict[str, Config] = {}
    rates: dict[str, float] = {}
    for word in words:
        name, *options = re.split(r"\+(?=[\w.]+=)", word)
        entry = parse_entry(name)
        label = "+".join((entry.label, *options))
        plain = apply_entry(base, entry)
        configs[label] = build_config(plain, options, {})
        _refuse_other_data(label, plain, configs[label])
        check_options(configs[label])
        rates[label] = configs[label].optim.lr or entry.default_lr
    return configs, rates


def _refuse_other_data(label: str, base: Config, config: Config) -> None:
    """Refuse options of one method that would make it incomparable with the others."""
    before = base.flat()
    for name, value in config.flat().items():
        shared = name in _SHARED or name.startswith(("data.", "backbone."))
        if shared and value != before[name]:
            raise UserError(
                f"--methods {label}: {name} is the same for all methods; set it for all with --set."
            )


_SHARED = ("task", "method", "out", "side.name", "train.seed", "train.steps", "train.epochs",
           "train.batch", "train.accumulate", "train.device")  # fmt: skip


def _refuse_difference(folder: Path, stored: Config, base: Config) -> None:
    before, now = stored.flat(), base.flat()
    for name, value in now.items():
        if before.get(name) != value:
            raise UserError(
                f"--out {folder} holds a comparison with {name}={before.get(name)}, and this one "
                f"has {name}={value}: choose another folder."
            )


def _folder(out: Path | None) -> Path:
    from datetime import datetime

    from mdpd_deploy.files import free_path

    if out is not None:
        return out.expanduser().resolve()
    return free_path(Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-compare").resolve()


def _on_gpu(base: Config) -> bool:
    import torch

    return base.train.device == "cuda" or (
        base.train.device == "auto" and torch.cuda.is_available()
    )


def _latency(
    cells: Any, folder: Path, seconds: float, asked: str
) -> tuple[dict[str, Latency], str]:
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
    return _time(task, found[task], folder / "latency", seconds, asked)


def _time(
    task: str, runs: dict[str, Any], folder: Path, seconds: float, asked: str
) -> tuple[dict[str, Latency], str]:
    import tempfile

    from mdpd_deploy.commands.bench_latency import backbone_name, input_source
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
    for ratio in report.ratios:
        if ratio.variant in kept:
            latency[ratio.variant] = Latency(ratio.median, ratio.ci95, ratio.words)
    return latency, setting


def _has_onnxruntime() -> bool:
    from importlib.util import find_spec

    return find_spec("onnxruntime") is not None


_PLACES: Any = {"data": {"path", "eval_path"}, "backbone": {"name", "weights"}}  # nobody's business


def _facts(plan: Plan, engine: str, jobs: int, threads: int) -> dict[str, Any]:
    from mdpd_deploy.machine import describe

    base, machine = plan.base, describe()
    name = base.backbone.name
    length = (
        f"{base.train.steps} steps"
        if base.train.steps is not None
        else f"{base.train.epochs or 10:g} epochs"
    )
    running = f"{jobs} training{'s' * (jobs > 1)} of {threads} thread{'s' * (threads > 1)}"
    device = machine["gpu"][0]["name"] if _on_gpu(base) and machine["gpu"] else machine["cpu"]
    return {
        "backbone": Path(name).name if name.startswith("/") else name,
        "length": length,
        "batch": base.train.batch * base.train.accumulate,
        "rate": "its own default" if base.optim.lr is None else f"optim.lr={base.optim.lr:g}",
        "machine": "a Ray cluster" if engine == "ray" else f"{device}, {running} at a time",
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
    """Split at commas outside brackets."""
    import re

    return [word.strip() for word in re.split(r",(?![^\[]*\])", text) if word.strip()]


def _factors(text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(word) for word in _words(text)))
    except ValueError:
        raise UserError(
            f"--lr-factors {text}: give numbers with commas, as in {FACTORS}."
        ) from None
