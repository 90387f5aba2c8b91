"""`mdpd triton`: a model repository for Triton from bundles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mdpd_deploy.commands.verb import Json, Overwrite, check_word, print_json, takes

Backend = Literal["onnxruntime", "tensorrt"]
Device = Literal["cpu", "cuda"]


def triton_repository(
    bundles: Mapping[str, Path | str],
    out: Annotated[Path | str, typer.Option(help="The repository's folder.")],
    *,
    backend: Annotated[
        Backend | None,
        typer.Option(help="onnxruntime or tensorrt; default: tensorrt where there is an engine."),
    ] = None,
    device: Annotated[
        Device | None, typer.Option(help="cpu or cuda; default: cuda for an engine, else cpu.")
    ] = None,
    instances: Annotated[
        int, typer.Option(min=1, help="Copies that run at the same time, on each GPU.")
    ] = 1,
    max_delay_ms: Annotated[
        float, typer.Option(min=0, help="How long a request waits for others to share a batch.")
    ] = 1.0,
    queue: Annotated[int, typer.Option(min=1, help="Waiting requests; more are refused.")] = 256,
    timeout_ms: Annotated[
        float, typer.Option(min=1, help="A request that waited this long is refused.")
    ] = 1000.0,
    preprocess: Annotated[
        bool, typer.Option(help="Accept raw pictures or texts too, through an ensemble.")
    ] = True,
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Write a model repository for NVIDIA's Triton Inference Server.

    The README in it says how to start it.

    Args:
        bundles: Bundle folders by the name that requests use.

    Returns:
        What was written, as in `repository.json`.

    Raises:
        UserError: If a bundle, a name or an option cannot be used.
    """
    check_word("--backend", backend, Backend)
    check_word("--device", device, Device)
    from mdpd_deploy.artifacts.bundle import load_bundle
    from mdpd_deploy.export.triton.config import TritonOptions
    from mdpd_deploy.export.triton.repository import write_repository

    options = TritonOptions(backend, device, instances, max_delay_ms, queue, timeout_ms, preprocess)
    opened = {name: load_bundle(path) for name, path in bundles.items()}
    return write_repository(opened, Path(out), options, overwrite=overwrite)


@takes(triton_repository)
def command(
    bundles: Annotated[
        list[str],
        typer.Argument(
            metavar="BUNDLE...", help="Folders of `mdpd export`, or NAME=FOLDER for another name."
        ),
    ],
    json: Json = False,
    **asked: Any,
) -> None:
    from mdpd_deploy.commands.serve import name_bundles
    from mdpd_deploy.text import shown

    facts = triton_repository(name_bundles(bundles), **asked)
    out = asked["out"]
    if json:
        print_json({**facts, "path": str(out)})
        return
    for model in facts["models"]:
        inputs = ", ".join(f"{port['name']} {port['dims']}" for port in model["inputs"])
        typer.echo(shown(f"{model['name']}: {model['backend']}, takes {inputs}"))
    typer.echo(f"repository: {out}, to be started as {out / 'README.md'} says")
