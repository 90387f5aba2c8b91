"""`mdpd demo`: the whole promise on real handwritten digits, offline, in minutes on two cores."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mdpd_deploy.bundle import Bundle
    from mdpd_deploy.run import Run

EPOCHS = 5.0
SECONDS = 8.0  # per latency cell


def command(
    out: Annotated[
        Path | None, typer.Option(help="Folder for all of it; default runs/demo, then demo-2, …")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the 1,000 training digits.")] = EPOCHS,
    seconds: Annotated[float, typer.Option(help="Measuring time per latency cell.")] = SECONDS,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
) -> None:
    """Fine-tune a small vision transformer on handwritten digits, fade, export, and time it."""
    result = demo(out=out, epochs=epochs, seconds=seconds, quiet=json)
    if json:
        from json import dumps

        print(dumps(result))
    else:
        _print(result)


def demo(
    *,
    out: Path | str | None = None,
    epochs: float = EPOCHS,
    seconds: float = SECONDS,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train with MDPD and a linear probe, export to ONNX, measure latency; return the figures.

    Args:
        out: Folder of the run (the bundle and the latency report lie inside it).
        epochs: Passes over the training digits, for both trainings.
        seconds: Measured seconds per latency cell.
        quiet: Nothing on stderr.
    """
    from mdpd_deploy.commands.bench_latency import bench_latency
    from mdpd_deploy.commands.export import export_run
    from mdpd_deploy.commands.train import fit
    from mdpd_deploy.folders import free_path

    def say(text: str) -> None:
        if not quiet:
            typer.echo(text, err=True)

    folder = Path(out) if out is not None else free_path(Path("runs/demo"))
    say("1/4  MDPD: backbone and side network teach each other (1,000 digits, frozen ViT)")
    # The reported digits choose nothing: the last weights count, not the best on them.
    last: dict[str, Any] = {
        "task": "digits",
        "epochs": epochs,
        "quiet": quiet,
        "set": ["train.keep=last"],
    }
    run = fit(out=folder, **last)
    say("2/4  linear probe on the same frozen backbone, for comparison")
    probe = fit(method="probe", lr=1e-2, out=folder / "probe", **last)
    say("3/4  the side network fades: export to ONNX, through every gate")
    bundle = export_run(run.path)
    say("4/4  latency in ONNX Runtime, batch 1: deployed, bare backbone, side-network rivals")
    latency = bench_latency(run.path, runtime=["onnx"], batch=[1], seconds=seconds)
    return _figures(run, probe, bundle, latency)


def _figures(run: "Run", probe: "Run", bundle: "Bundle", latency: dict[str, Any]) -> dict[str, Any]:
    metrics, params = run.summary["metrics"], run.summary["params"]
    return {
        "accuracy": {
            "linear_probe": probe.summary["metrics"]["deployed"]["accuracy"],
            "side_network": metrics["side"]["accuracy"],
            "deployed": metrics["deployed"]["accuracy"],
        },
        "params": params,
        "memory": {k: run.summary["memory"][k] for k in ("peak_live_bytes", "forecast_bytes")},
        "train_s": run.summary["time"]["train_s"],
        "gates": {name: gate["verdict"] for name, gate in bundle.manifest["verification"].items()},
        "latency": [
            {key: ratio[key] for key in ("variant", "median", "ci95", "words")}
            for ratio in latency["ratios"]
        ],
        "run": str(run.path),
        "report": str(run.path / "report.html"),
        "bundle": str(bundle.path),
        "latency_folder": str(latency["folder"]),
    }


def _print(result: dict[str, Any]) -> None:
    from rich.table import Table

    from mdpd_deploy.terminal import Console

    accuracy, params = result["accuracy"], result["params"]
    table = Table(title="handwritten digits · MDPD over UniPT · 797 test digits", show_header=False)
    table.add_row("accuracy, linear probe", f"{accuracy['linear_probe']:.1%}")
    table.add_row("accuracy, side network (thrown away)", f"{accuracy['side_network']:.1%}")
    table.add_row("accuracy, deployed backbone", f"{accuracy['deployed']:.1%}", style="bold")
    share = params["trained"] / params["backbone"]
    table.add_row("trained parameters", f"{params['trained']:,} ({share:.1%} of the backbone)")
    table.add_row("kept for deployment", f"{params['deployed_delta']:,} (norms and head)")
    table.add_row("peak training memory", f"{result['memory']['peak_live_bytes'] / 1e6:.0f} MB")
    table.add_row("training time", f"{result['train_s']:.0f} s")
    passed = sum(verdict == "passed" for verdict in result["gates"].values())
    table.add_row("export gates", f"{passed} of {len(result['gates'])} passed")
    for ratio in result["latency"]:
        low, high = ratio["ci95"]
        table.add_row(
            f"time of {ratio['variant']} ÷ deployed",
            f"{ratio['median']:.3f} [{low:.3f}, {high:.3f}]  {ratio['words']}",
        )
    console = Console()
    console.print(table)
    for name in ("report", "bundle"):
        console.print(f"{name:8}{result[name]}", highlight=False, soft_wrap=True)
    console.print(f"latency {result['latency_folder']}", highlight=False, soft_wrap=True)
    console.print(
        "\nThe same on your own data, an image folder with train/CLASS/*.jpg\n"
        "(or a table: add --text COLUMN --label COLUMN --backbone hf:NAME):\n"
        "  mdpd train --task classify --data FOLDER\n"
        "  mdpd export --fmt onnx\n"
        "  mdpd bench-latency",
        highlight=False, markup=False,
    )  # fmt: skip
