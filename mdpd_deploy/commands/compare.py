"""`mdpd compare`: methods × learning rates × seeds on one task or a suite, read side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdpd_deploy.commands import options
from mdpd_deploy.commands.study_facts import on_gpu, study_facts, study_latency
from mdpd_deploy.commands.study_plan import (
    FACTORS,
    METHODS,
    asked_plan,
    expand_all,
    method_configs,
    parse_factors,
    shared_config,
    stored_plan,
)
from mdpd_deploy.commands.torch_defaults import torch_defaults
from mdpd_deploy.errors import MdpdError, UserError

if TYPE_CHECKING:
    from mdpd_deploy.config import Config
    from mdpd_deploy.study import Results

CLASSES = 2  # that a forecast takes where no data are named; they hardly matter
WIDTH = (
    240  # of the tables where the window is narrower: a line that wraps is better than a cut one
)
SECONDS = 5.0  # of latency measurement
OF_TRAININGS = ("resume", "out", "seeds", "lr_factors", "jobs", "threads", "engine",
                "latency_seconds")  # fmt: skip


def command(
    context: typer.Context,
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
    data: options.Data = None,
    eval_data: options.EvalData = None,
    text: options.Text = None,
    image: options.Image = None,
    label: options.Label = None,
    backbone: options.Backbone = None,
    steps: options.Steps = None,
    epochs: options.Epochs = None,
    batch: options.Batch = None,
    seeds: Annotated[int | None, typer.Option(help="How many; default 1.")] = None,
    lr_factors: Annotated[
        str | None,
        typer.Option(
            help=f"Of each method's own learning rate; swept on the first seed. Default: {FACTORS}."
        ),
    ] = None,
    device: options.Device = None,
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
    words = None if methods is None else options.split_words(methods)
    tasks = None if task is None else options.split_words(task)
    if forecast:
        for name in OF_TRAININGS:
            source = context.get_parameter_source(name)
            if source is not None and source.name == "COMMANDLINE":
                option = name.replace("_", "-")
                raise UserError(
                    f"--{option} is of trainings, and --forecast runs none: leave it out."
                )
        _print_forecast(config, words, tasks, set_ or (), flags, as_json=json)
        return
    results, folder = _compare(
        config,
        methods=words,
        tasks=tasks,
        seeds=seeds,
        lr_factors=None if lr_factors is None else parse_factors(lr_factors),
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


@torch_defaults()
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
    from mdpd_deploy.artifacts.folders import claimed
    from mdpd_deploy.machine import cpu_count
    from mdpd_deploy.study import ENGINES, build_engine, collect, run_trials, write_plan

    ENGINES.get_or_raise(engine)
    factors = tuple(map(float, parse_factors(FACTORS) if lr_factors is None else lr_factors))
    _check_numbers(seeds, jobs, threads, factors, latency_seconds)
    if resume is not None:
        asked = (config, methods, tasks, seeds, lr_factors, out, *flags.values())
        if set or any(value is not None for value in asked):
            raise UserError("--resume goes on with what was asked for: give no other option.")
        folder = resume.expanduser().resolve()
        stored_plan(folder)  # so that no other folder is locked
        shared = None
    else:
        shared = shared_config(config, set, flags, guess=not tasks)
        folder = _folder(out)
        _refuse_foreign(folder)
    with claimed(folder, by="comparison"), _ended_by_sigterm():
        if shared is None:
            plan = stored_plan(folder)
        else:
            base, task = shared
            plan = asked_plan(folder, base, methods, tasks or [task], seeds or 1, factors, _say)
        gpu = on_gpu(plan.base)
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
        facts = study_facts(plan, engine, jobs, each)
        results = collect(cells, latency={}, latency_setting="", facts=facts)
        _write(results, folder)
        if latency_seconds:
            device = plan.base.train.device
            try:
                latency, setting = study_latency(cells, folder, latency_seconds, device)
            except MdpdError as err:
                latency, setting = {}, f"not measured ({err})"
            results = collect(cells, latency=latency, latency_setting=setting, facts=facts)
            _write(results, folder)
    return results, folder


def _check_numbers(
    seeds: int | None,
    jobs: int,
    threads: int | None,
    factors: tuple[float, ...],
    latency_seconds: float,
) -> None:
    for name, value in (("--seeds", seeds), ("--jobs", jobs), ("--threads", threads)):
        if value is not None and value < 1:
            raise UserError(f"{name} {value}: give at least 1.")
    if not factors or not all(0 < factor < float("inf") for factor in factors):
        raise UserError(f"--lr-factors {factors}: give numbers above 0, as in {FACTORS}.")
    if not 0 <= latency_seconds < float("inf"):
        raise UserError(f"--latency-seconds {latency_seconds}: give 0 or a time above it.")


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

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _refuse_foreign(folder: Path) -> None:
    from mdpd_deploy.artifacts.folders import refuse_nonempty
    from mdpd_deploy.study import PLAN

    if not (folder / PLAN).is_file():
        refuse_nonempty(folder)


def _folder(out: Path | None) -> Path:
    from datetime import datetime

    from mdpd_deploy.artifacts.folders import free_path

    if out is not None:
        return out.expanduser().resolve()
    return free_path(Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-compare").resolve()


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

    from mdpd_deploy.commands.train import print_memory
    from mdpd_deploy.data.load import load_task
    from mdpd_deploy.report.terminal import Console
    from mdpd_deploy.study import expand_tasks
    from mdpd_deploy.tasks import Classify, Task
    from mdpd_deploy.train import forecast_methods

    base, task = shared_config(config, sets, flags, guess=not tasks)
    answers: Task = Classify.numbered(CLASSES)
    longest = ""
    if tasks or base.data.path is not None:
        named = expand_tasks(tasks or [task], base, _say)
        if len(named) > 1:
            raise UserError(
                f"--forecast takes one task, and --task names {len(named)}: memory depends on the "
                f"backbone, batch and length; name one, e.g. {named[0]}."
            )
        data = load_task(named[0], base.data, seed=base.train.seed)
        answers = data.task
        if "text" in data.fields:
            longest = f", texts of {base.data.max_length} tokens"
    configs = method_configs(base, expand_all(methods or ["all"]))[0]
    rows = forecast_methods(configs, answers)
    if as_json:
        print(dumps([asdict(row) for row in rows]))
        return
    what = f"{answers.width} classes" if answers.labels else f"--task {answers.kind}"
    where = (
        f"· {base.backbone.name}, batch {base.train.batch}, {base.train.precision}, {what}{longest}"
    )
    print_memory(Console(), rows, where)


def _print(results: Results, folder: Path) -> None:
    from mdpd_deploy.report.terminal import Console
    from mdpd_deploy.study import render

    width = max(Console().width, WIDTH)
    console = Console(highlight=False, soft_wrap=True, width=width)
    console.print(render(results))
    for name in ("report.html", "compare.md", "compare.json"):
        console.print(str(folder / name))


def _say(line: str) -> None:
    typer.echo(line, err=True)
