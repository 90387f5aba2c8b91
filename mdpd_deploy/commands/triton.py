"""`mdpd triton`: a model repository for Triton from bundles."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mdpd_deploy.errors import unknown

Backend = Literal["onnxruntime", "tensorrt"]
Device = Literal["cpu", "cuda"]


def command(
    bundles: Annotated[
        list[str],
        typer.Argument(
            metavar="BUNDLE...", help="Folders of `mdpd export`, or NAME=FOLDER for another name."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The repository's folder.")],
    backend: Annotated[
        str | None,
        typer.Option(help="onnxruntime or tensorrt; default: tensorrt where there is an engine."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: cuda for an engine, else cpu.")
    ] = None,
    instances: Annotated[int, typer.Option(min=1, help="Copies that run at the same time.")] = 1,
    max_delay_ms: Annotated[
        float, typer.Option(min=0, help="How long a request waits for others to share a batch.")
    ] = 1.0,
    queue: Annotated[int, typer.Option(min=1, help="Waiting requests; more are refused.")] = 256,
    timeout_ms: Annotated[
        float, typer.Option(min=1, help="A request that waited this long is refused.")
    ] = 1000.0,
    preprocess: Annotated[
        bool,
        typer.Option("--preprocess/--no-preprocess", help="Accept raw pictures or texts too."),
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Write a model repository for NVIDIA's Triton Inference Server.

    The README in it says how to start it.
    """
    from mdpd_deploy.commands.serve import name_bundles

    facts = triton_repository(
        name_bundles(bundles),
        out,
        backend=_one_of("--backend", backend, ("onnxruntime", "tensorrt")),
        device=_one_of("--device", device, ("cpu", "cuda")),
        instances=instances,
        max_delay_ms=max_delay_ms,
        queue=queue,
        timeout_ms=timeout_ms,
        preprocess=preprocess,
        overwrite=overwrite,
    )
    if json:
        import json as encoder

        typer.echo(encoder.dumps({**facts, "path": str(out)}, indent=2))
        return
    from mdpd_deploy.text import shown

    for model in facts["models"]:
        inputs = ", ".join(f"{port['name']} {port['dims']}" for port in model["inputs"])
        typer.echo(shown(f"{model['name']}: {model['backend']}, takes {inputs}"))
    typer.echo(f"repository: {out}, to be started as {out / 'README.md'} says")


def triton_repository(
    bundles: Mapping[str, str | Path],
    out: str | Path,
    *,
    backend: Backend | None = None,
    device: Device | None = None,
    instances: int = 1,
    max_delay_ms: float = 1.0,
    queue: int = 256,
    timeout_ms: float = 1000.0,
    preprocess: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a Triton model repository; the same words as `mdpd triton`.

    Args:
        bundles: Bundle folders by the name that requests use.
        out: The repository's folder.
        backend: Triton's backend; None = `tensorrt` where a bundle holds an engine, else
            `onnxruntime`.
        device: `cpu` or `cuda`; None = `cuda` for an engine, else `cpu`.
        instances: Copies of the graph that run at the same time (per GPU).
        max_delay_ms: How long a request waits for others to share its batch.
        queue: Requests that may wait; more are refused.
        timeout_ms: A request that waited this long is refused.
        preprocess: Whether to accept raw pictures or texts too, through an ensemble.
        overwrite: Replace a repository at `out`.

    Returns:
        What was written, as in `repository.json`.

    Raises:
        UserError: If a bundle, a name or an option cannot be used.
    """
    from mdpd_deploy.artifacts.bundle import load_bundle
    from mdpd_deploy.export.triton.config import TritonOptions
    from mdpd_deploy.export.triton.repository import write_repository

    options = TritonOptions(
        backend=backend,
        device=device,
        instances=instances,
        max_delay_ms=max_delay_ms,
        max_queue=queue,
        timeout_ms=timeout_ms,
        preprocess=preprocess,
    )
    opened = {name: load_bundle(path) for name, path in bundles.items()}
    return write_repository(opened, Path(out), options, overwrite=overwrite)


def _one_of(option: str, given: str | None, choices: tuple[str, ...]) -> Any:
    if given is not None and given not in choices:
        raise unknown(option, given, choices)
    return given
