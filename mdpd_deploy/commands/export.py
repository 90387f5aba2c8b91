"""`mdpd export`: from a run to a verified bundle."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal, Unpack, get_type_hints

import typer

from mdpd_deploy.commands.options import EngineWords
from mdpd_deploy.commands.precision import checked_form, print_precision, timer_of
from mdpd_deploy.commands.torch_defaults import torch_defaults
from mdpd_deploy.commands.verb import Json, Overwrite, check_word, fields_of, print_json, takes
from mdpd_deploy.errors import UserError

if TYPE_CHECKING:
    from mdpd_deploy.artifacts.bundle import Bundle

log = logging.getLogger(__name__)

Format = Literal["onnx", "trt"]
Golden = Literal["validation", "synthetic"]
Parity = Literal["fail", "warn"]


GoldenWord = Annotated[
    Golden,
    typer.Option(
        help="Inputs kept in the bundle: validation, or synthetic where that data is private."
    ),
]
AutocastPython = Annotated[
    Path | str | None,
    typer.Option(
        envvar="MDPD_AUTOCAST_PYTHON",
        help="Python of the environment with NVIDIA ModelOpt, for fp16 and bf16 with trt.",
    ),
]
PrecisionWord = Annotated[
    str,
    typer.Option(
        help="fp32; fp16 (on a CPU for size only), bf16 (trt, or OpenVINO on a CPU), int8-cpu, "
        "int8-openvino, int8-trt; or auto: the fastest that passes its gates."
    ),
]


@torch_defaults()
def export_run(
    run: Path | str | None = None,
    *,
    fmt: Annotated[
        Format | None,
        typer.Option(
            help="onnx; or trt: with a TensorRT engine, or its recipe. Default: by --target."
        ),
    ] = None,
    out: Annotated[
        Path | str | None,
        typer.Option(help="Default: RUN/bundles/FMT-PRECISION, of the first RUN with --multi."),
    ] = None,
    precision: PrecisionWord = "fp32",
    target: Annotated[
        str | None, typer.Option(help="cpu or gpu. Default: by --fmt (onnx: cpu, trt: gpu).")
    ] = None,
    parity: Annotated[
        Parity,
        typer.Option(help="What a missed parity or metric gate does: fail, or warn and record it."),
    ] = "fail",
    autocast_python: AutocastPython = None,
    converted: Annotated[
        Path | str | None,
        typer.Option(help="This model's ONNX file, already converted to fp16 or bf16 for trt."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="Time to measure with auto. Default: 100 rounds and 10 s, at most 20 s."),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Data for the metric gate, where the run's own has moved.")
    ] = None,
    metric_gate: Annotated[bool, typer.Option(help="Measure the task metric again.")] = True,
    golden: GoldenWord = "validation",
    require_engine: Annotated[
        bool, typer.Option(help="Fail if no TensorRT engine can be built.")
    ] = False,
    overwrite: Overwrite = False,
    **engine: Unpack[EngineWords],
) -> Bundle:
    """Drop the side network, trace backbone and head to ONNX, verify, and write the bundle.

    A gate that fails ends the command with exit code 1, and no bundle is left behind. Options of
    the engine belong to --fmt trt.

    Args:
        run: A run's folder; None = the newest completed run under `runs/`.

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
    from mdpd_deploy.artifacts.run import Run

    check_word("--fmt", fmt, Format)
    check_word("--golden", golden, Golden)
    check_word("--parity", parity, Parity)
    from mdpd_deploy.export.options import ExportOptions
    from mdpd_deploy.export.precision.forms import AUTO, place_of
    from mdpd_deploy.export.tensorrt.options import EngineOptions
    from mdpd_deploy.export.write import write_bundle

    fmt, place = place_of(fmt, target)
    form = checked_form(precision, place, converted=converted, seconds=seconds)
    _check_engine(fmt, require_engine, engine)
    opened = Run.open(run)
    if run is None:
        log.info("run: %s (the newest)", opened.path)
    folder = Path(out) if out is not None else opened.path / "bundles" / f"{fmt}-{precision}"
    if form is not None and form.note:
        log.warning("%s", form.note)
    options = ExportOptions(
        fmt=fmt,
        eval_data=eval_data,
        metric_gate=metric_gate,
        golden=golden,
        overwrite=overwrite,
        precision=precision,
        target=place,
        parity=parity,
        autocast_python=None if autocast_python is None else Path(autocast_python),
        converted=None if converted is None else Path(converted),
        engine=EngineOptions().override(fields_of(EngineWords, engine, "export_run")),
    )
    timer = timer_of(opened, options, seconds) if precision == AUTO else None
    return write_bundle(opened, folder, options, time_graphs=timer)


