"""`mdpd train`: fine-tune and write a run folder; `fit` is the same in Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

import typer

from mdpd_deploy.commands.options import TrainWords
from mdpd_deploy.commands.run_config import build_config
from mdpd_deploy.commands.torch_defaults import torch_defaults
from mdpd_deploy.commands.verb import (
    REPEATED,
    Json,
    Overwrite,
    print_json,
    takes,
)
from mdpd_deploy.errors import UserError

if TYPE_CHECKING:
    from mdpd_deploy.artifacts.run import Run
    from mdpd_deploy.config import Config
    from mdpd_deploy.config.recipes import Setting
    from mdpd_deploy.train import MemoryRow, Plan


@torch_defaults()
def fit(
    config: Annotated[
        Path | str | Config | None,
        typer.Argument(metavar="CONFIG.yaml", help="Or data, as --data."),
    ] = None,
    *,
    set: Annotated[
        Sequence[str], typer.Option(metavar="A.B=C", help="Any option, repeatable."), REPEATED
    ] = (),
    resume: Annotated[Path | str | None, typer.Option(help="Continue this run folder.")] = None,
    overwrite: Overwrite = False,
    quiet: bool = False,
    **words: Unpack[TrainWords],
) -> Run:
    """Fine-tune a model and write a run folder. Without arguments: the embedded digits task.

    Args:
        quiet: No progress on stderr.

    Returns:
        The completed run.

    Raises:
        UserError: For bad input; the message says what, where and the mend.
        WorkFailed: If the run itself fails.

    Example:
        >>> from mdpd_deploy import fit
        >>> words = dict(task="classify", data=pictures, backbone=encoder, steps=4)
        >>> run = fit(out=folder / "run", quiet=True, **words)
        >>> run.summary["status"], sorted(run.summary["metrics"])
        ('completed', ['deployed', 'side'])
    """
    if resume is not None:
        given = config is not None or set or overwrite
        if given or any(value is not None for value in words.values()):
            raise UserError(
                "--resume continues a run exactly as it was planned: give no other option."
            )
        from mdpd_deploy.train import resume_run

        return resume_run(Path(resume), quiet=quiet)
    checked = _named(config, set, words)  # before torch: a typing mistake is answered at once
    from mdpd_deploy.train import fit_run

    return fit_run(checked, overwrite=overwrite, quiet=quiet)


@torch_defaults()
def plan(
    config: Path | str | Config | None = None,
    *,
    all_methods: bool = False,
    set: Sequence[str] = (),
    **words: Unpack[TrainWords],
) -> Plan:
    """Return what `fit` with the same words would do, memory forecast included.

    Args:
        config: As for `fit`, and so are `set` and `words`.
        all_methods: Forecast every other method in its place too.
        set: Assignments.
        **words: The words of `mdpd train`.
    """
    checked = _named(config, set, words)  # before torch, as above
    from mdpd_deploy.train import make_plan

    return make_plan(checked, all_methods=all_methods)


@takes(fit)
def command(
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan and its memory forecast; no training."),
    ] = False,
    all_methods: Annotated[
        bool,
        typer.Option("--all-methods", help="With --dry-run: forecast every other method too."),
    ] = False,
    json: Json = False,
    **asked: Any,
) -> None:
    if dry_run:
        if asked.pop("resume", None) is not None:
            raise UserError("--dry-run plans a new run: leave --resume out.")
        asked.pop("overwrite", None)
        _print_plan(plan(**asked, all_methods=all_methods), as_json=json)
        return
    if all_methods:
        raise UserError("--all-methods is a table of --dry-run: add that, or leave it out.")
    run = fit(**asked, quiet=json)
    if _is_main_process():
        _print_run(run, as_json=json)


def _named(
    config: Path | str | Config | None, sets: Sequence[str], words: Mapping[str, Any]
) -> Config:
    """Return `build_config` of one training, whose every name is known."""
    from mdpd_deploy.commands.names import check_names

    checked = build_config(config, sets, words)
    check_names(checked)
    return checked


def _is_main_process() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process


def _print_run(run: Run, *, as_json: bool) -> None:
    from mdpd_deploy.artifacts.scores import scores_of
    from mdpd_deploy.report.terminal import print_table
    from mdpd_deploy.tasks.metrics import metric_text

    if as_json:
        print_json({"run": str(run.path), **run.summary})
        return
    summary = run.summary
    rows: list[tuple[str, ...]] = []
    heads = []
    primary = summary["primary_metric"]
    for scores in scores_of(summary):
        heads.append(f"{scores.words}{', which chose the weights' if scores.chose else ''}")
        rows.append((heads[-1],))
        for where, metrics in scores.models.items():
            rows += [(f"  {where} {name}", metric_text(value)) for name, value in metrics.items()]
        if scores.majority is not None:
            floor = metric_text(scores.majority[primary])
            rows.append((f"  always the most frequent class, {primary}", floor))
    params, memory = summary["params"], summary["memory"]
    share = params["trained"] / params["backbone"]
    rows.append(("trained parameters", f"{params['trained']:,} ({share:.1%} of the backbone)"))
    rows.append(("deployed on top of the backbone", f"{params['deployed_delta']:,}"))
    if summary.get("felt") is not None:
        share = f"{summary['felt']:.2%} of the gradient of norms and head"
        rows.append(("distillation felt", share))
    if "peak_live_bytes" in memory:
        rows.append(("peak training memory", f"{memory['peak_live_bytes'] / 1e6:,.1f} MB"))
    rows.append(("training time", f"{summary['time']['train_s']:.1f} s"))
    console = print_table(f"{summary['task']} · {summary['method']}", ("", ""), rows, bold=heads)
    console.print(f"run     {run.path}")
    console.print(f"report  {run.path / 'report.html'}")


def _print_plan(plan: Plan, *, as_json: bool) -> None:
    from mdpd_deploy.report.terminal import print_table

    if as_json:
        print_json(plan.to_dict())
        return
    length = "" if plan.text_length is None else f", texts of {plan.text_length} tokens"
    classes = ", ".join(plan.classes[:10]) + (" …" if len(plan.classes) > 10 else "")
    of_recipe = {setting[0] for setting in plan.recipe}
    others = [f"{name}={value}" for name, value in plan.options.items() if name not in of_recipe]
    rows = [
        ("task", plan.task),
        ("method", plan.method + (f" over {plan.side}" if plan.side else "")),
        ("backbone", plan.backbone),
        ("it sees", plan.sees),
        ("its weights", plan.licence),
        *((f"{name} examples", f"{count:,}") for name, count in plan.examples.items()),
        *([("classes", f"{len(plan.classes)}: {classes}")] if plan.classes else []),
        ("steps", f"{plan.steps:,} of {plan.batch} examples, {plan.steps_per_epoch:,} an epoch"),
        ("learning rate", plan.learning_rate),
        *([("options", "\n".join(others))] if others else []),
        *([("recipe", settings_words(plan.recipe))] if plan.recipe else []),
        *((f"parameters, {name}", f"{count:,}") for name, count in plan.params.items()),
        (
            "memory forecast",
            f"{plan.forecast_bytes / 1e6:,.1f} MB (live tensors, one process{length})",
        ),
        *(
            [("gradient of the norms", f"{plan.norm_grad}, {plan.precision}")]
            if plan.norm_grad is not None
            else []
        ),
        *([("frozen weights", f"held in {plan.hold}")] if plan.hold else []),
        ("device", plan.device),
        *(("note", note) for note in plan.notes),
        *([("data", plan.inventory.line)] if plan.inventory.line else []),
    ]
    console = print_table("plan (nothing was trained)", ("", ""), rows)
    if plan.memory_table:
        own = plan.method + (f":{plan.side}" if plan.side else "")
        print_memory(plan.memory_table, "in this run's place", own=own)
    else:
        console.print("Add --all-methods to see what every other method would need.")


def settings_words(settings: Sequence[Setting]) -> str:
    """Say what a run has of its recipe, a line for each option, and what was given in its place."""
    return "\n".join(
        f"{option}={value}" + ("" if value == recipe else f" (the recipe has {recipe})")
        for option, value, recipe in settings
    )


def print_memory(rows: Sequence[MemoryRow], where: str, own: str | None = None) -> None:
    """Print the forecast of every method by need, the own one marked, and what does not fit."""
    from mdpd_deploy.report.terminal import print_table

    known = any(row.papers for row in rows)
    marked = f"{own} (this run)"
    fitting = [(row, row.forecast) for row in rows if row.forecast is not None]
    cells = [
        (
            marked if row.method == own else row.method,
            f"{need.peak_bytes / 1e6:,.1f}",
            f"{need.trained:,}",
            f"{need.deployed_delta:,}",
            *([row.papers or "–"] if known else []),
        )
        for row, need in sorted(fitting, key=lambda pair: pair[1].peak_bytes)
    ]
    headings = ["method", "MB", "trained", "changed or added when deployed"]
    headings += ["papers, GB"] if known else []
    title = f"memory forecast of every method {where}"
    console = print_table(title, headings, cells, bold={marked}, right=True)
    if known:
        console.print("The papers measured on CUDA, each in a harness of its own.")
    for row in rows:
        if row.reason is not None:
            console.print(f"{row.method} does not fit: {row.reason}")
