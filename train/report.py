"""The run report: one self-contained HTML page that says what a run did.

It needs no network, runs no script and escapes every text that came from a user. Equal input
gives an equal page. Its form is `report.html`; what a model said about single examples comes from
the task's page, curves from `charts.py`, the looks from `page.py`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, Template

from mdpd_deploy.artifacts.scores import scores_of
from mdpd_deploy.files import write_text
from mdpd_deploy.report.charts import SERIES_COLOURS, Series, line_chart
from mdpd_deploy.report.page import Html, count, document, duration, percent, size
from mdpd_deploy.report.predictions import Predictions, comparison, samples
from mdpd_deploy.text import shown

Line = Mapping[str, Any]
Card = tuple[str, str, str]  # what it is, the figure, and more of it
Chart = tuple[str, str, list[tuple[str, int]]]  # title, SVG, names and colours of its lines

LOSSES = {
    "loss": "Total loss",
    "loss_task": "Task loss",
    "loss_logits": "Logits distillation",
    "loss_deep": "Deep feature distillation",
    "loss_shallow": "Shallow feature distillation",
    "loss_student": "Task loss of the backbone's own head",
    "loss_orthogonal": "AdaLoRA's orthogonality",
}
GRADIENT_NORMS = {"side": 2, "adapter": 2, "norms": 1, "backbone": 1, "head": 3}  # their colours
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


@cache
def _template() -> Template:
    """Return the page's form: it escapes what it is given, and spells out what is not visible."""
    environment = Environment(
        loader=PackageLoader("mdpd_deploy.train", "."),
        autoescape=True,
        trim_blocks=True,
        finalize=lambda value: value if hasattr(value, "__html__") else shown(str(value)),
    )
    return environment.get_template("report.html")


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
    side = f" over {summary['side']}" if summary.get("side") else ""
    title = f"{summary['task']} · {summary['method']}{side}"
    body = _template().render(
        title=title,
        told=" · ".join(_told(summary)),
        notes=summary.get("notes") or (),
        cards=[
            *_score_cards(summary),
            _parameter_card(summary),
            *_cost_cards(summary),
            *_felt_cards(summary),
        ],
        **_scores(summary),
        charts=list(_charts(metrics)),
        comparison=comparison(predictions),
        samples=samples(predictions),
        found=list(_found(summary)),
        **_memory(summary.get("memory") or {}),
        config=config.read_text(encoding="utf-8") if config.is_file() else None,
        versions=summary.get("versions") or {},
        sha256=summary["backbone"].get("sha256"),
        count=count,
        percent=percent,
        size=size,
    )
    write_text(path, document(title, Html(body)))


def _told(summary: Line) -> Iterable[str]:
    backbone = summary["backbone"]
    yield f"backbone {backbone['name']}"
    for name, form in (("sees", "sees {}"), ("licence", "weights: {}")):
        if name in backbone:
            yield form.format(backbone[name])
    yield f"seed {summary['seed']}"
    yield f"on {summary['device']}"
    if summary["status"] != "completed":
        yield f"status: {summary['status']}"


# --- scores and costs -------------------------------------------------------------------------


def _score_cards(summary: Line) -> Iterable[Card]:
    primary, measured = summary["primary_metric"], scores_of(summary)[0]
    for who, name in WHO.items():
        values = measured.models.get(who)
        if values and primary in values:
            others = [
                f"{_words(k)} {format_metric(k, v)}" for k, v in values.items() if k != primary
            ]
            figure = format_metric(primary, values[primary])
            yield f"{name}, {measured.words}", figure, " · ".join([_words(primary), *others])
    if floor := measured.majority:
        said = f"{_words(primary)} of always answering the most frequent class"
        figure = format_metric(primary, floor[primary])
        yield f"Without learning, {measured.words}", figure, said


def _scores(summary: Line) -> dict[str, Any]:
    """Return every score with its split, the one that chose nothing first."""
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
    return {
        "scores": rows,
        "measures": list(map(_words, names)),
        "chosen": any(scores.chose for scores in found),
    }


def format_metric(name: str, value: float | None) -> str:
    """Return a metric as a report shows it: shares in percent, the rest as plain numbers."""
    if value is None or not math.isfinite(value):
        return "undefined"
    return percent(value) if name in IN_PERCENT else f"{value:.4g}"


def _words(name: str) -> str:
    return METRIC_WORDS.get(name, name.replace("_", " "))