@torch_defaults()
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
) -> Bundle:
    """Turn several runs on one backbone into one verified bundle that answers all their tasks.

    Args:
        runs: Completed runs that differ in norms and head only: methods mdpd, norms, probe.
        names: A name for each task; None = the runs' own (`sst2`), numbered where equal.
        fmt: With `trt` the norms have the form that TensorRT can parse.
        out: The bundle's folder; None = `bundles/multi-FMT-PRECISION` in the first run.
        precision: `fp32`; a mixed graph is not converted.
        metric_gate: As the other options: see `export_run`.

    Returns:
        The bundle, read back from disk and checked.

    Raises:
        UserError: If a run, its data or an option cannot be used, or the runs cannot share a graph.
        ExportError: If the model cannot be traced, or `require_engine` cannot be met.
        VerificationError: If a gate fails for a task; nothing is left behind.
    """
    from mdpd_deploy.artifacts.run import Run

    check_word("--fmt", fmt, Format)
    check_word("--golden", golden, Golden)
    if precision != "fp32":
        raise UserError(
            f"--precision {precision} belongs to a bundle of one task: with --multi use fp32."
        )
    _check_engine(fmt, require_engine, {})
    if not runs:
        raise UserError("--multi: name the runs whose tasks go into the bundle.")
    opened = [Run.open(run) for run in runs]
    inside = opened[0].path / "bundles" / f"multi-{fmt}-{precision}"
    from mdpd_deploy.export.multitask.bundle import write_bundle_of_tasks
    from mdpd_deploy.export.options import ExportOptions

    options = ExportOptions(fmt=fmt, metric_gate=metric_gate, golden=golden, overwrite=overwrite)
    return write_bundle_of_tasks(opened, inside if out is None else Path(out), options, names=names)


@takes(export_run, words_last=True)
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
    json: Json = False,
    **asked: Any,
) -> None:
    given = runs or []
    if multi:
        _refuse_of_one_run(asked)
        bundle = export_runs(given, names=None if names is None else names.split(","), **asked)
    elif len(given) > 1:
        raise UserError(
            f"{len(given)} runs were given: add --multi to put their tasks into one bundle, or "
            "export them one by one."
        )
    elif names is not None:
        raise UserError("--names belongs to --multi: add that, or leave it out.")
    else:
        bundle = export_run(given[0] if given else None, **asked)
    if json:
        print_json({**bundle.manifest, "path": str(bundle.path)})
    else:
        _print(bundle)
    engine = bundle.manifest["engine"]
    if engine["status"] == "to-build":
        typer.echo(
            f"no TensorRT engine was built: {engine['reason']}. The bundle holds the verified ONNX "
            f"model and the recipe: `mdpd build-engine {quote(str(bundle.path))}` builds the engine on "
            "the GPU machine.",
            err=True,
        )


def _refuse_of_one_run(asked: dict[str, Any]) -> None:
    """Refuse options of `export_run` that `export_runs` has not."""
    asked.pop("autocast_python", None)  # set for a whole environment, and used where it serves
    taken = signature(export_runs).parameters
    for name, value in asked.items():
        if name in get_type_hints(EngineWords):
            raise UserError(
                "options of the engine belong to one run: with --multi give them to "
                "`mdpd build-engine BUNDLE`."
            )
        if name not in taken:
            option = f"--{name.replace('_', '-')}{' warn' if value == 'warn' else ''}"
            raise UserError(f"{option} belongs to one run: leave it out with --multi.")


def _check_engine(fmt: str, required: bool, words: Mapping[str, Any]) -> None:
    """Refuse what is of an engine where none is asked for, or where one cannot be built."""
    from mdpd_deploy.export.tensorrt.install import unavailable_reason
    from mdpd_deploy.export.tensorrt.recipe import engine_required

    given = [name for name, value in words.items() if value is not None]
    for name in (["require_engine"] if required else []) + given:
        if fmt != "trt":
            option = name.replace("_", "-")
            raise UserError(f"--{option} belongs to --fmt trt: add that, or leave it out.")
    unavailable = unavailable_reason() if required else None
    if unavailable is not None:
        raise engine_required(unavailable)


def _print(bundle: Bundle) -> None:
    """Print the verdicts of a fresh bundle's gates, its receipt and its size."""
    from mdpd_deploy.report.terminal import print_table

    manifest = bundle.manifest
    rows = [
        (*([task.name] if bundle.mixed else []), gate, found["verdict"], found["note"])
        for task in bundle.tasks
        for gate, found in task.facts["verification"].items()
    ]
    headings = (*(["task"] if bundle.mixed else []), "gate", "verdict", "what was seen")
    title = f"verified bundle: {manifest['task']}, {manifest['method']}"
    console = print_table(title, headings, rows)
    print_precision(console, manifest)
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    console.print(
        f"{bundle.graph()['nodes']} nodes, {sum(sizes.values()) / 1e6:.1f} MB in {len(sizes)} files"
    )
    if bundle.mixed:
        deltas = [
            f"{task.name} {sizes[f'tasks/{task.name}/delta.safetensors'] / 1e3:.0f}"
            for task in bundle.tasks
        ]
        console.print(
            f"one task alone has {bundle.graph('base')['nodes']} nodes; kB of each task's delta: "
            f"{', '.join(deltas)}"
        )
    if manifest["golden"] == "validation":
        console.print(
            "golden.safetensors holds validation inputs; for private data: --golden synthetic"
        )
    console.print(f"bundle: {bundle.path}")
