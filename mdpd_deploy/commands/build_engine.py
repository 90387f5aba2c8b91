"""`mdpd build-engine`: build and verify a bundle's TensorRT engine on the GPU that will run it."""

from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder of `mdpd export`.")],
    static_batch: Annotated[
        int | None, typer.Option(help="One batch size instead of a range; 0: the range.")
    ] = None,
    tf32: Annotated[
        bool | None, typer.Option("--tf32/--no-tf32", help="TF32 in FP32 products.")
    ] = None,
    version_compatible: Annotated[
        bool | None,
        typer.Option(
            "--version-compatible/--no-version-compatible",
            help="Run on later releases of TensorRT too; slower.",
        ),
    ] = None,
    hardware_compatible: Annotated[
        str | None, typer.Option(help="none, ampere+ or same-compute-capability; slower.")
    ] = None,
    refit: Annotated[
        bool | None, typer.Option("--refit/--no-refit", help="Norms and head can be exchanged.")
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(help="Memory limit of the build in MiB. Default: none.")
    ] = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build though the engine is up to date.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the engine's record as JSON only.")
    ] = False,
) -> None:
    """Build the TensorRT engine of a bundle, verify it, and keep it beside the ONNX model.

    What is not given is as the bundle's recipe has it. If the build or its verification fails, the
    bundle is as it was.
    """
    record = build_engine(
        bundle,
        static_batch=static_batch,
        tf32=tf32,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        refit=refit,
        workspace=workspace,
        rebuild=rebuild,
    )
    if json:
        import json as encoder

        typer.echo(encoder.dumps(record, indent=2))
    else:
        _print(bundle, record)


def build_engine(
    bundle: str | Path,
    *,
    static_batch: int | None = None,
    tf32: bool | None = None,
    version_compatible: bool | None = None,
    hardware_compatible: str | None = None,
    refit: bool | None = None,
    workspace: int | None = None,
    rebuild: bool = False,
) -> dict[str, Any]:
    """Build a bundle's TensorRT engine; the same words as `mdpd build-engine`.

    Args:
        bundle: A bundle's folder. What is None below is as its recipe has it.
        static_batch: The engine's only batch size; 0 = the bundle's range.
        tf32: Whether FP32 products may use TF32.
        version_compatible: The engine also runs on later releases of TensorRT; slower.
        hardware_compatible: `none`, `ampere+` or `same-compute-capability`.
        refit: Norms and head can be exchanged.
        workspace: Limit of the memory while building [MiB].
        rebuild: Build though the engine that is there is the one asked for.

    Returns:
        `model.plan.json`: the engine's key, layers and parity; `built` and `reason` tell whether
        and why it was built now.

    Raises:
        UserError: If the bundle, TensorRT, the GPU or an option cannot be used.
        ExportError: If TensorRT refuses the graph or the build.
        VerificationError: If the engine does not compute what the bundle says.
    """
    from mdpd_deploy.artifacts.bundle import load_bundle
    from mdpd_deploy.export.tensorrt.install import install_engine
    from mdpd_deploy.export.tensorrt.recipe import read_recipe

    opened = load_bundle(bundle)
    chosen = {
        "static_batch": static_batch,
        "tf32": tf32,
        "version_compatible": version_compatible,
        "hardware_compatible": hardware_compatible,
        "refit": refit,
        "workspace_mib": workspace,
    }
    options = read_recipe(opened.path).override(chosen)
    installed = install_engine(opened, options, rebuild=rebuild)
    load_bundle(bundle)
    return {**installed.record, "built": installed.built, "reason": installed.reason}


def _print(bundle: Path, record: dict[str, Any]) -> None:
    key, layers, parity = record["key"], record["layers"], record["parity"]
    if record["built"]:
        typer.echo(f"built in {record['build_seconds']:.1f} s: {record['reason']}")
    else:
        typer.echo("up to date: the engine is the one asked for (--rebuild builds it anyway)")
    kinds = ", ".join(f"{count} {kind}" for kind, count in layers["by_type"].items())
    typer.echo(f"for         {key['gpu']}, TensorRT {key['tensorrt']}, driver {key['driver']}")
    typer.echo(f"flags       {', '.join(key['flags']) or 'none'}; hardware {key['hardware']}")
    for name, shapes in key["profiles"].items():
        ranges = " | ".join("x".join(map(str, shapes[bound])) for bound in ("min", "opt", "max"))
        typer.echo(f"shapes      {name}: {ranges}")
    typer.echo(f"layers      {layers['layers']} ({kinds})")
    limit = "reported only" if parity["tolerance"] is None else f"allowed {parity['tolerance']:.0e}"
    typer.echo(f"parity      {parity['scaled_diff']:.1e} of the outputs' spread, {limit}")
    typer.echo(f"engine      {bundle / 'model.plan'}, {record['plan_bytes'] / 1e6:.1f} MB")
