"""What `mdpd export` prints of a bundle: its gates, its receipt, and what `auto` tried."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdpd_deploy.artifacts.bundle import Bundle
    from mdpd_deploy.report.terminal import Console


def print_bundle(bundle: Bundle) -> None:
    """Print the verdicts of a fresh bundle's gates, its receipt and its size."""
    from rich.table import Table

    from mdpd_deploy.report.terminal import Console

    manifest = bundle.manifest
    table = Table(title=f"verified bundle: {manifest['task']}, {manifest['method']}")
    headings = ("gate", "verdict", "what was seen")
    for heading in ("task", *headings) if bundle.mixed else headings:
        table.add_column(heading, overflow="fold")
    for task in bundle.tasks:
        for gate, found in task.facts["verification"].items():
            name = [task.name] if bundle.mixed else []
            table.add_row(*name, gate, found["verdict"], found["note"])
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    _print_precision(console, manifest)
    console.print(
        f"{bundle.graph()['nodes']} nodes, {size / 1e6:.1f} MB in {len(manifest['files'])} files"
    )
    if bundle.mixed:
        deltas = [
            f"{task.name} {manifest['files'][f'tasks/{task.name}/delta.safetensors']['bytes'] / 1e3:.0f}"
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


def _print_precision(console: Console, manifest: dict[str, Any]) -> None:
    """Print the receipt, and what `auto` tried."""
    from rich.table import Table

    receipt = manifest["receipt"]
    weights = ", ".join(f"{n / 1e6:.1f} MB {kind}" for kind, n in receipt["weight_bytes"].items())
    nodes = ", ".join(f"{n} {kind}" for kind, n in receipt["compute_nodes"].items())
    islands = receipt["fp32_islands"]
    console.print(f"{manifest['precision']} ({manifest['conversion']}): weights {weights}")
    console.print(
        f"compute nodes: {nodes}"
        + (f"; left in FP32: {_by_operator(islands)} (named in parity.json)" if islands else "")
    )
    if "precision_trials" not in manifest:
        return
    tried = manifest["precision_trials"]
    table = Table(title="precisions, timed in turn against fp32")
    for heading in ("precision", "gates", "MB", "time / fp32 [95 %]", "p50 ms", "metric drop"):
        table.add_column(heading, overflow="fold")
    for row in tried["trials"]:
        table.add_row(row["precision"], *_trial_cells(row))
    console.print(table)
    console.print(tried["recommendation"])


def _trial_cells(row: dict[str, Any]) -> tuple[str, ...]:
    if row["verdict"] == "failed":
        return (f"failed: {row['reason']}", "", "", "", "")
    low, high = row["ci95"]
    drop = row["drop"]
    points = f"{100 * drop['value']:+.2f} points" if drop else ""
    ratio = f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}]"
    return (row["verdict"], f"{row['bytes'] / 1e6:.1f}", ratio, f"{row['p50_ms']:.3f}", points)


def _by_operator(islands: list[str]) -> str:
    counts = Counter(name.partition(" ")[0] for name in islands)
    return ", ".join(f"{count} {operator}" for operator, count in counts.most_common())
