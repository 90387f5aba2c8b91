"""The run report: one self-contained HTML page that says what a run did.

It needs no network, runs no script and escapes every text that came from a user. Equal input
gives an equal page. The looks are in `page.py`, curves in `charts.py`, everything about single
predictions in `predictions.py`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mdpd_deploy.artifacts.scores import scores_of
from mdpd_deploy.files import write_text
from mdpd_deploy.report.charts import SERIES_COLOURS, Series, line_chart
from mdpd_deploy.report.page import (
    Html,
    count,
    document,
    duration,
    figure,
    percent,
    section,
    size,
    table,
    tag,
)
from mdpd_deploy.report.predictions import (
    Predictions,
    Sample,
    comparison,
    pick_samples,
    samples,
)

__all__ = ["Predictions", "Sample", "pick_samples", "write_report"]

Line = Mapping[str, Any]

LOSSES = {
    "loss": "Total loss",
    "loss_task": "Task loss",
    "loss_logits": "Logits distillation",
    "loss_deep": "Deep feature distillation",
    "loss_shallow": "Shallow feature distillation",
    "loss_student": "Task loss of the backbone's own head",
    "loss_orthogonal": "AdaLoRA's orthogonality",
}
GRADIENT_NORMS = {
    "grad_norm_side": ("side", 2),
    "grad_norm_adapter": ("adapter", 2),
    "grad_norm_norms": ("norms", 1),
    "grad_norm_backbone": ("backbone", 1),
    "grad_norm_head": ("head", 3),
}
WHO = {"deployed": "Deployed model", "side": "Side network"}
METRIC_WORDS = {
    "f1": "F1",
    "f1_macro": "macro F1",
    "matthews": "Matthews correlation",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "accuracy_f1": "mean of accuracy and F1",
    "pearson_spearman": "mean of Pearson and Spearman",
    "rmse": "RMSE",
    "mae": "MAE",
}
IN_PERCENT = frozenset({"accuracy", "balanced_accuracy", "f1", "f1_macro", "accuracy_f1"})


def write_report(
    path: Path, *, summary: dict[str, Any], metrics: list[dict[str, Any]], predictions: Predictions
) -> None:
    """Write RUN/report.html.

    Args:
        path: The page to write, inside the run directory; `config.yaml` beside it is shown.
        summary: summary.json. Sections whose keys it lacks are left out.
        metrics: The lines of metrics.jsonl, in their order.
        predictions: What the kept weights say about the validation data.

    Raises:
        WorkFailed: If the page cannot be written.
    """
    config = path.parent / "config.yaml"
    page = document(
        f"{summary['task']} · {_method(summary)}",
        _heading(summary),
        _headline(summary),
        _scores(summary),
        _curves(metrics),
        comparison(predictions),
        samples(predictions),
        _data(summary),
        _memory(summary),
        _reproduce(summary, config.read_text(encoding="utf-8") if config.is_file() else None),
        tag("footer", "Written by mdpd-deploy. GB = 1,000,000,000 bytes."),
    )
    write_text(path, page)


def _method(summary: Line) -> str:
    side = summary.get("side")
    name = side.get("name") if isinstance(side, Mapping) else side
    return f"{summary['method']} over {name}" if name else str(summary["method"])


def _backbone(summary: Line) -> str:
    backbone = summary.get("backbone")
    return str(backbone.get("name", "")) if isinstance(backbone, Mapping) else str(backbone or "")


def _card_words(summary: Line) -> list[str]:
    """Say what the backbone sees and under which licence its weights are."""
    backbone = summary.get("backbone")
    known = backbone if isinstance(backbone, Mapping) else {}
    words = (("sees", "sees {}"), ("licence", "weights: {}"))
    return [form.format(known[name]) for name, form in words if name in known]


def _heading(summary: Line) -> Html:
    told = [
        f"backbone {_backbone(summary)}",
        *_card_words(summary),
        f"seed {summary.get('seed', '?')}",
    ]
    if summary.get("device"):
        told.append(f"on {_device(summary['device'])}")
    if summary.get("status") not in (None, "completed"):
        told.append(f"status: {summary['status']}")
    title = tag("h1", f"{summary['task']} · {_method(summary)}")
    notes = [tag("p", note) for note in summary.get("notes") or ()]
    return tag("header", title, tag("p", " · ".join(told)), notes)


def _device(device: object) -> str:
    if isinstance(device, Mapping):
        return ", ".join(str(value) for value in device.values() if value)
    return str(device)


# --- headline ---------------------------------------------------------------------------------


def _headline(summary: Line) -> Html:
    cards = [
        *_metric_cards(summary),
        *_floor_card(summary),
        _parameter_card(summary),
        *_cost_cards(summary),
    ]
    return tag("div", cards, class_="cards")


def _card(title: str, figure: str, said: str | None = None) -> Html:
    return tag("div", tag("small", title), tag("strong", figure), tag("small", said or " "))


def _metric_cards(summary: Line) -> Iterable[Html]:
    primary, measured = summary["primary_metric"], scores_of(summary)[0]
    for who, name in WHO.items():
        values, title = measured.models.get(who), f"{name}, {measured.words}"
        if values and primary in values:
            others = [
                f"{_words(k)} {format_metric(k, v)}" for k, v in values.items() if k != primary
            ]
            said = " · ".join([_words(primary), *others])
            yield _card(title, format_metric(primary, values[primary]), said)


def _floor_card(summary: Line) -> Iterable[Html]:
    measured = scores_of(summary)[0]
    if floor := measured.majority:
        primary = summary["primary_metric"]
        said = f"{_words(primary)} of always answering the most frequent class"
        title = f"Without learning, {measured.words}"
        yield _card(title, format_metric(primary, floor[primary]), said)


def _scores(summary: Line) -> Html:
    """Show every score with its split, the one that chose nothing first."""
    found = scores_of(summary)
    names = list(found[0].models["deployed"])
    rows = [
        (
            f"{scores.words}{', which chose the weights' * scores.chose}",
            WHO[who].lower(),
            *(format_metric(name, values.get(name)) for name in names),
        )
        for scores in found
        for who, values in scores.models.items()
    ]
    chose = any(scores.chose for scores in found)
    note = "The kept weights are the best of several evaluations on validation, so that its score "
    return section(
        "Scores",
        table(["split", "model", *map(_words, names)], rows),
        note=f"{note}is optimistic." if chose else None,
    )


def format_metric(name: str, value: float | None) -> str:
    """Return a metric as a report shows it: shares in percent, the rest as plain numbers."""
    if value is None or not math.isfinite(value):
        return "undefined"
    return percent(value) if name in IN_PERCENT else f"{value:.4g}"


def _words(name: str) -> str:
    return METRIC_WORDS.get(name, name.replace("_", " "))


def _parameter_card(summary: Line) -> Html:
    params = summary["params"]
    said = f"{percent(params['trained'] / params['backbone'], 2)} of the backbone's"
    delta = params.get("deployed_delta")
    if delta is not None:
        said += f"; {count(delta)} stay in the deployed model"
    return _card("Trained parameters", count(params["trained"]), said)


def _cost_cards(summary: Line) -> Iterable[Html]:
    memory, time = summary.get("memory", {}), summary.get("time", {})
    peak, forecast = memory.get("peak_live_bytes"), memory.get("forecast_bytes")
    if peak:
        yield _card("Peak memory", size(peak), f"{size(forecast)} forecast" if forecast else None)
    elif forecast:
        yield _card("Peak memory, forecast", size(forecast))
    if time.get("train_s") is not None:
        speed = time.get("samples_per_s")
        said = f"{speed:,.1f} examples per second" if speed else None
        yield _card("Training time", duration(time["train_s"]), said)


# --- curves -----------------------------------------------------------------------------------


def _curves(metrics: Sequence[Line]) -> Html | None:
    train = [line for line in metrics if line.get("split") == "train"]
    validation = [line for line in metrics if line.get("split") == "validation"]
    charts = [*_metric_charts(validation), *_loss_charts(train), *_optimiser_charts(train)]
    if not charts:
        return None
    return section(
        "Training",
        tag("div", charts, class_="charts"),
        note="Losses and gradient norms that span a factor of ten have a logarithmic scale.",
    )


def _points(lines: Sequence[Line], name: str, key: str, colour: int) -> Series | None:
    found = [(line["step"], line.get(key)) for line in lines]
    kept = [(x, y) for x, y in found if isinstance(y, int | float) and math.isfinite(y)]
    return Series(name, [x for x, _ in kept], [y for _, y in kept], colour) if kept else None


def _chart(title: str, lines: Iterable[Series | None], *, log: bool = False) -> Iterable[Html]:
    series = [line for line in lines if line is not None]
    if series:
        keys = [(line.name, line.colour) for line in series if line.name]
        yield figure(title, line_chart(series, log=log), keys)


def _metric_charts(validation: Sequence[Line]) -> Iterable[Html]:
    names = dict.fromkeys(name for line in validation for name in line.get("deployed") or {})
    for name in names:
        flat = [
            {
                "step": line["step"],
                **{w: (line.get(w) or {}).get(name) for w in ("deployed", "side")},
            }
            for line in validation
        ]
        both = [_points(flat, "deployed", "deployed", 1), _points(flat, "side", "side", 2)]
        yield from _chart(f"Validation {_words(name)}", both)


def _loss_charts(train: Sequence[Line]) -> Iterable[Html]:
    for key, title in LOSSES.items():
        yield from _chart(title, [_points(train, "", key, 1)], log=True)


def _optimiser_charts(train: Sequence[Line]) -> Iterable[Html]:
    yield from _chart("Learning rate", _rates(train))
    norms = [_points(train, name, key, colour) for key, (name, colour) in GRADIENT_NORMS.items()]
    yield from _chart("Gradient norm", norms, log=True)
    yield from _chart("Examples per second", [_points(train, "", "samples_per_s", 3)])


def _rates(train: Sequence[Line]) -> list[Series | None]:
    """Return the learning rate: one number per line, or one per group of parameters."""
    groups = dict.fromkeys(
        group for line in train if isinstance(line.get("lr"), Mapping) for group in line["lr"]
    )
    if not groups:
        return [_points(train, "", "lr", 4)]
    flat = [{"step": line["step"], **line["lr"]} for line in train if "lr" in line]
    named = list(groups)[:SERIES_COLOURS]
    return [_points(flat, name, name, colour) for colour, name in enumerate(named, start=1)]


# --- data -------------------------------------------------------------------------------------


def _data(summary: Line) -> Html | None:
    """Show what was found where the data lie: used by split, and left out by reason."""
    inventory = summary.get("inventory")
    if not inventory:
        return None
    used = [(f"used: {split}", count(n), "") for split, n in inventory["used"].items()]
    left = [
        (f"left out: {entry['reason']}", count(entry["count"]), ", ".join(entry["examples"]))
        for entry in inventory["left_out"]
    ]
    return section("Data", table(["what was found", "number", "for example"], [*used, *left]))


# --- memory and reproduction ------------------------------------------------------------------


def _memory(summary: Line) -> Html | None:
    memory = summary.get("memory", {})
    totals = {
        "measured, live tensors": memory.get("peak_live_bytes"),
        "forecast": memory.get("forecast_bytes"),
        "measured, CUDA allocator": memory.get("peak_cuda_bytes"),
    }
    known = {name: value for name, value in totals.items() if value}
    if not known:
        return None
    parts = memory.get("parts") or {}
    longest = max(known.values())
    resident = memory.get("peak_rss_bytes")
    process = f" The whole process, libraries included, held {size(resident)}." if resident else ""
    rows = [_bar(name, [(value, 1)], value, longest) for name, value in known.items()]
    return section(
        "Peak memory of a training step",
        tag("div", rows, class_="bars"),
        _part_bar(parts) if parts else None,
        note="Live tensors are what the method needs: weights, batch, activations, gradients and "
        f"optimiser state.{process}",
    )


def _part_bar(parts: Mapping[str, int]) -> list[Html]:
    ordered = sorted(((n, b) for n, b in parts.items() if b), key=lambda item: -item[1])
    total = sum(value for _, value in ordered)
    coloured = [
        (value, index if index <= SERIES_COLOURS else 0)
        for index, (_, value) in enumerate(ordered, start=1)
    ]
    rows = [
        (
            tag("span", name.replace("_", " "), class_=f"key c{colour}"),
            size(value),
            percent(value / total),
        )
        for (name, value), (_, colour) in zip(ordered, coloured, strict=True)
    ]
    bar = tag("div", _bar("at the peak", coloured, total, total), class_="bars")
    return [tag("h3", "What lived at the peak"), bar, table(["part", "bytes", "share"], rows)]


def _bar(name: str, pieces: Sequence[tuple[int, int]], value: int, longest: int) -> list[Html]:
    fill = [
        tag("i", class_=f"c{colour}", style=f"width: {100 * piece / longest:.2f}%")
        for piece, colour in pieces
    ]
    return [tag("span", name), tag("div", fill, class_="bar"), tag("b", size(value))]


def _reproduce(summary: Line, config: str | None) -> Html:
    command = summary.get("command") or "mdpd train config.yaml --out AGAIN"
    shown = [
        tag("p", "From the run's folder:") if "command" not in summary else None,
        tag("pre", tag("code", command)),
    ]
    if config is not None:
        opened = tag("summary", "config.yaml, every resolved option")
        shown.append(tag("details", opened, tag("pre", tag("code", config))))
    versions = summary.get("versions") or {}
    if versions:
        rows = [(name, str(version)) for name, version in versions.items()]
        shown += [tag("details", tag("summary", "Versions"), table(["package", "version"], rows))]
    source = summary.get("backbone")
    if isinstance(source, Mapping) and source.get("sha256"):
        shown.append(
            tag("p", tag("small", "backbone weights sha256 "), tag("code", source["sha256"]))
        )
    return section("Run it again", *shown)
