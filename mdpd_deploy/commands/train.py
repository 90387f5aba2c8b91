"""`mdpd train`: fine-tune and write a run folder; `fit` is the same in Python."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdpd_deploy.commands import options
from mdpd_deploy.commands.torch_defaults import torch_defaults
from mdpd_deploy.errors import UserError

if TYPE_CHECKING:
    from mdpd_deploy.artifacts.run import Run
    from mdpd_deploy.config import Config
    from mdpd_deploy.report.terminal import Console
    from mdpd_deploy.train import MemoryRow, Plan

log = logging.getLogger(__name__)


def command(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.yaml", help="Or data, as --data.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="glue/NAME, vtab/NAME, classify, regress or digits; default: classify with --data "
            "of classes, digits without --data."
        ),
    ] = None,
    data: options.Data = None,
    eval_data: options.EvalData = None,
    text: options.Text = None,
    image: options.Image = None,
    label: options.Label = None,
    backbone: options.Backbone = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="mdpd (default), side, norms, probe, bitfit, full, lora, adalora, ia3, prompt or "
            "prefix."
        ),
    ] = None,
    side: Annotated[str | None, typer.Option(help="unipt (default), sherl, lst, dtl.")] = None,
    steps: options.Steps = None,
    epochs: options.Epochs = None,
    batch: options.Batch = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random; default 0.")] = None,
    device: options.Device = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; default runs/DATE-TASK-METHOD.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Any option, repeatable.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run folder.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan and its memory forecast; no training."),
    ] = False,
    all_methods: Annotated[
        bool,
        typer.Option("--all-methods", help="With --dry-run: forecast every other method too."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
) -> None:
    """Fine-tune a model and write a run folder. Without arguments: the embedded digits task."""
    flags: dict[str, Any] = {
        "task": task,
        "data": data,
        "eval_data": eval_data,
        "text": text,
        "image": image,
        "label": label,
        "backbone": backbone,
        "method": method,
        "side": side,
        "steps": steps,
        "epochs": epochs,
        "batch": batch,
        "lr": lr,
        "seed": seed,
        "device": device,
        "out": out,
    }
    if dry_run:
        if resume is not None:
            raise UserError("--dry-run plans a new run: leave --resume out.")
        made = plan(config, all_methods=all_methods, set=set_ or (), **flags)
        _print_plan(made, as_json=json)
        return
    if all_methods:
        raise UserError("--all-methods is a table of --dry-run: add that, or leave it out.")
    run = fit(config, set=set_ or (), resume=resume, overwrite=overwrite, quiet=json, **flags)
    if _is_main_process():
        _print_run(run, as_json=json)


@torch_defaults()
def fit(
    config: Path | str | Config | None = None,
    *,
    resume: Path | str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    set: Sequence[str] = (),
    **flags: Any,
) -> Run:
    """Fine-tune a model and return its completed run.

    Args:
        config: A YAML file or a `Config`, or data; None starts from the defaults (the digits task).
        resume: Continue this interrupted run folder; nothing else may be given.
        overwrite: Replace a non-empty run folder.
        quiet: No progress on stderr.
        set: Assignments such as `"train.patience=3"`, as after `--set`.
        **flags: The words of `mdpd train`: task, data, eval_data, text, image, label, backbone,
            method, side, steps, epochs, batch, lr, seed, device, out.

    Raises:
        UserError: For bad input; the message says what, where and the mend.
        WorkFailed: If the run itself fails.

    Example:
        >>> from mdpd_deploy import fit
        >>> run = fit(task="classify", data=pictures, steps=4, out=folder / "run", quiet=True)
        >>> run.summary["status"], sorted(run.summary["metrics"])
        ('completed', ['deployed', 'side'])
    """
    if resume is not None:
        given = config is not None or set or overwrite
        if given or any(value is not None for value in flags.values()):
            raise UserError(
                "--resume continues a run exactly as it was planned: give no other option."
            )
        from mdpd_deploy.train import resume_run

        return resume_run(Path(resume), quiet=quiet)
    checked = _named(config, set, flags)  # before torch: a typing mistake is answered at once
    from mdpd_deploy.train import fit_run

    return fit_run(checked, overwrite=overwrite, quiet=quiet)


@torch_defaults()
def plan(
    config: Path | str | Config | None = None,
    *,
    all_methods: bool = False,
    set: Sequence[str] = (),
    **flags: Any,
) -> Plan:
    """Return what `fit` with the same words would do, memory forecast included.

    Args:
        config: As for `fit`, and so are `set` and `flags`.
        all_methods: Forecast every other method in its place too.
        set: Assignments.
        **flags: The words of `mdpd train`.
    """
    checked = _named(config, set, flags)  # before torch, as above
    from mdpd_deploy.train import make_plan

    return make_plan(checked, all_methods=all_methods)


def _named(
    config: Path | str | Config | None, sets: Sequence[str], flags: dict[str, Any]
) -> Config:
    """Return `build_config` of one training, whose every name is known."""
    from mdpd_deploy.commands.names import check_names

    checked = build_config(config, sets, flags)
    check_names(checked)
    return checked


def build_config(
    config: Path | str | Config | None,
    sets: Sequence[str],
    flags: dict[str, Any],
    *,
    guess: bool = True,
) -> Config:
    """Return the checked config that a file, `--set` assignments and flags mean together.

    Args:
        config: A config file, a `Config`, or data, which is the same as `data` among the flags.
        sets: Assignments.
        flags: Words of `mdpd train`.
        guess: Settle the task by the data where nothing names it.
    """
    from mdpd_deploy.config import Config, check_config, load_config
    from mdpd_deploy.errors import unknown

    for name in flags:
        if name not in _OPTION:
            raise unknown("fit", name, _OPTION)
    config, flags = _data_in_front(config, flags)
    named = {_OPTION[name]: _plain(name, value) for name, value in flags.items()}
    if isinstance(config, Config):
        given = load_config(None, named, list(sets)).model_dump(exclude_unset=True)
        loaded = check_config(_merged(config.model_dump(exclude_unset=True), given))
    else:
        loaded = load_config(None if config is None else Path(config), named, list(sets))
    return _absolute(_with_task(loaded) if guess else loaded)


def _data_in_front(
    config: Path | str | Config | None, flags: dict[str, Any]
) -> tuple[Path | str | Config | None, dict[str, Any]]:
    """Take `mdpd train FOLDER` for `mdpd train --data FOLDER`."""
    from mdpd_deploy.data.guess import is_data

    if not isinstance(config, Path | str) or not is_data(str(config)):
        return config, flags
    if flags.get("data") is not None:
        raise UserError(
            f"{config} and --data {flags['data']} both name data: give one, or a CONFIG.yaml first."
        )
    return None, {**flags, "data": str(config)}


def _with_task(config: Config) -> Config:
    """Settle the task by the data where nothing names it."""
    from mdpd_deploy.data.guess import guess_task

    if "task" in config.model_fields_set or config.data.path is None:
        return config
    task = guess_task(config.data)
    log.info("task: %s, by what %s holds (--task says otherwise)", task, config.data.path)
    return config.model_copy(update={"task": task})


_OPTION = {
    "task": "task",
    "data": "data.path",
    "eval_data": "data.eval_path",
    "text": "data.text",
    "image": "data.image",
    "label": "data.label",
    "backbone": "backbone.name",
    "method": "method",
    "side": "side.name",
    "steps": "train.steps",
    "epochs": "train.epochs",
    "batch": "train.batch",
    "lr": "optim.lr",
    "seed": "train.seed",
    "device": "train.device",
    "out": "out",
}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if name == "text" and isinstance(value, str):
        return options.split_words(value)
    return value


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if both else value
    return merged


def _absolute(config: Config) -> Config:
    """Store local paths absolute, so that a run can be resumed from anywhere."""
    data = config.data.model_copy(
        update={
            name: _local(value)
            for name in ("path", "eval_path")
            if (value := getattr(config.data, name)) is not None and not value.startswith("hub:")
        }
    )
    update: dict[str, Any] = {}
    if Path(config.backbone.name).expanduser().is_dir():
        update["name"] = _local(config.backbone.name)
    if config.backbone.weights is not None:
        update["weights"] = _local(config.backbone.weights)
    backbone = config.backbone.model_copy(update=update)
    return config.model_copy(update={"data": data, "backbone": backbone})


def _local(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def _is_main_process() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process


def _print_run(run: Run, *, as_json: bool) -> None:
    from json import dumps

    from rich.table import Table

    from mdpd_deploy.artifacts.scores import scores_of
    from mdpd_deploy.report.terminal import Console
    from mdpd_deploy.tasks.metrics import metric_text

    if as_json:
        print(dumps({"run": str(run.path), **run.summary}))
        return
    summary = run.summary
    table = Table(title=f"{summary['task']} · {summary['method']}", show_header=False)
    primary = summary["primary_metric"]
    for scores in scores_of(summary):
        chose = ", which chose the weights" if scores.chose else ""
        table.add_row(f"{scores.words}{chose}", style="bold")
        for where, metrics in scores.models.items():
            for name, value in metrics.items():
                table.add_row(f"  {where} {name}", metric_text(value))
        if scores.majority is not None:
            floor = metric_text(scores.majority[primary])
            table.add_row(f"  always the most frequent class, {primary}", floor)
    params, memory = summary["params"], summary["memory"]
    share = params["trained"] / params["backbone"]
    table.add_row("trained parameters", f"{params['trained']:,} ({share:.1%} of the backbone)")
    table.add_row("deployed on top of the backbone", f"{params['deployed_delta']:,}")
    if "peak_live_bytes" in memory:
        table.add_row("peak training memory", f"{memory['peak_live_bytes'] / 1e6:,.1f} MB")
    table.add_row("training time", f"{summary['time']['train_s']:.1f} s")
    console = Console()
    console.print(table)
    console.print(f"run     {run.path}", highlight=False, soft_wrap=True)
    console.print(f"report  {run.path / 'report.html'}", highlight=False, soft_wrap=True)


def _print_plan(plan: Plan, *, as_json: bool) -> None:
    from json import dumps

    from rich.table import Table

    from mdpd_deploy.report.terminal import Console

    if as_json:
        print(dumps(plan.to_dict()))
        return
    table = Table(title="plan (nothing was trained)", show_header=False)
    table.add_row("task", plan.task)
    table.add_row("method", plan.method + (f" over {plan.side}" if plan.side else ""))
    table.add_row("backbone", plan.backbone)
    table.add_row("it sees", plan.sees)
    table.add_row("its weights", plan.licence)
    for name, count in plan.examples.items():
        table.add_row(f"{name} examples", f"{count:,}")
    if plan.classes:
        names = ", ".join(plan.classes[:10]) + (" …" if len(plan.classes) > 10 else "")
        table.add_row("classes", f"{len(plan.classes)}: {names}")
    table.add_row(
        "steps", f"{plan.steps:,} of {plan.batch} examples, {plan.steps_per_epoch:,} an epoch"
    )
    for name, count in plan.params.items():
        table.add_row(f"parameters, {name}", f"{count:,}")
    for_what = "" if plan.text_length is None else f", texts of {plan.text_length} tokens"
    table.add_row(
        "memory forecast",
        f"{plan.forecast_bytes / 1e6:,.1f} MB (live tensors, one process{for_what})",
    )
    if plan.norm_grad is not None:
        table.add_row("gradient of the norms", f"{plan.norm_grad}, {plan.precision}")
    table.add_row("device", plan.device)
    for note in plan.notes:
        table.add_row("note", note)
    if plan.inventory.line:
        table.add_row("data", plan.inventory.line)
    console = Console()
    console.print(table)
    if plan.memory_table:
        own = plan.method + (f":{plan.side}" if plan.side else "")
        print_memory(console, plan.memory_table, "in this run's place", own=own)
    else:
        console.print("Add --all-methods to see what every other method would need.")


def print_memory(
    console: Console, rows: Sequence[MemoryRow], where: str, own: str | None = None
) -> None:
    """Print the forecast of every method by need, the own one marked, and what does not fit."""
    from rich.table import Table

    table = Table(title=f"memory forecast of every method {where}")
    table.add_column("method")
    for name in ("MB", "trained", "changed or added when deployed"):
        table.add_column(name, justify="right")
    known = any(row.papers for row in rows)
    if known:
        table.add_column("papers, GB")
    fitting = [(row, row.forecast) for row in rows if row.forecast is not None]
    for row, need in sorted(fitting, key=lambda pair: pair[1].peak_bytes):
        table.add_row(
            f"{row.method} (this run)" if row.method == own else row.method,
            f"{need.peak_bytes / 1e6:,.1f}",
            f"{need.trained:,}",
            f"{need.deployed_delta:,}",
            *([row.papers or "–"] if known else []),
            style="bold" if row.method == own else None,
        )
    console.print(table)
    if known:
        console.print("The papers measured on CUDA, each in a harness of its own.")
    for row in rows:
        if row.reason is not None:
            console.print(f"{row.method} does not fit: {row.reason}", highlight=False)
