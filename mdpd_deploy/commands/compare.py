"""`mdpd compare`: methods × learning rates × seeds on one task or a suite, read side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

import typer

from mdpd_deploy.commands.options import SharedWords
from mdpd_deploy.commands.study_facts import on_gpu, study_facts, study_latency
from mdpd_deploy.commands.study_plan import (
    FACTORS,
    METHODS,
    asked_plan,
    expand_all,
    method_configs,
    options_of_tasks,
    shared_config,
    stored_plan,
)
from mdpd_deploy.commands.torch_defaults import torch_defaults
from mdpd_deploy.commands.verb import REPEATED, Json, print_json, takes
from mdpd_deploy.errors import MdpdError, UserError

if TYPE_CHECKING:
    from mdpd_deploy.config import Config
    from mdpd_deploy.study.results import Latency, Results
    from mdpd_deploy.study.schedule import CellOutcome

CLASSES = 2  # that a forecast takes where no data are named; they hardly matter
WIDTH = 240  # of tables where the window is narrower: a line that wraps is better than a cut one
OF_TRAININGS = ("resume", "out", "seeds", "lr_factors", "jobs", "threads", "engine",
                "latency_seconds")  # fmt: skip


@torch_defaults()
def compare(
    config: Annotated[Path | str | Config | None, typer.Argument(metavar="CONFIG.yaml")] = None,
    *,
    methods: Annotated[
        Sequence[str] | None,
        typer.Option(
            help="METHOD[:SIDE][+option=value…] with commas, or all. "
            f"Default: {METHODS.replace(',', ', ')}."
        ),
    ] = None,
    task: Annotated[
        str | Sequence[str] | None,
        typer.Option(help="Tasks with commas, or glue, vtab, vtab-full, few-shot, fgvc for all."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="How many, from train.seed on; default 1.")
    ] = None,
    lr_factors: Annotated[
        Sequence[float] | None,
        typer.Option(
            help=f"Of each method's own learning rate; swept on the first seed. Default: {FACTORS}."
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option(help="Trainings at a time, each in a process of its own.")
    ] = 1,
    threads: Annotated[
        int | None, typer.Option(help="Of each training; default: the processors ÷ jobs.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local, or ray: a cluster with a shared folder.")
    ] = "local",
    latency_seconds: Annotated[
        float, typer.Option(help="Measuring time of inference; 0 leaves it out.")
    ] = 5.0,
    out: Annotated[
        Path | str | None,
        typer.Option(help="Folder; one of an earlier comparison is added to. Default: runs/…"),
    ] = None,
    set: Annotated[
        Sequence[str],
        typer.Option(metavar="A.B=C", help="Any option, for all methods that read it."),
        REPEATED,
    ] = (),
    resume: Annotated[Path | str | None, typer.Option(help="Go on with this comparison.")] = None,
    **words: Unpack[SharedWords],
) -> dict[str, Any]:
    """Train every method on the same data, and say what each buys and costs.

    CONFIG.yaml and --set hold what all trainings share; a method that does not read an option is
    trained without it. Interrupted, it goes on by --resume FOLDER, or by the same command with the
    same --out; finished trainings are not repeated. Writes compare.json,
    compare.md and report.html.

    Returns:
        compare.json as a dict, and `folder`, where it was written.

    Raises:
        UserError: For bad input. A training that fails is a row that says so.
    """
    from mdpd_deploy.artifacts.folders import claimed
    from mdpd_deploy.machine import cpu_count
    from mdpd_deploy.study.engines import ENGINES, build_engine
    from mdpd_deploy.study.plan import write_plan
    from mdpd_deploy.study.results import collect
    from mdpd_deploy.study.schedule import run_trials

    ENGINES.get_or_raise(engine)
    tasks = [task] if isinstance(task, str) else task
    _check_numbers(lr_factors, latency_seconds, seeds=seeds, jobs=jobs, threads=threads)
    shared = None
    if resume is None:
        shared = shared_config(config, set, words, guess=not tasks)
    elif set or _any_given(config, methods, tasks, seeds, lr_factors, out, *words.values()):
        raise UserError("--resume goes on with what was asked for: give no other option.")
    folder = _folder(out) if resume is None else _resumed(resume)
    with claimed(folder, by="comparison"), _ended_by_sigterm():
        if shared is None:
            plan = stored_plan(folder)
        else:
            base, own = shared
            plan = asked_plan(folder, base, methods, tasks or own, seeds, lr_factors, _say)
        gpu = on_gpu(plan.base)
        _check_jobs(jobs, gpu=gpu, engine=engine)
        write_plan(folder, plan.base, plan.asks, plan.of_tasks)
        _say(f"comparison: {folder}")
        each = threads or (1 if engine == "ray" else max(1, cpu_count() // jobs))
        with build_engine(engine, jobs=jobs, threads=each, gpus=int(gpu)) as running:
            cells = run_trials(plan, folder, running, threads=each, say=_say)
        facts = study_facts(plan, engine, jobs, each)
        results = collect(cells, latency={}, latency_setting="", facts=facts)
        _write(results, folder)  # kept where timing is interrupted
        if latency_seconds:
            latency, setting = _timed(cells, folder, latency_seconds, plan.base.train.device)
            results = collect(cells, latency=latency, latency_setting=setting, facts=facts)
            _write(results, folder)
    return {**results.to_dict(), "folder": str(folder)}


@takes(compare)
def command(
    forecast: Annotated[
        bool, typer.Option("--forecast", help="Only forecast each method's memory; no training.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be trained; no training.")
    ] = False,
    json: Json = False,
    **asked: Any,
) -> None:
    if dry_run:
        _print_plan(**asked, as_json=json)
        return
    if forecast:
        for name in OF_TRAININGS:
            if name in asked:
                raise UserError(
                    f"--{name.replace('_', '-')} is of trainings, and --forecast runs none: leave "
                    "it out."
                )
        _print_forecast(**asked, as_json=json)
        return
    found = compare(**asked)
    if json:
        print_json(found)
    else:
        _print(found)
    if any(row["score"] is None for row in found["rows"]):
        raise typer.Exit(1)


def _check_numbers(
    factors: Sequence[float] | None, latency_seconds: float, **counts: int | None
) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: give at least 1.")
    known = factors is None or (factors and all(0 < factor < float("inf") for factor in factors))
    if not known:
        raise UserError(f"--lr-factors {factors}: give numbers above 0, as in {FACTORS}.")
    if not 0 <= latency_seconds < float("inf"):
        raise UserError(f"--latency-seconds {latency_seconds}: give 0 or a time above it.")


def _write(results: Results, folder: Path) -> None:
    from mdpd_deploy.files import write_json, write_text
    from mdpd_deploy.study.study_page import write_page
    from mdpd_deploy.study.table import markdown

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


def _timed(
    cells: Sequence[CellOutcome], folder: Path, seconds: float, device: str
) -> tuple[dict[str, Latency], str]:
    """Return the latencies and what they were measured on, or why they could not be."""
    try:
        return study_latency(cells, folder, seconds, device)
    except MdpdError as err:
        return {}, f"not measured ({err})"


def _any_given(*values: object) -> bool:
    return any(value is not None for value in values)


def _check_jobs(jobs: int, *, gpu: bool, engine: str) -> None:
    if gpu and jobs > 1 and engine == "local":
        raise UserError(
            f"--jobs {jobs}: trainings at a time would share one GPU and spoil each other's "
            "figures; leave --jobs out, or use --engine ray, which gives each a GPU."
        )


def _resumed(folder: Path | str) -> Path:
    """Return the folder of a comparison to go on with; raises where it is none."""
    path = Path(folder).expanduser().resolve()
    stored_plan(path)  # so that no other folder is locked
    return path


def _folder(out: Path | str | None) -> Path:
    """Return where the comparison lies: a new folder, or one that holds a comparison."""
    from datetime import datetime

    from mdpd_deploy.artifacts.folders import free_path, refuse_nonempty
    from mdpd_deploy.study.plan import PLAN

    if out is None:
        return free_path(Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-compare").resolve()
    folder = Path(out).expanduser().resolve()
    if not (folder / PLAN).is_file():
        refuse_nonempty(folder)
    return folder


def _print_plan(
    config: Path | None = None,
    *,
    methods: Sequence[str] | None = None,
    task: Sequence[str] | None = None,
    seeds: int | None = None,
    lr_factors: Sequence[float] | None = None,
    out: Path | None = None,
    set: Sequence[str] = (),
    as_json: bool,
    resume: Path | None = None,
    jobs: int = 1,
    threads: int | None = None,
    engine: str = "local",
    latency_seconds: float = 0,
    **words: Any,
) -> None:
    """Print the trainings that the words mean, and what the recipe says of them."""
    from dataclasses import asdict

    from mdpd_deploy.commands.train import settings_words
    from mdpd_deploy.config.recipes import OF_ONE_RUN, recipe_notes, recipe_settings
    from mdpd_deploy.report.terminal import print_table

    if resume is not None:
        raise UserError("--dry-run plans a new comparison: leave --resume out.")
    _check_numbers(lr_factors, latency_seconds, seeds=seeds, jobs=jobs, threads=threads)
    given, own = shared_config(config, set, words, guess=not task)
    folder, named = _folder(out), task or own
    plan = asked_plan(folder, given, methods, named, seeds, lr_factors, _say, unread=True)
    settings = [s for s in recipe_settings(plan.base) if s.option not in OF_ONE_RUN]
    cells = plan.cells()
    count = sum(len(cell.factors) + len(cell.seeds) - 1 for cell in cells)
    ask = plan.asks[-1]
    if as_json:
        print_json(
            {
                "trainings": count,
                **asdict(ask),
                "recipe": [setting._asdict() for setting in settings],
                "of_tasks": plan.of_tasks,
            }
        )
        return
    rows = [
        ("trainings", f"{count:,}"),
        ("backbone", plan.base.backbone.name),
        ("methods", ", ".join(plan.methods)),
        ("learning rates", ", ".join(f"×{factor:g}" for factor in ask.factors)),
        ("seeds", ", ".join(map(str, ask.seeds))),
        *([("recipe", settings_words(settings))] if settings else []),
    ]
    for name in plan.tasks:
        own_options = plan.of_tasks.get(name, {}).items()
        rows.append((name, ", ".join(f"{option}={value}" for option, value in own_options)))
    rows += [("note", note) for note in recipe_notes(plan.base)]
    print_table("plan (nothing was trained)", ("", ""), rows)


def _print_forecast(
    config: Path | None = None,
    *,
    methods: Sequence[str] | None = None,
    task: Sequence[str] | None = None,
    set: Sequence[str] = (),
    as_json: bool,
    **words: Any,
) -> None:
    """Print what each method would need; the data are read only for their number of classes."""
    from dataclasses import asdict

    from mdpd_deploy.commands.train import print_memory
    from mdpd_deploy.config.recipes import with_options, with_recipe
    from mdpd_deploy.data.load import load_task
    from mdpd_deploy.study.suites import expand_tasks
    from mdpd_deploy.tasks import Classify, Task
    from mdpd_deploy.train import forecast_methods

    given, own = shared_config(config, set, words, guess=not task)
    base = with_recipe(given, shared=True)
    answers: Task = Classify.numbered(CLASSES)
    longest = ""
    if task or base.data.path is not None:
        named = expand_tasks(task or own, base, _say)
        if len(named) > 1:
            raise UserError(
                f"--forecast takes one task, and --task names {len(named)}: memory depends on the "
                f"backbone, batch and length; name one, e.g. {named[0]}."
            )
        base = with_options(base, options_of_tasks(given, named).get(named[0], {}))
        data = load_task(named[0], base.data, seed=base.train.seed)
        answers = data.task
        if "text" in data.fields:
            longest = f", texts of {base.data.max_length} tokens"
    configs = method_configs(base, expand_all(methods or ["all"]))[0]
    rows = forecast_methods(configs, answers)
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    what = f"{answers.width} classes" if answers.labels else f"--task {answers.kind}"
    where = (
        f"· {base.backbone.name}, batch {base.train.batch}, {base.train.precision}, {what}{longest}"
    )
    print_memory(rows, where)


def _print(found: dict[str, Any]) -> None:
    from mdpd_deploy.report.terminal import Console
    from mdpd_deploy.study.results import Results
    from mdpd_deploy.study.table import render

    width = max(Console().width, WIDTH)
    console = Console(highlight=False, soft_wrap=True, width=width)
    console.print(render(Results.from_dict(found)))
    for name in ("report.html", "compare.md", "compare.json"):
        console.print(str(Path(found["folder"]) / name))


def _say(line: str) -> None:
    typer.echo(line, err=True)
