"""`mdpd export`: from a run to a verified bundle."""

import logging
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
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="Default: the newest run.")
    ] = None,
    fmt: Annotated[
        str, typer.Option(help="onnx; or trt: with a TensorRT engine, or the recipe for one.")
    ] = "onnx",
    out: Annotated[Path | None, typer.Option(help="Default: RUN/bundles/FMT-PRECISION.")] = None,
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
    bundle = export_run(
        run,
        fmt=_one_of("--fmt", fmt, FORMATS),
        out=out,
        precision=precision,
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
        _print(bundle)
    engine = bundle.manifest["engine"]
    if engine["status"] == "to-build":
        typer.echo(
            f"no TensorRT engine was built: {engine['reason']}. The bundle holds the verified ONNX "
            f"model and the recipe: `mdpd build-engine {bundle.path}` builds the engine on the GPU "
            "machine.",
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
            and with the recipe for one in any case.
        out: The bundle's folder; None = `RUN/bundles/FMT-PRECISION`.
        precision: `fp32`.
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
    from mdpd_deploy.run import Run

    _one_of("--fmt", fmt, FORMATS)
    _one_of("--golden", golden, GOLDEN)
    if precision not in PRECISIONS:
        raise UserError(
            f"--precision {precision} is not supported yet: use {', '.join(PRECISIONS)}."
        )
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
    target = Path(out) if out is not None else opened.path / "bundles" / f"{fmt}-{precision}"
    from mdpd_deploy.export import (
        EngineOptions,
        ExportOptions,
        engine_required,
        pack,
        unavailable_reason,
    )

    unavailable = unavailable_reason() if require_engine else None
    if unavailable is not None:
        raise engine_required(unavailable)
    options = ExportOptions(
        fmt=fmt,
        eval_data=eval_data,
        metric_gate=metric_gate,
        golden=golden,
        overwrite=overwrite,
        engine=EngineOptions().override(chosen),
    )
    return pack(opened, target, options)


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
    for heading in ("gate", "verdict", "what was seen"):
        table.add_column(heading, overflow="fold")
    for gate, found in manifest["verification"].items():
        table.add_row(gate, found["verdict"], found["note"])
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"{manifest['nodes']} nodes, {size / 1e6:.1f} MB in {len(manifest['files'])} files"
    )
    if manifest["golden"] == "validation":
        console.print(
            "golden.safetensors holds validation inputs; for private data: --golden synthetic"
        )
    console.print(f"bundle: {bundle.path}")
