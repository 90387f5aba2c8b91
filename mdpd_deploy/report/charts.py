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
CROWD = 10  # dots with names, from which a chart is drawn larger
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


@dataclass(frozen=True)
class Dot:
    """One named point of a trade-off: x is a cost, y what it buys, with its ± (0 for none).

    The name may have several lines.
    """

    name: str
    x: float
    y: float
    error: float = 0.0
    colour: int = 1


def trade_off_chart(dots: Sequence[Dot], *, x_label: str, y_label: str, log: bool = False) -> str:
    """Draw dots with their names and the line of those that nothing beats in both directions."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(6.6, 5.0) if len(dots) > CROWD else _figure(5.4, 3.7)
        front = pareto_front(dots)
        axes.plot(
            [dot.x for dot in front], [dot.y for dot in front],
            color=_MUTED, linewidth=0.9, linestyle="--", zorder=1,
        )  # fmt: skip
        for dot in dots:
            colour = _SERIES[dot.colour - 1]
            if dot.error:
                axes.errorbar(dot.x, dot.y, yerr=dot.error, color=colour, linewidth=1, zorder=2)
            axes.scatter([dot.x], [dot.y], s=26, color=colour, linewidths=0, zorder=3)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
            axes.minorticks_off()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.margins(0.14, 0.12)
        figure.canvas.draw()
        _name_dots(axes, dots)
        return _svg(figure)


def pareto_front(dots: Sequence[Dot]) -> list[Dot]:
    """Return the dots that no other beats in cost and in what it buys, cheapest first."""
    front: list[Dot] = []
    for dot in sorted(dots, key=lambda dot: (dot.x, -dot.y)):
        if not front or dot.y > front[-1].y:
            front.append(dot)
    return front


_SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_PLACES = [(reach, *side) for reach in (6, 14, 24, 36) for side in _SIDES]  # of a name, in points
_HELD = {1: ("left", 0.0), 0: ("center", 0.5), -1: ("right", 1.0)}  # at the end near its dot


def _name_dots(axes: Axes, dots: Sequence[Dot]) -> None:
    """Write each name beside its dot, in its colour, where it covers no dot and no other name if that can be."""
    scale = axes.figure.dpi / 72
    spots = [tuple(axes.transData.transform((dot.x, dot.y))) for dot in dots]
    near = 4 * scale
    taken = [(x - near, y - near, x + near, y + near) for x, y in spots]
    frame = axes.get_window_extent()

    def cost(box: tuple[float, ...]) -> float:
        outside = box[0] < frame.x0 or box[2] > frame.x1 or box[1] < frame.y0 or box[3] > frame.y1
        return sum(_overlap(box, other) for other in taken) + 1e6 * outside

    for dot, (x, y) in sorted(zip(dots, spots, strict=True), key=lambda pair: pair[1]):
        lines = dot.name.split("\n")
        width, height = 5.0 * scale * max(map(len, lines)), 9.5 * scale * len(lines)
        boxes = []
        for reach, side, rise in _PLACES:
            left = x + side * (reach * scale + width / 2) - width / 2
            low = y + rise * (reach * scale + height / 2) - height / 2
            boxes.append((left, low, left + width, low + height))
        costs = [cost(box) + place[0] for box, place in zip(boxes, _PLACES, strict=True)]
        best = costs.index(min(costs))
        box = boxes[best]
        taken.append(box)
        align, end = _HELD[_PLACES[best][1]]  # a reader's font may be wider than the one assumed
        place = (box[0] + end * width, (box[1] + box[3]) / 2)
        at_x, at_y = axes.transData.inverted().transform(place)
        colour = _SERIES[dot.colour - 1]
        axes.annotate(
            dot.name, (dot.x, dot.y), xytext=(float(at_x), float(at_y)),
            ha=align, va="center", color=colour,
            arrowprops=dict(arrowstyle="-", color=colour, linewidth=0.5,
                            relpos=(end, 0.5), shrinkA=0, shrinkB=2),
        )  # fmt: skip


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0


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
