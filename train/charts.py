"""Small charts as SVG text that takes its colours from the page it is put in.

Drawn with matplotlib's object interface (no pyplot, no window, no global figure). Colours are
written as CSS variables (`var(--ink)`, `var(--series-1)`, …), so one chart serves light and dark
pages. Equal input gives equal text.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import NDArray

SERIES_COLOURS = 4  # the page defines --series-1 … --series-4
MAX_POINTS = 300  # of a line; a longer one is averaged over equal runs of points
MAX_DOTS = 1500  # of a scatter; of more, evenly spaced ones are drawn

# Colours that nothing else uses; `_to_variables` replaces them.
_INK, _MUTED, _LINE = "#010101", "#010102", "#010103"
_SERIES = tuple(f"#01020{n}" for n in range(1, SERIES_COLOURS + 1))
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _LINE: "var(--line)",
    **{colour: f"var(--series-{n})" for n, colour in enumerate(_SERIES, start=1)},
}

_STYLE: Any = {  # matplotlib types the keys of this as one long Literal
    "svg.hashsalt": "mdpd-deploy",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.facecolor": "none",
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 5),
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "lines.linewidth": 1.4,
}


@dataclass(frozen=True)
class Series:
    """One line of a chart: finite points in the order of x, and which page colour it takes."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 1  # 1 … SERIES_COLOURS


def line_chart(series: Sequence[Series], *, log: bool = False) -> str:
    """Draw lines over the training step; `log` scales y where values span a factor of ten."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(3.6, 2.0)
        for line in series:
            x, y = _thin(line.x, line.y)
            marker = "o" if len(x) <= 30 else None
            axes.plot(x, y, color=_SERIES[line.colour - 1], marker=marker, markersize=2.6)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if log and _spans_a_decade([value for line in series for value in line.y]):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=_log_steps(axes), numticks=6))
            axes.minorticks_off()
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
        return _svg(figure)


def scatter_chart(
    x: NDArray[np.floating], y: NDArray[np.floating], *, x_label: str, y_label: str
) -> str:
    """Draw dots [n] against the line of equality, both axes on one scale."""
    keep = np.linspace(0, len(x) - 1, min(len(x), MAX_DOTS)).round().astype(int)
    low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
    room = 0.04 * (high - low) or 1.0
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(3.8, 3.6)
        limits = (low - room, high + room)
        axes.plot(limits, limits, color=_MUTED, linewidth=0.8, linestyle="--")
        axes.scatter(x[keep], y[keep], s=9, color=_SERIES[0], alpha=0.45, linewidths=0)
        axes.set(xlim=limits, ylim=limits, xlabel=x_label, ylabel=y_label, aspect="equal")
        return _svg(figure)


def _figure(width_inches: float, height_inches: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained", facecolor="none")
    axes = figure.add_subplot()
    axes.tick_params(length=0)
    return figure, axes


def _spans_a_decade(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) >= 10 * min(values)


def _log_steps(axes: Axes) -> tuple[float, ...]:
    """Label 1, 2, 5 within a decade when the axis spans less than two, else powers of ten."""
    low, high = axes.get_ylim()
    return (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Average runs of equal length so that at most MAX_POINTS points are left."""
    if len(x) <= MAX_POINTS:
        return list(x), list(y)
    runs = np.array_split(np.arange(len(x)), MAX_POINTS)
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    return [float(xs[run].mean()) for run in runs], [float(ys[run].mean()) for run in runs]


def _svg(figure: Figure) -> str:
    """Return the figure as an `<svg>` element for HTML: no prologue, no metadata, no fixed size."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # unused, and not unique on a page of many charts
    text = re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 aria-hidden="true">', text)
    text = text.replace("xlink:href=", "href=")
    return re.sub(r'style="[^"]*"', _to_variables, text)


def _to_variables(style: re.Match[str]) -> str:
    text = style.group()
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    return re.sub(r"font-family: [^;\"]*; ?", "", text)  # the page's own
