"""`mdpd build-engine`: build and verify a bundle's TensorRT engine on the GPU that will run it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Unpack

import typer

from mdpd_deploy.commands.options import EngineWords
from mdpd_deploy.commands.verb import Json, fields_of, print_json, takes


def build_engine(
    bundle: Annotated[
        Path | str, typer.Argument(metavar="BUNDLE", help="A folder of `mdpd export`.")
    ],
    *,
    rebuild: Annotated[bool, typer.Option(help="Build though the engine is up to date.")] = False,
    **words: Unpack[EngineWords],
) -> dict[str, Any]:
    """Build the TensorRT engine of a bundle, verify it, and keep it beside the ONNX model.

    What is not given is as the bundle's recipe has it. If the build or its verification fails, the
    bundle is as it was.

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

    chosen = fields_of(EngineWords, words, "build_engine")
    opened = load_bundle(bundle)
    options = read_recipe(opened.path).override(chosen)
    installed = install_engine(opened, options, rebuild=rebuild)
    load_bundle(bundle)
    return {**installed.record, "built": installed.built, "reason": installed.reason}


@takes(build_engine)
def command(json: Json = False, **asked: Any) -> None:
    record = build_engine(**asked)
    if json:
        print_json(record)
        return
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
    place = Path(asked["bundle"]) / "model.plan"
    typer.echo(f"engine      {place}, {record['plan_bytes'] / 1e6:.1f} MB")
