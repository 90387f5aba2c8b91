"""Pictures of a load test: latency against offered load, memory over time."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLOURS = {"local": "#0b6e4f", "ray": "#3066be", "litserve": "#e08e45", "mosec": "#7b4fa3"}
_OTHER, _INK, _MUTED = "#8a3b5c", "#222222", "#555555"
_STYLES = {"p50_ms": ("-", 1.2, 0.55), "p95_ms": ("-", 2.4, 1.0), "p99_ms": (":", 1.6, 0.9)}
_DPI = 160


def write_charts(report: dict[str, Any], out: Path) -> list[Path]:
    """Write OUT.svg and OUT.png of the ramp, and OUT-memory.* of the soak; return the paths."""
    written = []
    for suffix, figure in (("", _draw_ramp(report)), ("-memory", _draw_soak(report))):
        if figure is None:
            continue
        FigureCanvasAgg(figure)
        for ending in (".svg", ".png"):
            path = out.with_name(out.name + suffix + ending)
            figure.savefig(path, dpi=_DPI, metadata={"Date": None} if ending == ".svg" else None)
            written.append(path)
    return written


def _draw_ramp(report: dict[str, Any]) -> Figure | None:
    if "ramp" not in report:
        return None
    figure, axes = _figure("Latency against offered load", _caption(report))
    highest = 0.0
    for name, found in report["ramp"].items():
        colour = _COLOURS.get(name, _OTHER)
        levels = [level for level in found["levels"] if level["p50_ms"] is not None]
        for key, (line, width, alpha) in _STYLES.items():
            axes.plot(
                [level["rate"] for level in levels], [level[key] for level in levels],
                line, marker="o", ms=3, lw=width, color=colour, alpha=alpha,
                label=f"{_words(name)}, {key.removesuffix('_ms')}",
            )  # fmt: skip
        for level in levels:
            highest = max(highest, level["p99_ms"])
            if level["errors"]:
                axes.plot(level["rate"], level["p99_ms"], "x", ms=9, mew=2, color="#d1495b")
        if found["knee_per_s"]:
            axes.axvline(found["knee_per_s"], color=colour, lw=1, ls="--", alpha=0.6)
            axes.annotate(
                f"knee {found['knee_per_s']:.0f}/s", (found["knee_per_s"], 1), rotation=90,
                xycoords=("data", "axes fraction"), xytext=(3, -4), textcoords="offset points",
                va="top", fontsize=8.5, color=colour,
            )  # fmt: skip
    bare = report["overhead"]["bare_p50_ms"]
    axes.axhline(bare, color="#8a8a8a", lw=1, label=f"bare ONNX Runtime call, p50 {bare:g} ms")
    axes.set(xlabel="requests per second offered", ylabel="latency from when it was due, ms")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
    return figure


def _draw_soak(report: dict[str, Any]) -> Figure | None:
    if "soak" not in report:
        return None
    found = report["soak"]
    words = f"{found['rate']:.0f} requests/s, {found['requests']} in all, {found['errors']} errors"
    figure, axes = _figure("Memory of the server under load", f"{words} · {_caption(report)}")
    minutes = [0.5 * (index + 1) for index in range(len(found["lines"]))]
    axes.plot(minutes, [line["memory_bytes"] / 1e6 for line in found["lines"]], color="#0b6e4f")
    axes.set(xlabel="minutes", ylabel="resident memory, MB")
    axes.set_ylim(bottom=0)
    return figure


def _figure(title: str, caption: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(9.2, 4.6), layout="constrained")
    axes = figure.subplots()
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold", color=_INK)
    figure.supxlabel(caption, x=0.012, ha="left", fontsize=8.5, color=_MUTED)
    axes.grid(color="#e4e4e4", lw=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _caption(report: dict[str, Any]) -> str:
    settings, machine = report["settings"], report["machine"]
    return (
        f"{report['backbone'].get('name', '')} · {settings['rows']} row per request · "
        f"{settings['threads']} threads · {machine['cpu']}, {machine['cores']} cores, client included"
    )


def _words(name: str) -> str:
    return {
        "local": "mdpd serve",
        "ray": "on Ray Serve",
        "litserve": "LitServe",
        "mosec": "Mosec",
    }.get(name, name)
