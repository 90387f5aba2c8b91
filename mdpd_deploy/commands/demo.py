"""`mdpd demo`: the whole promise on real handwritten digits, offline, in minutes on two cores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mdpd_deploy.commands.verb import Json, print_json, takes

if TYPE_CHECKING:
    from mdpd_deploy.artifacts.bundle import Bundle
    from mdpd_deploy.artifacts.run import Run

PAGE = "demo.html"
TITLE = "handwritten digits · MDPD over UniPT · validation, 797 digits, which choose nothing"
DEPLOYED = "accuracy, deployed backbone"


def demo(
    *,
    out: Annotated[
        Path | None, typer.Option(help="Folder for all of it; default runs/demo, then demo-2, …")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the 1,000 training digits.")] = 5.0,
    seconds: Annotated[float, typer.Option(help="Measuring time per latency cell.")] = 8.0,
    quiet: bool = False,
) -> dict[str, Any]:
    """Fine-tune a small vision transformer on handwritten digits, fade, export, and time it.

    Args:
        quiet: Nothing on stderr.
    """
    from mdpd_deploy.artifacts.folders import free_path
    from mdpd_deploy.commands.bench_latency import bench_latency
    from mdpd_deploy.commands.export import export_run
    from mdpd_deploy.commands.train import fit

    def say(text: str) -> None:
        if not quiet:
            typer.echo(text, err=True)

    folder = Path(out) if out is not None else free_path(Path("runs/demo"))
    say("1/5  MDPD: backbone and side network teach each other (1,000 digits, frozen ViT)")
    # The reported digits choose nothing: the last weights count, not the best on them.
    last: dict[str, Any] = {"epochs": epochs, "quiet": quiet, "set": ["train.keep=last"]}
    run = fit(task="digits", out=folder, **last)
    say("2/5  linear probe on the same frozen backbone, for comparison")
    probe = fit(task="digits", method="probe", lr=1e-2, out=folder / "probe", **last)
    say("3/5  norms and head trained directly, without a side network, for comparison")
    norms = fit(task="digits", method="norms", out=folder / "norms", **last)
    say("4/5  the side network fades: export to ONNX, through every gate")
    bundle = export_run(run.path)
    say("5/5  latency in ONNX Runtime, batch 1: deployed, bare backbone, side-network rivals")
    latency = bench_latency(run.path, runtime=["onnx"], batch=[1], seconds=seconds)
    figures = _figures(run, probe, norms, bundle, latency)
    _write_page(folder / PAGE, figures)
    return {**figures, "page": str(folder / PAGE)}


def _figures(
    run: Run, probe: Run, norms: Run, bundle: Bundle, latency: dict[str, Any]
) -> dict[str, Any]:
    metrics, params = run.summary["metrics"], run.summary["params"]
    return {
        "accuracy": {
            "linear_probe": probe.summary["metrics"]["deployed"]["accuracy"],
            "norms": norms.summary["metrics"]["deployed"]["accuracy"],
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
        "warnings": latency["warnings"],
        "run": str(run.path),
        "report": str(run.path / "report.html"),
        "bundle": str(bundle.path),
        "latency_folder": str(latency["folder"]),
    }


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what was found as name and value; on the digits that chose nothing."""
    accuracy, params = result["accuracy"], result["params"]
    share = params["trained"] / params["backbone"]
    passed = sum(verdict == "passed" for verdict in result["gates"].values())
    rows = [
        ("accuracy, linear probe", f"{accuracy['linear_probe']:.1%}"),
        ("accuracy, norms and head trained directly", f"{accuracy['norms']:.1%}"),
        ("accuracy, side network (thrown away)", f"{accuracy['side_network']:.1%}"),
        (DEPLOYED, f"{accuracy['deployed']:.1%}"),
        ("trained parameters", f"{params['trained']:,} ({share:.1%} of the backbone)"),
        ("kept for deployment", f"{params['deployed_delta']:,} (norms and head)"),
        ("peak training memory", f"{result['memory']['peak_live_bytes'] / 1e6:.0f} MB"),
        ("training time", f"{result['train_s']:.0f} s"),
        ("export gates", f"{passed} of {len(result['gates'])} passed"),
    ]
    for ratio in result["latency"]:
        low, high = ratio["ci95"]
        value = f"{ratio['median']:.3f} [{low:.3f}, {high:.3f}]  {ratio['words']}"
        rows.append((f"time of {ratio['variant']} ÷ deployed", value))
    return rows


def _write_page(path: Path, result: dict[str, Any]) -> None:
    """Write what was found as a page beside the run's own report."""
    from mdpd_deploy.files import write_text
    from mdpd_deploy.report.page import document, section, table, tag

    picture = f"{Path(result['latency_folder']).name}/latency.svg"
    links = (("report.html", "the run's report"), (picture, "latency as a picture"))
    write_text(
        path,
        document(
            TITLE,
            tag("header", tag("h1", TITLE), [tag("p", line) for line in result["warnings"]]),
            section("What was found", table(["", ""], _rows(result))),
            section("More", [tag("p", tag("a", words, href=link)) for link, words in links]),
        ),
    )


def _print(result: dict[str, Any]) -> None:
    from mdpd_deploy.report.terminal import print_table

    console = print_table(TITLE, ("", ""), _rows(result), bold={DEPLOYED})
    for line in result["warnings"]:
        console.print(line, style="yellow")
    for name in ("page", "report", "bundle", "latency_folder"):
        console.print(f"{name.removesuffix('_folder'):8}{result[name]}")
    console.print(
        "\nThe same on your own data, an image folder with train/CLASS/*.jpg\n"
        "(or a table: --text COLUMN --label COLUMN --backbone hf:NAME):\n"
        "  mdpd train --task classify --data FOLDER --backbone timm:vit_base_patch16_224\n"
        "  mdpd export --fmt onnx\n"
        "  mdpd bench-latency"
    )


@takes(demo)
def command(json: Json = False, **asked: Any) -> None:
    result = demo(**asked, quiet=json)
    if json:
        print_json(result)
    else:
        _print(result)
