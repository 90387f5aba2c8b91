"""`mdpd export`: from a run to a verified bundle."""

import logging
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import typer

from mdpd_deploy.commands.torch_defaults import torch_defaults
from mdpd_deploy.errors import UserError, unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mdpd_deploy.artifacts.bundle import Bundle
    from mdpd_deploy.artifacts.run import Run
    from mdpd_deploy.export.options import ExportOptions
    from mdpd_deploy.export.precision.forms import Form
    from mdpd_deploy.export.precision.trials import Race

log = logging.getLogger(__name__)

Format = Literal["onnx", "trt"]
Golden = Literal["validation", "synthetic"]
Choice = TypeVar("Choice", bound=str)

FORMATS: tuple[Format, ...] = ("onnx", "trt")
Parity = Literal["fail", "warn"]
PARITY: tuple[Parity, ...] = ("fail", "warn")
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
        str | None,
        typer.Option(
            help="onnx; or trt: with a TensorRT engine, or its recipe. Default: by --target."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Default: RUN/bundles/FMT-PRECISION, of the first RUN with --multi."),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            help="fp32; fp16 (on a CPU for size only), bf16 (trt), int8-cpu, int8-trt; or auto: the "
            "fastest that passes its gates."
        ),
    ] = "fp32",
    target: Annotated[
        str | None, typer.Option(help="cpu or gpu. Default: by --fmt (onnx: cpu, trt: gpu).")
    ] = None,
    parity: Annotated[
        str,
        typer.Option(help="What a missed parity or metric gate does: fail, or warn and record it."),
    ] = "fail",
    autocast_python: Annotated[
        Path | None,
        typer.Option(
            envvar="MDPD_AUTOCAST_PYTHON",
            help="Python of the environment with NVIDIA ModelOpt, for fp16 and bf16 with trt.",
        ),
    ] = None,
    converted: Annotated[
        Path | None,
        typer.Option(help="This model's ONNX file, already converted to fp16 or bf16 for trt."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="Time to measure with auto. Default: 100 rounds and 10 s, at most 20 s."),
    ] = None,
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
    static_batch: Annotated[
        int | None, typer.Option(help="trt: one batch size instead of a range.")
    ] = None,
    tf32: Annotated[
        bool | None, typer.Option("--tf32/--no-tf32", help="trt: TF32 in FP32 products (default).")
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="trt: run on later releases too; slower.")
    ] = False,
    hardware_compatible: Annotated[
        str | None, typer.Option(help="trt: ampere+ or same-compute-capability; slower.")
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="trt: norms and head can be exchanged.")
    ] = False,
    workspace: Annotated[
        int | None, typer.Option(help="trt: memory limit of the build in MiB. Default: none.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON only.")] = False,
) -> None:
    """Drop the side network, trace backbone and head to ONNX, verify, and write the bundle.

    A gate that fails ends the command with exit code 1, and no bundle is left behind.
    """
    given = runs or []
    if multi:
        alone = {
            "--eval-data": eval_data,
            "--target": target,
            "--converted": converted,
            "--seconds": seconds,
            "--parity warn": parity == "warn" or None,
        }
        engine = (static_batch, tf32, version_compatible or None, hardware_compatible)
        if any(value is not None for value in (*engine, refit or None, workspace)):
            raise UserError(
                "options of the engine belong to one run: with --multi give them to "
                "`mdpd build-engine BUNDLE`."
            )
        for option, value in alone.items():
            if value is not None:
                raise UserError(f"{option} belongs to one run: leave it out with --multi.")
        bundle = export_runs(
            given,
            names=None if names is None else names.split(","),
            fmt=_format(fmt) or "onnx",
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
            fmt=_format(fmt),
            out=out,
            precision=precision,
            target=target,
            parity=_one_of("--parity", parity, PARITY),
            autocast_python=autocast_python,
            converted=converted,
            seconds=seconds,
            eval_data=eval_data,
            metric_gate=metric_gate,
            golden=_one_of("--golden", golden, GOLDEN),
            require_engine=require_engine,
            static_batch=static_batch,
            tf32=tf32,
            version_compatible=version_compatible or None,
            hardware_compatible=hardware_compatible,
            refit=refit or None,
            workspace=workspace,
            overwrite=overwrite,
        )
    if json:
        import json as encoder

        typer.echo(encoder.dumps({**bundle.manifest, "path": str(bundle.path)}, indent=2))
    else:
        from mdpd_deploy.commands.export_words import print_bundle

        print_bundle(bundle)
    engine = bundle.manifest["engine"]
    if engine["status"] == "to-build":
        typer.echo(
            f"no TensorRT engine was built: {engine['reason']}. The bundle holds the verified ONNX "
            f"model and the recipe: `mdpd build-engine {quote(str(bundle.path))}` builds the engine on "
            "the GPU machine.",
            err=True,
        )