def _parameter_card(summary: Line) -> Card:
    params = summary["params"]
    share = percent(params["trained"] / params["backbone"], 2)
    kept = f"{count(params['deployed_delta'])} stay in the deployed model"
    return "Trained parameters", count(params["trained"]), f"{share} of the backbone's; {kept}"


def _cost_cards(summary: Line) -> Iterable[Card]:
    memory, time = summary["memory"], summary["time"]
    peak, forecast = memory.get("peak_live_bytes"), memory.get("forecast_bytes")
    if peak:
        yield "Peak memory", size(peak), f"{size(forecast)} forecast" if forecast else ""
    elif forecast:
        yield "Peak memory, forecast", size(forecast), ""
    if time.get("train_s") is not None:
        speed = time.get("samples_per_s")
        said = f"{speed:,.1f} examples per second" if speed else ""
        yield "Training time", duration(time["train_s"]), said


def _felt_cards(summary: Line) -> Iterable[Card]:
    if (felt := summary.get("felt")) is not None:
        yield "Distillation felt", percent(felt, 2), "of the gradient of norms and head"


def _found(summary: Line) -> Iterable[tuple[str, str, str]]:
    """Return what was found where the data lie: used by split, and left out by reason."""
    inventory = summary.get("inventory") or {"used": {}, "left_out": []}
    for split, number in inventory["used"].items():
        yield f"used: {split}", count(number), ""
    for entry in inventory["left_out"]:
        reason = f"left out: {entry['reason']}"
        yield reason, count(entry["count"]), ", ".join(entry["examples"])


def _memory(memory: Line) -> dict[str, Any]:
    totals = {
        "measured, live tensors": memory.get("peak_live_bytes"),
        "forecast": memory.get("forecast_bytes"),
        "measured, CUDA allocator": memory.get("peak_cuda_bytes"),
    }
    parts = sorted((memory.get("parts") or {}).items(), key=lambda part: -part[1])
    coloured = [
        (name.replace("_", " "), value, index if index <= SERIES_COLOURS else 0)
        for index, (name, value) in enumerate(parts, start=1)
        if value
    ]
    totals = {name: value for name, value in totals.items() if value}
    return {"peaks": totals, "parts": coloured, "resident": memory.get("peak_rss_bytes")}


# --- curves -----------------------------------------------------------------------------------


def _charts(metrics: Sequence[Line]) -> Iterable[Chart]:
    train = [line for line in metrics if line["split"] == "train"]
    validation = [line for line in metrics if line["split"] == "validation"]
    for name in dict.fromkeys(name for line in validation for name in line["deployed"]):
        flat = [
            {"step": line["step"], **{who: (line.get(who) or {}).get(name) for who in WHO}}
            for line in validation
        ]
        both = [_points(flat, who, who, colour) for colour, who in enumerate(WHO, start=1)]
        yield from _chart(f"Validation {_words(name)}", both)
    for key, title in LOSSES.items():
        yield from _chart(title, [_points(train, "", key, 1)], log=True)
    yield from _chart("Learning rate", _rates(train))
    yield from _chart("Share of the distillation", [_points(validation, "", "felt", 2)])
    norms = [_points(train, n, f"grad_norm_{n}", colour) for n, colour in GRADIENT_NORMS.items()]
    yield from _chart("Gradient norm", norms, log=True)
    yield from _chart("Examples per second", [_points(train, "", "samples_per_s", 3)])


def _points(lines: Sequence[Line], name: str, key: str, colour: int) -> Series | None:
    found = [(line["step"], line.get(key)) for line in lines]
    kept = [(x, y) for x, y in found if isinstance(y, int | float) and math.isfinite(y)]
    return Series(name, [x for x, _ in kept], [y for _, y in kept], colour) if kept else None


def _chart(title: str, lines: Iterable[Series | None], *, log: bool = False) -> Iterable[Chart]:
    series = [line for line in lines if line is not None]
    if series:
        keys = [(line.name, line.colour) for line in series if line.name]
        yield title, line_chart(series, log=log), keys


def _rates(train: Sequence[Line]) -> list[Series | None]:
    """Return the learning rate: one number per line, or one per group of parameters."""
    flat = [{"step": line["step"], **line["lr"]} for line in train if isinstance(line["lr"], dict)]
    if not flat:
        return [_points(train, "", "lr", 4)]
    groups = list(dict.fromkeys(name for line in flat for name in line if name != "step"))
    named = enumerate(groups[:SERIES_COLOURS], start=1)
    return [_points(flat, name, name, colour) for colour, name in named]
