"""Results as text: one table per task, and one over the tasks of a suite."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mdpd_deploy.artifacts.scores import split_name
from mdpd_deploy.report.page import duration
from mdpd_deploy.report.page import size as byte_size
from mdpd_deploy.study.gaps import Gap
from mdpd_deploy.study.results import Latency, Results, Row, Spread
from mdpd_deploy.study.suites import GROUP_SIZES, group_of

DASH = "–"
HEADINGS: tuple[str, ...] = ("method", "score", "to the best", "side", "trained", "deployed extra", "peak memory", "training",
            "time ÷ backbone", "lr", "seeds")  # fmt: skip


def render(results: Results) -> RenderableType:
    """Return the tables for a terminal, with failures below."""
    parts: list[RenderableType] = []
    for title, headings, rows in tables(results):
        table = Table(title=title, title_justify="left", title_style="bold", box=None,
                      header_style="dim", pad_edge=False)  # fmt: skip
        for index, heading in enumerate(headings):
            table.add_column(
                heading,
                justify="right" if index else "left",
                no_wrap=index > 0,
                overflow="fold",
            )
        for row in rows:
            table.add_row(*row)
        parts += [table, Text()]
    parts += [Text(line, style="yellow") for line in failures(results)]
    parts += [Text(line, style="dim") for line in notes(results)]
    return Group(*parts)


def markdown(results: Results) -> str:
    """Return the same as Markdown."""
    lines: list[str] = []
    for title, headings, rows in tables(results):
        lines += [f"**{title}**", "", _line(headings), _line(["---"] * len(headings))]
        lines += [*(_line(row) for row in rows), ""]
    lines += [f"- {line}" for line in (*failures(results), *notes(results))]
    return "\n".join(lines) + "\n"


def tables(results: Results) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """Return (title, headings, rows) of every table, the one over all tasks first."""
    found: list[tuple[str, Sequence[str], list[list[str]]]] = []
    if len(results.tasks) > 1:
        found.append(_overview(results))
    for task in results.tasks:
        rows = [row for row in results.rows if row.task == task]
        title = f"{task} · {_what(rows)}"
        known = {
            "to the best": any(row.gap for row in rows),
            "side": any(row.side for row in rows),
            "time ÷ backbone": bool(results.latency),
        }
        keep = [heading for heading in HEADINGS if known.get(heading, True)]
        cells = [dict(zip(HEADINGS, _cells(row, results), strict=True)) for row in rows]
        found.append((title, keep, [[cell[heading] for heading in keep] for cell in cells]))
    return found


def failures(results: Results) -> list[str]:
    """Return one line for each trial that failed."""
    return [
        f"failed: {row.task} {row.method} {failure}"
        for row in results.rows
        for failure in row.failures
    ]


def notes(results: Results) -> list[str]:
    """Return what a reader must know to read the tables."""
    facts = results.facts
    rate = f"the learning rate is the best on validation, first seed, {_sweeps(results)}"
    said = [
        f"score ×100, mean ± standard deviation over seeds; {rate}",
        f"{facts['backbone']}, {facts['length']}, batch {facts['batch']}, {facts['machine']}",
    ]
    gaps = [row.gap for row in results.rows if row.gap]
    if gaps:
        over = "seeds and test examples" if all(gap.examples for gap in gaps) else "seeds only"
        said.append(
            "to the best: difference of the same seeds from the best method that has three or more, "
            f"mean and 95 % interval over {over}"
        )
    said += facts["left_out"]
    seen = [row.task for row in results.rows if row.optimistic]
    if seen:
        tasks = ", ".join(dict.fromkeys(seen))
        said.append(
            f"{tasks}: the score is on the data that chose the rate, or the weights kept, so it is "
            "optimistic"
        )
    if results.latency:
        said.append(f"time ÷ backbone: {results.latency_setting}")
        said += [
            f"time of {method}: {latency.verdict}"
            for method, latency in results.latency.items()
            if latency.ci95 is not None
        ]
    return said


def points(spread: Spread | None) -> str:
    """Write a metric in points: 84.3 ± 1.2."""
    if spread is None:
        return DASH
    text = f"{100 * spread.mean:.1f}"
    return text if spread.sd is None else f"{text} ± {100 * spread.sd:.1f}"


def gap(value: Gap | None) -> str:
    """Write a distance from the best method in points, with its interval."""
    if value is None:
        return DASH
    low, high = value.ci95
    return f"{100 * value.mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def times(latency: Latency | None) -> str:
    """Write a ratio of times with its interval."""
    if latency is None:
        return DASH
    if latency.ci95 is None:
        return "1 (same graph)"
    return f"{latency.ratio:.2f} [{latency.ci95[0]:.2f}, {latency.ci95[1]:.2f}]"


def _cells(row: Row, results: Results) -> list[str]:
    if row.score is None:
        why = "failed" if row.failures else "undefined"
        return [row.method, why, *[DASH] * (len(HEADINGS) - 2)]
    return [
        row.method,
        points(row.score),
        gap(row.gap),
        points(row.side),
        f"{row.trained:,}",
        f"{row.deployed_delta:,}",
        byte_size(row.peak_live_bytes) if row.peak_live_bytes else DASH,
        duration(row.train_s) if row.train_s is not None else DASH,
        times(results.latency.get(row.method)),
        f"{row.lr:g}",
        str(len(row.scores)),
    ]


def _sweeps(results: Results) -> str:
    """Say which factors were tried, and for which methods others."""
    of: dict[str, list[str]] = {}
    for row in results.rows:
        factors = ", ".join(f"×{factor}" for factor in row.sweep)
        methods = of.setdefault(factors, [])
        if row.method not in methods:
            methods.append(row.method)
    if len(of) == 1:
        return f"of {next(iter(of))} {results.facts['rate']}"
    parts = [f"{factors} for {', '.join(methods)}" for factors, methods in of.items()]
    return f"of unequal sweeps of {results.facts['rate']}: {'; '.join(parts)}"


def _mean_words(name: str, tasks: Sequence[str]) -> str:
    """Head a column of means; where tasks of the suite are missing, with their number."""
    if name == "mean":
        return "mean of groups"
    count = len([task for task in tasks if group_of(task) == name])
    whole = GROUP_SIZES[name]
    return f"mean {name}" if count == whole else f"mean {name} ({count} of {whole})"


def _overview(results: Results) -> tuple[str, Sequence[str], list[list[str]]]:
    tasks = sorted(results.tasks, key=lambda task: (group_of(task), results.tasks.index(task)))
    groups = list(dict.fromkeys(name for m in results.methods for name in results.means(m)))
    short = [task.partition("/")[2] or task for task in tasks]
    rows = []
    for method in results.methods:
        scores = {row.task: row.score for row in results.of(method)}
        means = results.means(method) if results.complete(method) else {}
        rows.append(
            [method]
            + [_mean(scores.get(task)) for task in tasks]
            + [f"{100 * means[name]:.1f}" if name in means else DASH for name in groups]
        )
    headings = ["method", *short, *(_mean_words(name, tasks) for name in groups)]
    return "all tasks, each on the split that its own table names", headings, rows


def _mean(spread: Spread | None) -> str:
    return DASH if spread is None else f"{100 * spread.mean:.1f}"


def _what(rows: Sequence[Row]) -> str:
    good = next((row for row in rows if row.score is not None), None)
    if good is None:
        return "every trial failed"
    majority = "" if good.majority is None else (
        f"; always the most frequent class {100 * good.majority:.1f}"
    )  # fmt: skip
    return f"{good.metric} on {split_name(good.split, good.examples)}{majority}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
