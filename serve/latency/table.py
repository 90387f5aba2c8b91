"""The benchmark as people read it: one table per cell group, then what may be claimed."""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mdpd_deploy.serve.latency.estimate import Ratio, factor, milliseconds
from mdpd_deploy.serve.latency.report import LatencyReport, RatioRow, Row

WIDEST = 100  # times; where an interval reaches that far, its end says nothing more
# A verdict speaks of the variant, the table of the deployed model.
_DEPLOYED_IS: dict[str, str] = {
    "same": "as fast",
    "slower": "faster",
    "faster": "slower",
    "cannot-tell": "unclear",
}


def render(report: LatencyReport) -> RenderableType:
    """Return the report for a rich console: a table per runtime, identity, claims."""
    parts: list[RenderableType] = []
    for runtime in report.runtimes:
        parts += [_table(report, runtime), *_remarks(report, runtime), Text()]
    parts += [Text(line) for line in _closing(report)]
    parts += [Text(line, style="yellow") for line in report.warnings]
    return Group(*parts)


def _table(report: LatencyReport, runtime: str) -> Table:
    rows = [row for row in report.rows if row.runtime == runtime]
    count = report.settings["threads"]
    threads = f", {count} thread{'s' * (count > 1)}" if rows[0].device == "cpu" else ""
    table = Table(
        title=f"{runtime} on {rows[0].device}{threads}, {rows[0].precision}, input {rows[0].size}",
        title_justify="left",
        title_style="bold",
        box=None,
        header_style="dim",
        collapse_padding=True,
        pad_edge=False,
    )
    p99 = any(row.p99_ms is not None for row in rows)
    times = ["p50 ms", "p95 ms", *(["p99 ms"] if p99 else []), "items/s", "× time (95 %)"]
    counts = ["nodes" if runtime in ("onnx", "openvino") else "ops", "FLOPs"]
    for heading in ["model", *times, *counts, "deployed"]:
        left = heading in ("model", "deployed")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    batch = 0
    for row in rows:
        if row.batch != batch:
            batch = row.batch
            table.add_row(f"batch {batch}", style="bold")
        table.add_row(*_cells(report, row, p99=p99))
    return table


def _cells(report: LatencyReport, row: Row, *, p99: bool) -> Iterator[str]:
    yield f"{row.variant}{'*' * (row.variant in report.untrained)}"
    yield milliseconds(row.p50_ms)
    yield milliseconds(row.p95_ms)
    if p99:
        yield "" if row.p99_ms is None else milliseconds(row.p99_ms)
    yield f"{row.items_per_s:,.0f}"
    own = (
        r for r in report.ratios_of(row.runtime) if (r.batch, r.variant) == (row.batch, row.variant)
    )
    ratio = next(own, None)
    if ratio is None:  # the deployed model's own row
        return
    low, high = ratio.ci95
    yield f"{factor(ratio.median)} {low:.2f}-{f'{high:.2f}' if high < WIDEST else f'{WIDEST}+'}"
    yield "" if ratio.nodes_ratio is None else factor(ratio.nodes_ratio)
    yield "" if ratio.flops_ratio is None else factor(ratio.flops_ratio)
    yield "control" if ratio.control else _DEPLOYED_IS[ratio.verdict]


def _remarks(report: LatencyReport, runtime: str) -> Iterator[Text]:
    cells = [cell for cell in report.cells if cell.runtime == runtime]
    reached = ", ".join(f"{c.rounds} rounds in {c.seconds:.1f} s at batch {c.batch}" for c in cells)
    times = report.settings["openings"]
    opened = f", each model opened {times} times" if times > 1 else ""
    yield Text(f"measured: {reached}{opened}", style="dim")
    controls = [ratio for ratio in report.ratios_of(runtime) if ratio.control]
    spreads = ", ".join(f"±{_spread_of(r):.1%} at batch {r.batch}" for r in controls)
    yield Text(f"scatter of this machine (A/A control): {spreads}", style="dim")
    if short := [str(cell.batch) for cell in cells if not cell.reached]:
        words = "below 100 rounds or 10 s; raise --seconds for a firmer result"
        yield Text(f"batch {', '.join(short)}: {words}", style="yellow")
    if rows := [r for r in report.rows if r.runtime == runtime and not r.warmup["settled"]]:
        names = ", ".join(f"{row.variant} at batch {row.batch}" for row in rows)
        yield Text(f"times still drifted after the longest warm-up: {names}", style="yellow")
    for cell in cells:
        if cell.copies is not None:
            there, back = cell.copies["host_to_device_ms"], cell.copies["device_to_host_ms"]
            yield Text(
                f"batch {cell.batch}: copies not in these times: {there:.3f} ms in, {back:.3f} ms out",
                style="dim",
            )


def _closing(report: LatencyReport) -> Iterator[str]:
    identity = report.identity
    if identity is not None:
        if identity.identical:
            yield (
                f"identity: the deployed graph and the bare backbone's are the same {identity.nodes} "
                "nodes; only weight values differ"
            )
        else:
            yield f"identity: the deployed graph differs from the bare one ({identity.differences[0]})"
    if report.untrained:
        yield "* untrained weights: only its speed means something"
    yield "× = model / deployed: above 1 in time, the deployed model is faster"
    yield from report.claims


def _spread_of(control: RatioRow) -> float:
    return Ratio(control.median, *control.ci95, control.rounds).spread - 1
