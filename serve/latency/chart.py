"""The benchmark as a picture: how many times longer each model takes than the deployed one.

Drawn on a figure of its own (no pyplot, so no global state and no display).
"""

from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from mdpd_deploy.serve.latency.estimate import factor, milliseconds
from mdpd_deploy.serve.latency.report import CONTROL, DEPLOYED, LatencyReport, RatioRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#0b6e4f", "#d1495b", "#3066be", "#e08d00", "#7b4fa3", "#2a9d9d")  # in rival order
_GREY = "#8a8a8a"  # the A/A control
_INK = "#222222"
_DPI = 200
_BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9.5}
_RUNTIMES = {
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
    "torch": "PyTorch eager",
    "trt": "TensorRT",
}
_TITLE = "Time of one call, relative to the deployed model"
_NARROWEST = 7.4  # inches: the title has room
_FARTHEST = 2.0  # times the largest ratio: an interval that reaches farther is cut there


def write_chart(report: LatencyReport, folder: Path) -> list[Path]:
    """Write `latency.svg` and `latency.png` into a folder and return their paths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = draw(report)
    FigureCanvasAgg(figure)
    paths = [folder / "latency.svg", folder / "latency.png"]
    figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], dpi=_DPI)
    return paths


def draw(report: LatencyReport) -> "Figure":
    """Return the figure: one panel per runtime, one line per model and batch, 95 % intervals."""
    from matplotlib.figure import Figure

    runtimes = report.runtimes
    height = 2.0 + 0.32 * max(_lines(report.ratios_of(runtime)) for runtime in runtimes)
    width = max(_NARROWEST, 5.2 * len(runtimes) + 1.6)
    caption = _caption(report, int(14 * width))  # letters of 9 points that fit beside each other
    height += 0.16 * (caption.count("\n") - 1)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, len(runtimes), sharex=True, sharey=True, squeeze=False)[0]
    left, right, room = _limits(report)
    for axis, runtime in zip(axes, runtimes, strict=True):
        _panel(axis, report, runtime, right)
    axes[0].set_xlim(left, right + room)  # shared by all panels
    at: dict[str, Any] = {"x": 0.012, "ha": "left"}
    figure.suptitle(_TITLE, **at, fontsize=15, fontweight="bold", color=_INK)
    figure.supxlabel(caption, **at, fontsize=9, color="#555555")
    return figure


def _limits(report: LatencyReport) -> tuple[float, float, float]:
    """Where the axis begins, where intervals end at the latest, and the room for numbers after it.

    One interval that is far wider than all ratios would squeeze the others to a line, so it is cut.
    """
    left = min(1 - 2 * report.margin, *(ratio.ci95[0] for ratio in report.ratios))
    right = max(1 + 2 * report.margin, *(ratio.ci95[1] for ratio in report.ratios))
    farthest = _FARTHEST * max(1.0, *(ratio.median for ratio in report.ratios))
    room = (0.34 if farthest < right else 0.16) * (min(right, farthest) - left)
    right = min(right, farthest)
    return left - 0.04 * (right - left), right, room


def _caption(report: LatencyReport, letters: int) -> str:
    setting = f"{report.source['backbone']} · {report.source['task']} · {_machine(report)}"
    words = [
        setting,
        f"median of paired rounds, mean over {report.settings['openings']} openings, 95 % interval",
        "right of 1×: the deployed model is faster",
        "grey band: counted as the same speed",
    ]
    if report.untrained:
        words.append("*untrained weights, speed only")
    lines = [" · ".join(words), *report.warnings]
    return "\n".join(fill(line, letters) for line in lines)


def _machine(report: LatencyReport) -> str:
    if report.settings["device"] == "cuda" and report.machine.get("gpu"):
        return str(report.machine["gpu"][0]["name"])
    count = report.settings["threads"]
    return f"{report.machine.get('cpu', 'CPU')}, {count} thread{'s' * (count > 1)}"


def _lines(ratios: list[RatioRow]) -> int:
    return len(ratios) + len({ratio.batch for ratio in ratios})


def _panel(axis: "Axes", report: LatencyReport, runtime: str, right: float) -> None:
    ratios, colours = report.ratios_of(runtime), _colours(report)
    axis.axvspan(1 - report.margin, 1 + report.margin, color="#ececec", zorder=0, lw=0)
    axis.axvline(1, color=_INK, lw=1, zorder=1)
    labels: list[str] = []
    for batch in dict.fromkeys(ratio.batch for ratio in ratios):
        _reference(axis, report, runtime, batch, len(labels))
        labels.append(f"batch {batch}")
        for ratio in (ratio for ratio in ratios if ratio.batch == batch):
            _interval(axis, ratio, len(labels), colours[ratio.variant], right)
            labels.append(ratio.variant + "*" * (ratio.variant in report.untrained))
    device, precision = ratios[0].device.upper(), ratios[0].precision.upper()
    axis.set_title(
        f"{_RUNTIMES.get(runtime, runtime)} · {device} · {precision}", loc="left", fontsize=11
    )
    _finish(axis, labels)


def _colours(report: LatencyReport) -> dict[str, str]:
    names = [note.name for note in report.variants if note.name not in (DEPLOYED, CONTROL)]
    return {CONTROL: _GREY, **dict(zip(names, cycle(_COLOURS), strict=False))}


def _reference(axis: "Axes", report: LatencyReport, runtime: str, batch: int, place: float) -> None:
    """Write beside the line at 1 what 1 stands for."""
    key = (runtime, batch, DEPLOYED)
    row = next(r for r in report.rows if (r.runtime, r.batch, r.variant) == key)
    beside = {"xytext": (7, 0), **_BESIDE}
    axis.annotate(f"deployed: {milliseconds(row.p50_ms)} ms", (1, place), **beside, color="#444444")


def _interval(axis: "Axes", ratio: RatioRow, place: float, colour: str, right: float) -> None:
    from matplotlib.patheffects import withStroke

    low, high = ratio.ci95
    said, end = factor(ratio.median), min(high, right)
    if end < high:
        said = f"{said}, to {factor(high)}"
        axis.plot([end], [place], ">", color=colour, ms=7)
    axis.plot([low, end], [place, place], color=colour, lw=3.2, alpha=0.45, solid_capstyle="round")
    axis.plot([ratio.median], [place], "o", color=colour, ms=7)
    white = [withStroke(linewidth=2.5, foreground="white")]
    beside = {"xytext": (8, 0), **_BESIDE}
    axis.annotate(said, (end, place), **beside, color=colour, path_effects=white)


def _finish(axis: "Axes", labels: list[str]) -> None:
    axis.set_yticks(range(len(labels)), labels, fontsize=10)
    for text in axis.get_yticklabels():
        if text.get_text().startswith("batch "):
            text.set_fontweight("bold")
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.xaxis.set_major_formatter("{x:g}×")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#dddddd", lw=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
