"""Results as one self-contained page: what each method costs and what it buys."""

from pathlib import Path

from mdpd_deploy.adapters import TOKENS
from mdpd_deploy.files import write_text
from mdpd_deploy.report.charts import Dot, trade_off_chart
from mdpd_deploy.report.page import document, figure, section, table, tag
from mdpd_deploy.study.results import Results, Row
from mdpd_deploy.study.table import DASH, failures, notes, tables

KINDS = ("MDPD: the side network fades", "more than the backbone at inference",
         "weights of the backbone", "floor")  # fmt: skip


def write_page(path: Path, results: Results) -> None:
    """Write report.html."""
    facts, failed = results.facts, failures(results)
    title = f"{', '.join(results.tasks)} · {len(results.methods)} methods"
    write_text(
        path,
        document(
            f"mdpd compare · {title}",
            tag("header", tag("h1", "What each method buys, and what it costs"),
                tag("p", f"{title} · {facts['backbone']} · {facts['length']}, batch "
                         f"{facts['batch']} · {facts['machine']}")),
            _pictures(results),
            [section(title, table(head, rows)) for title, head, rows in tables(results)],
            _sweeps(results),
            section("Failed", [tag("p", line, class_="wrong") for line in failed]) if failed else None,
            tag("footer", [tag("p", line) for line in notes(results)]),
        ),
    )  # fmt: skip


def kind_of(method: str) -> int:
    """Return a method's kind, 1 … 4, as `KINDS` names them."""
    name = method.partition("+")[0].partition(":")[0]
    if name in ("side", *TOKENS):
        return 2
    return {"mdpd": 1, "probe": 4}.get(name, 3)


def _pictures(results: Results) -> object:
    scores = {label: results.overall(label) for label in results.methods}
    drawn = {label: 100 * score for label, score in scores.items() if score is not None}
    if not drawn:
        return None
    keys = [(KINDS[kind - 1], kind) for kind in sorted({kind_of(label) for label in drawn})]
    peaks = {label: peak for label in drawn if (peak := _peak(results, label)) is not None}
    times = {label: results.latency[label].ratio for label in drawn if label in results.latency}
    unit, scale = ("GB", 1e9) if max(peaks.values(), default=0) >= 1e9 else ("MB", 1e6)
    memory = {label: peak / scale for label, peak in peaks.items()}
    charts = []
    for title, costs, words in (
        ("Training memory", memory, f"peak training memory ({unit}, live tensors)"),
        ("Inference time", times, "time of one inference ÷ that of backbone + head"),
    ):
        dots = [
            Dot(_name(label), cost, drawn[label], _error(results, label), kind_of(label))
            for label, cost in costs.items()
        ]
        if dots:
            what = f"{results.overall_words} (×100)"
            chart = trade_off_chart(dots, x_label=words, y_label=what, log=costs is memory)
            charts.append(figure(title, chart, keys))
    return section(
        "Trade-offs",
        tag("div", charts, class_="trade-offs"),
        note="Up and to the left is better; the dashed line joins what nothing else beats. "
        "Bars are standard deviations over seeds.",
    )


def _name(label: str) -> str:
    """Put a method's own options on lines of their own, without their section."""
    method, *options = label.split("+")
    return "\n".join((method, *(f"+{option.partition('.')[2]}" for option in options)))


def _peak(results: Results, label: str) -> float | None:
    peaks = [row.peak_live_bytes for row in results.of(label) if row.peak_live_bytes]
    return max(peaks) if peaks else None


def _error(results: Results, label: str) -> float:
    rows = results.of(label)
    alone = rows[0].score if len(rows) == 1 else None
    return 100 * alone.sd if alone is not None and alone.sd is not None else 0.0


def _sweeps(results: Results) -> object:
    rows = [row for row in results.rows if len(row.sweep) > 1]
    if not rows:
        return None
    factors = sorted({factor for row in rows for factor in row.sweep}, key=float)
    return section(
        "Learning rates",
        table(
            ["task", "method", *(f"×{factor}" for factor in factors)],
            [[row.task, row.method, *(_swept(row, factor) for factor in factors)] for row in rows],
        ),
        note=f"Validation metric ×100 on the first seed, at factors of {results.facts['rate']}; the "
        "best one was repeated with the other seeds.",
    )


def _swept(row: Row, factor: str) -> object:
    score = row.sweep.get(factor)
    if score is None:
        return "failed" if factor in row.sweep else DASH
    chosen = row.factor is not None and f"{row.factor:g}" == factor
    return tag("b", f"{100 * score:.1f}") if chosen else f"{100 * score:.1f}"
