"""`mdpd serve`: bundles behind HTTP. No torch is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, Unpack

import typer

from mdpd_deploy.commands.options import RuntimeWord
from mdpd_deploy.commands.verb import REPEATED, takes
from mdpd_deploy.errors import UserError, unknown

if TYPE_CHECKING:
    from mdpd_deploy.serve.ray_app import Scaling

ENGINES = ("local", "ray")


class CoreWords(TypedDict, total=False):
    """Fields of `CoreOptions` as a user gives them."""

    threads: Annotated[
        int, typer.Option(min=1, help="Threads in one operator; default the CPU quota.")
    ]
    max_batch: Annotated[
        int, typer.Option(min=1, help="Most rows in one run; default the bundle's maximum.")
    ]
    max_delay_ms: Annotated[
        float, typer.Option(min=0, help="How long an idle device waits for more rows.")
    ]
    queue: Annotated[
        int, typer.Option(min=1, help="Most rows of a model in progress; more get a 503.")
    ]
    timeout_s: Annotated[
        float, typer.Option(min=0.001, help="A request's time limit; later is a 504.")
    ]
    drain_s: Annotated[
        int, typer.Option(min=1, help="After SIGTERM, time for requests in progress.")
    ]
    key: Annotated[Path, typer.Option(help="Public key, PEM, that must have signed every bundle.")]


def serve(
    bundles: Annotated[
        list[str],
        typer.Argument(
            metavar="BUNDLE...", help="Folders of `mdpd export`, or NAME=FOLDER for another name."
        ),
    ],
    *,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. Default: cpu; cuda with --runtime trt.")
    ] = None,
    runtime: RuntimeWord = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(min=1, max=40_000_000, help="Largest picture; default 25 million pixels."),
    ] = None,
    allow_host: Annotated[
        Sequence[str],
        typer.Option(
            metavar="NAME",
            help="A name that clients call this server by; repeatable. Addresses and localhost "
            "always may, *.NAME is all below one.",
        ),
        REPEATED,
    ] = (),
    engine: Annotated[
        str, typer.Option(help="local: this process; ray: replicas on a Ray cluster.")
    ] = "local",
    replicas: Annotated[
        str | None,
        typer.Option(metavar="N|MIN-MAX", help="Of --engine ray; default 1, a range autoscales."),
    ] = None,
    **words: Unpack[CoreWords],
) -> None:
    """Serve bundles over HTTP: the Open Inference Protocol, raw texts and pictures, a page."""
    if engine not in ENGINES:
        raise unknown("--engine", engine, ENGINES)
    if replicas is not None and engine != "ray":
        raise UserError("--replicas belongs to --engine ray: add that, or leave it out.")
    if "threads" in words and runtime == "trt" and engine == "local":
        raise UserError(
            "--threads belongs to --runtime onnx and openvino: an engine runs on the GPU; leave it "
            "out."
        )
    from mdpd_deploy.serve.core.options import CoreOptions, Limits, usual_device
    from mdpd_deploy.serve.web.run import serve_bundles

    named = name_bundles(bundles)
    options = CoreOptions(
        device=device or usual_device(runtime),
        runtime=runtime,
        allow_hosts=tuple(allow_host),
        limits=Limits() if max_pixels is None else Limits(pixels=max_pixels),
        **words,
    )

    def say(url: str) -> None:
        typer.echo(f"serving {', '.join(named)} at {url}")

    if engine == "local":
        serve_bundles(named, options, host=host, port=port, on_ready=say)
        return
    from mdpd_deploy.serve.ray_app import serve_on_ray

    scaling = read_scaling(replicas or "1")
    serve_on_ray(named, options, scaling, host=host, port=port, on_ready=say)


@takes(serve, words_last=True)
def command(**asked: Any) -> None:
    serve(**asked)


def read_scaling(words: str) -> Scaling:
    """Return `N` or `MIN-MAX` replicas; `UserError` for anything else."""
    from mdpd_deploy.serve.ray_app import Scaling

    found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", words)
    if not found:
        raise UserError(f"--replicas {words}: give a number, or a range as 1-8.")
    low = int(found[1])
    return Scaling(min_replicas=low, max_replicas=int(found[2] or low))


def name_bundles(words: list[str]) -> dict[str, Path]:
    """Return folders by the names that requests use: `NAME=FOLDER`, or by `usual_names`.

    Raises:
        UserError: For a name that a URL cannot hold as it is, or one that is given twice.
    """
    pairs = [word.partition("=") for word in words]
    plain = [
        word for word, (_, equals, _) in zip(words, pairs, strict=True)
        if not equals or Path(word).exists()
    ]  # fmt: skip
    usual = dict(zip(plain, usual_names([Path(word) for word in plain]), strict=True))
    named: dict[str, Path] = {}
    for word, (given, _, behind) in zip(words, pairs, strict=True):
        name, folder = (usual[word], word) if word in usual else (given, behind)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise UserError(
                f"{word}: {name!r} cannot name a model in a URL; give it one of letters, digits, "
                f"'.', '_' and '-': NAME={folder}"
            )
        if name in named:
            raise UserError(
                f"two bundles would be served as {name!r} ({named[name]} and {folder}): "
                "name one of them, NAME=FOLDER."
            )
        named[name] = Path(folder)
    return named


def usual_names(folders: Sequence[Path]) -> list[str]:
    """Return the name of each bundle's run, or of its folder where it does not lie in one.

    Several bundles of one run are told apart by their folders: `RUN-onnx-fp32`, `RUN-onnx-int8-cpu`.
    """
    places = [folder.resolve() for folder in folders]
    runs = [place.parents[1].name if place.parent.name == "bundles" else "" for place in places]
    return [
        place.name if not run else run if runs.count(run) == 1 else f"{run}-{place.name}"
        for place, run in zip(places, runs, strict=True)
    ]