@torch_defaults()
def export_run(
    run: str | Path | None = None,
    *,
    fmt: Format | None = None,
    out: str | Path | None = None,
    precision: str = "fp32",
    target: str | None = None,
    parity: Parity = "fail",
    autocast_python: str | Path | None = None,
    converted: str | Path | None = None,
    seconds: float | None = None,
    eval_data: str | None = None,
    metric_gate: bool = True,
    golden: Golden = "validation",
    require_engine: bool = False,
    static_batch: int | None = None,
    tf32: bool | None = None,
    version_compatible: bool | None = None,
    hardware_compatible: str | None = None,
    refit: bool | None = None,
    workspace: int | None = None,
    overwrite: bool = False,
) -> "Bundle":
    """Turn a run into a verified bundle; the same words as `mdpd export`.

    Args:
        run: A run's folder; None = the newest completed run under `runs/`.
        fmt: `onnx`; or `trt`: the same bundle with a TensorRT engine where TensorRT and a GPU are,
            and with the recipe for one in any case. None = `trt` for target `gpu`, else `onnx`.
        out: The bundle's folder; None = `RUN/bundles/FMT-PRECISION`.
        precision: `fp32`, `fp16`, `bf16`, `int8-cpu`, `int8-trt`, or `auto`: every one that is
            valid for the target is tried and timed, and the fastest that passes is kept.
        target: `cpu` (ONNX Runtime) or `gpu` (TensorRT); None follows from `fmt`.
        parity: `fail`; or `warn`: a missed parity or metric gate is recorded and the bundle kept.
        autocast_python: Interpreter of the environment that holds NVIDIA ModelOpt, which makes fp16
            and bf16 for TensorRT.
        converted: An ONNX file of this model that was already converted so.
        seconds: Time to measure with `auto`; None = 100 rounds and 10 s, at most 20 s.
        eval_data: Data for the metric gate, where the run's own has moved.
        metric_gate: False leaves the task metric unmeasured, and the manifest says so.
        golden: The inputs kept in the bundle: from the validation data, or synthetic ones where
            that data is private.
        require_engine: Fail instead of leaving the TensorRT engine to be built.
        static_batch: The engine's only batch size; None = the bundle's range.
        tf32: Whether the engine's FP32 products may use TF32; None = yes, as TensorRT has it.
        version_compatible: The engine also runs on later releases of TensorRT; slower.
        hardware_compatible: `ampere+` or `same-compute-capability`; slower.
        refit: The engine's norms and head can be exchanged.
        workspace: Limit of the engine's memory while it is built [MiB]; None = none.
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
    from mdpd_deploy.artifacts.run import Run

    if fmt is not None:
        _one_of("--fmt", fmt, FORMATS)
    _one_of("--golden", golden, GOLDEN)
    _one_of("--parity", parity, PARITY)
    from mdpd_deploy.export.options import ExportOptions
    from mdpd_deploy.export.precision.forms import AUTO, place_of
    from mdpd_deploy.export.tensorrt.options import EngineOptions
    from mdpd_deploy.export.write import write_bundle

    fmt, place = place_of(fmt, target)
    form = _checked_form(precision, place, converted=converted, seconds=seconds)
    if require_engine and fmt != "trt":
        raise UserError("--require-engine belongs to --fmt trt: add that, or leave it out.")
    chosen = {
        "static_batch": static_batch,
        "tf32": tf32,
        "version_compatible": version_compatible,
        "hardware_compatible": hardware_compatible,
        "refit": refit,
        "workspace_mib": workspace,
    }
    given = [name for name, value in chosen.items() if value is not None]
    if given and fmt != "trt":
        option = given[0].removesuffix("_mib").replace("_", "-")
        raise UserError(f"--{option} belongs to --fmt trt: add that, or leave it out.")
    opened = Run.open(run)
    if run is None:
        log.info("run: %s (the newest)", opened.path)
    folder = Path(out) if out is not None else opened.path / "bundles" / f"{fmt}-{precision}"
    _require_engine(require_engine)
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
        engine=EngineOptions().override(chosen),
    )
    timer = _timer(opened, options, seconds) if precision == AUTO else None
    return write_bundle(opened, folder, options, time_graphs=timer)


def _checked_form(
    precision: str, target: str, *, converted: object, seconds: float | None
) -> "Form | None":
    """Return what to make, None for auto; refuse what cannot be made or measured."""
    from mdpd_deploy.export.precision.forms import AUTO, form_of
    from mdpd_deploy.export.tensorrt.install import unavailable_reason

    if precision == AUTO:
        unavailable = unavailable_reason() if target == "gpu" else None
        if unavailable is not None:
            raise UserError(
                "--precision auto --target gpu times a TensorRT engine of each precision, and none "
                f"can be built here: {unavailable}. Name a precision (fp16 is the usual choice), or "
                "run this on the GPU machine."
            )
        if converted is not None:
            raise UserError("--converted belongs to one precision: name it instead of auto.")
        if seconds is not None and not 0 < seconds < float("inf"):
            raise UserError(f"--seconds {seconds}: give a time above 0.")
        return None
    form = form_of(precision, "gpu" if target == "gpu" else "cpu")
    if converted is not None and not form.takes_converted:
        raise UserError(
            f"--converted belongs to fp16 and bf16 with --fmt trt: given with {precision}."
        )
    if seconds is not None:
        raise UserError("--seconds belongs to --precision auto: add that, or leave it out.")
    return form


def _timer(
    run: "Run", options: "ExportOptions", seconds: float | None
) -> "Callable[[Mapping[str, Path]], Race]":
    """Return what times graphs or engines against fp32: batch 1 if it can, validation examples."""
    from mdpd_deploy.commands.bench_latency import input_source
    from mdpd_deploy.export.precision.trials import Race
    from mdpd_deploy.serve.latency.cells import Plan
    from mdpd_deploy.serve.latency.graph_race import race_graphs

    def time_graphs(graphs: "Mapping[str, Path]") -> "Race":
        log.info("timing %s in turn", ", ".join(graphs))
        found = race_graphs(
            graphs,
            input_source(run),
            batch=options.engine.static_batch or 1,
            plan=Plan(seconds=seconds),
            engines=options.target == "gpu",
            host_code=options.engine.version_compatible,
        )
        return Race(found.timings, found.settings)

    return time_graphs


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
) -> "Bundle":
    """Turn several runs on one backbone into one verified bundle that answers all their tasks.

    Args:
        runs: Completed runs that differ in norms and head only: methods mdpd, norms, probe.
        names: A name for each task; None = the runs' own (`sst2`), numbered where equal.
        fmt: As `export_run`; with `trt` the norms have the form that TensorRT can parse.
        out: The bundle's folder; None = `bundles/multi-FMT-PRECISION` in the first run.
        precision: `fp32`; a mixed graph is not converted.
        metric_gate: As `export_run`, and so the others.
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
    from mdpd_deploy.artifacts.run import Run

    _check(fmt, precision, golden, require_engine)
    if not runs:
        raise UserError("--multi: name the runs whose tasks go into the bundle.")
    opened = [Run.open(run) for run in runs]
    inside = opened[0].path / "bundles" / f"multi-{fmt}-{precision}"
    from mdpd_deploy.export.multitask.bundle import write_bundle_of_tasks
    from mdpd_deploy.export.options import ExportOptions

    _require_engine(require_engine)
    options = ExportOptions(fmt=fmt, metric_gate=metric_gate, golden=golden, overwrite=overwrite)
    return write_bundle_of_tasks(opened, inside if out is None else Path(out), options, names=names)


def _require_engine(required: bool) -> None:
    """Raise `ExportError` before any work when an engine is required and cannot be built here."""
    from mdpd_deploy.export.tensorrt.install import unavailable_reason
    from mdpd_deploy.export.tensorrt.recipe import engine_required

    unavailable = unavailable_reason() if required else None
    if unavailable is not None:
        raise engine_required(unavailable)


def _check(fmt: str, precision: str, golden: str, require_engine: bool) -> None:
    _one_of("--fmt", fmt, FORMATS)
    _one_of("--golden", golden, GOLDEN)
    if precision != "fp32":
        raise UserError(
            f"--precision {precision} belongs to a bundle of one task: with --multi use fp32."
        )
    if require_engine and fmt != "trt":
        raise UserError("--require-engine belongs to --fmt trt: add that, or leave it out.")


def _format(given: str | None) -> Format | None:
    for choice in FORMATS:
        if given == choice:
            return choice
    if given is not None:
        raise unknown("--fmt", given, FORMATS)
    return None


def _one_of(option: str, given: str, choices: tuple[Choice, ...]) -> Choice:
    for choice in choices:
        if given == choice:
            return choice
    raise unknown(option, given, choices)
