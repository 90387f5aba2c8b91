"""`mdpd export`: from a run to a verified bundle."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from mdpd_deploy.errors import UserError, unknown

if TYPE_CHECKING:
    from mdpd_deploy.bundle import Bundle

log = logging.getLogger(__name__)

Format = Literal["onnx", "trt"]
Golden = Literal["validation", "synthetic"]
Choice = TypeVar("Choice", bound=str)

FORMATS: tuple[Format, ...] = ("onnx", "trt")
PRECISIONS = ("fp32",)
GOLDEN: tuple[Golden, ...] = ("validation", "synthetic")


def command(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN...", help="Default: the newest run.")
    ] = None,
    multi: Annotated[
        bool, typer.Option("--multi", help="One bundle for the tasks of several runs.")
    ] = False,
    names: Annotated[
        str | None, typer.Option(help="Names of the tasks for --multi, with commas.")
    ] = None,
    fmt: Annotated[
        str, typer.Option(help="onnx; or trt: ONNX with a TensorRT build recipe.")
    ] = "onnx",
    out: Annotated[
        Path | None,
        typer.Option(help="Default: RUN/bundles/FMT-PRECISION, of the first RUN with --multi."),
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32.")] = "fp32",
    eval_data: Annotated[
        str | None, typer.Option(help="Data for the metric gate, where the run's own has moved.")
    ] = None,
    metric_gate: Annotated[
        bool,
        typer.Option("--metric-gate/--no-metric-gate", help="Measure the task metric again."),
    ] = True,
    golden: Annotated[
        str, typer.Option(help="Inputs kept in the bundle: validation or synthetic.")
    ] = "validation",
    require_engine: Annotated[
        bool, typer.Option("--require-engine", help="Fail if no TensorRT engine can be built.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON only.")] = False,
) -> None:
    """Drop the side network, trace backbone and head to ONNX, verify, and write the bundle.

    A gate that fails ends the command with exit code 1, and no bundle is left behind.
    """
    given = runs or []
    if multi:
        if eval_data is not None:
            raise UserError("--eval-data names the data of one task: leave it out with --multi.")
        bundle = export_runs(
            given,
            names=None if names is None else names.split(","),
            fmt=_one_of("--fmt", fmt, FORMATS),
            out=out,
            precision=precision,
            metric_gate=metric_gate,
            golden=_one_of("--golden", golden, GOLDEN),
            require_engine=require_engine,
            overwrite=overwrite,
        )
    else:
        if len(given) > 1:
            raise UserError(
                f"{len(given)} runs were given: add --multi to put their tasks into one bundle, or "
                "export them one by one."
            )
        if names is not None:
            raise UserError("--names belongs to --multi: add that, or leave it out.")
        bundle = export_run(
            given[0] if given else None,
            fmt=_one_of("--fmt", fmt, FORMATS),
            out=out,
            precision=precision,
            eval_data=eval_data,
            metric_gate=metric_gate,
            golden=_one_of("--golden", golden, GOLDEN),
            require_engine=require_engine,
            overwrite=overwrite,
        )
    if json:
        import json as encoder

        typer.echo(encoder.dumps({**bundle.manifest, "path": str(bundle.path)}, indent=2))
    else:
        _print(bundle)
    engine = bundle.manifest["engine"]
    if engine["status"] == "to-build":
        from mdpd_deploy.export import SCRIPT_FILE

        typer.echo(
            f"no TensorRT engine was built: {engine['reason']}. The bundle holds the verified "
            f"ONNX model; sh {bundle.path / SCRIPT_FILE} builds the engine on the GPU machine.",
            err=True,
        )


def export_run(
    run: str | Path | None = None,
    *,
    fmt: Format = "onnx",
    out: str | Path | None = None,
    precision: str = "fp32",
    eval_data: str | None = None,
    metric_gate: bool = True,
    golden: Golden = "validation",
    require_engine: bool = False,
    overwrite: bool = False,
) -> "Bundle":
    """Turn a run into a verified bundle; the same words as `mdpd export`.

    Args:
        run: A run's folder; None = the newest completed run under `runs/`.
        fmt: `onnx`; or `trt`: the same bundle with the recipe for a TensorRT engine.
        out: The bundle's folder; None = `RUN/bundles/FMT-PRECISION`.
        precision: `fp32`.
        eval_data: Data for the metric gate, where the run's own has moved.
        metric_gate: False leaves the task metric unmeasured, and the manifest says so.
        golden: The inputs kept in the bundle: from the validation data, or synthetic ones where
            that data is private.
        require_engine: Fail instead of leaving the TensorRT engine to be built.
        overwrite: Replace what lies at `out`.

    Returns:
        The bundle, read back from disk and checked.

    Raises:
        UserError: If the run, its data or an option cannot be used.
        ExportError: If the model cannot be traced, or `require_engine` cannot be met.
        VerificationError: If a gate fails; nothing is left behind.

    Example:
        >>> from mdpd_deploy import export_run
        >>> bundle = export_run(folder / "run", out=folder / "bundle")
        >>> bundle.manifest["verification"]["identity"]["verdict"]
        'passed'
    """
    from mdpd_deploy.run import Run

    _check(fmt, precision, golden, require_engine)
    opened = Run.open(run)
    if run is None:
        log.info("run: %s (the newest)", opened.path)
    target = Path(out) if out is not None else opened.path / "bundles" / f"{fmt}-{precision}"
    from mdpd_deploy.export import ExportOptions, engine_unavailable, pack

    if require_engine:
        raise engine_unavailable()
    options = ExportOptions(
        fmt=fmt,
        eval_data=eval_data,
        metric_gate=metric_gate,
        golden=golden,
        overwrite=overwrite,
    )
    return pack(opened, target, options)


def export_runs(
    runs: Sequence[Path | str],
    *,
    names: Sequence[str] | None = None,
    fmt: Format = "onnx",
    out: Path | str | None = None,
    precision: str = "fp32",
    metric_gate: bool = True,
    golden: Golden = "validation",
    require_engine: bool = False,
    overwrite: bool = False,
) -> "Bundle":
    """Turn several runs on one backbone into one verified bundle that answers all their tasks.

    Args:
        runs: Completed runs that differ in norms and head only: methods mdpd, norms, probe.
        names: A name for each task; None = the runs' own (`sst2`), numbered where equal.
        fmt: As `export_run`; with `trt` the norms have the form that TensorRT can parse.
        out: The bundle's folder; None = `bundles/multi-FMT-PRECISION` in the first run.
        precision: As `export_run`, and so the others.
        metric_gate: See there.
        golden: See there.
        require_engine: See there.
        overwrite: See there.

    Returns:
        The bundle, read back from disk and checked.

    Raises:
        UserError: If a run, its data or an option cannot be used, or the runs cannot share a graph.
        ExportError: If the model cannot be traced, or `require_engine` cannot be met.
        VerificationError: If a gate fails for a task; nothing is left behind.
    """
    from mdpd_deploy.run import Run

    if precision != "fp32":
        raise UserError(f"--precision {precision}: a bundle of several tasks is fp32 so far.")
    _check(fmt, precision, golden, require_engine)
    if not runs:
        raise UserError("--multi: name the runs whose tasks go into the bundle.")
    opened = [Run.open(run) for run in runs]
    inside = opened[0].path / "bundles" / f"multi-{fmt}-{precision}"
    from mdpd_deploy.export import ExportOptions, engine_unavailable, pack_multi

    if require_engine:
        raise engine_unavailable()
    options = ExportOptions(fmt=fmt, metric_gate=metric_gate, golden=golden, overwrite=overwrite)
    return pack_multi(opened, inside if out is None else Path(out), options, names=names)


def _check(fmt: str, precision: str, golden: str, require_engine: bool) -> None:
    _one_of("--fmt", fmt, FORMATS)
    _one_of("--golden", golden, GOLDEN)
    if precision not in PRECISIONS:
        raise UserError(
            f"--precision {precision} is not supported yet: use {', '.join(PRECISIONS)}."
        )
    if require_engine and fmt != "trt":
        raise UserError("--require-engine belongs to --fmt trt: add that, or leave it out.")


def _one_of(option: str, given: str, choices: tuple[Choice, ...]) -> Choice:
    for choice in choices:
        if given == choice:
            return choice
    raise unknown(option, given, choices)


def _print(bundle: "Bundle") -> None:
    from rich.console import Console
    from rich.table import Table

    manifest = bundle.manifest
    table = Table(title=f"verified bundle: {manifest['task']}, {manifest['method']}")
    headings = ("gate", "verdict", "what was seen")
    for heading in ("task", *headings) if bundle.mixed else headings:
        table.add_column(heading, overflow="fold")
    for task in bundle.tasks:
        for gate, found in task.facts["verification"].items():
            name = [task.name] if bundle.mixed else []
            table.add_row(*name, gate, found["verdict"], found["note"])
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"{manifest['nodes']} nodes, {size / 1e6:.1f} MB in {len(manifest['files'])} files"
    )
    if bundle.mixed:
        deltas = [
            f"{task.name} {manifest['files'][f'tasks/{task.name}/delta.safetensors']['bytes'] / 1e3:.0f}"
            for task in bundle.tasks
        ]
        console.print(
            f"one task alone has {manifest['mixed']['base_nodes']} nodes; kB of each task's delta: "
            f"{', '.join(deltas)}"
        )
    if manifest["golden"] == "validation":
        console.print(
            "golden.safetensors holds validation inputs; for private data: --golden synthetic"
        )
    console.print(f"bundle: {bundle.path}")
