"""`mdpd predict`: raw inputs through a bundle. No torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mdpd_deploy.commands.options import RuntimeWord
from mdpd_deploy.commands.verb import Json, print_json
from mdpd_deploy.errors import UserError

if TYPE_CHECKING:
    from mdpd_deploy.artifacts.tasks import BundleTask
    from mdpd_deploy.data.examples import Raw
    from mdpd_deploy.tasks import Prediction

SHOWN = 60  # characters of an input in the table


def command(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A folder of `mdpd export`.")],
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...", help="Image paths, texts, or tables with the training columns."
        ),
    ],
    task: Annotated[
        str | None, typer.Option(help="Which task to ask, where the bundle has several.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Most probable classes to show.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Inputs per run of the graph.")] = 32,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. Default: cpu, with trt cuda.")
    ] = None,
    runtime: RuntimeWord = None,
    json: Json = False,
) -> None:
    """Predict: a label with its probability, or a score."""
    from mdpd_deploy.artifacts.bundle import load_bundle

    opened = load_bundle(bundle)
    asked = opened.task(task)
    names, raws = read_inputs(asked, inputs)
    place = device or ("cuda" if runtime == "trt" else "cpu")
    runner = opened.runner(place, runtime=runtime)
    predictions = opened.predict(raws, batch, runner=runner, task=asked.name)
    if json:
        rows = [
            {"input": name, **prediction.to_json(top)}
            for name, prediction in zip(names, predictions, strict=True)
        ]
        plain = {
            "bundle": str(bundle),
            "task": asked.name,
            "provider": runner.provider,
            "predictions": rows,
        }
        print_json(plain)
    else:
        _print(names, predictions, top)


def read_inputs(task: BundleTask, inputs: Sequence[str]) -> tuple[list[str], list[Raw]]:
    """Turn words of the command line into raw inputs, each with the name it is shown by.

    A word is a table if it ends like one (`.csv`, `.jsonl.gz`, ...), in the encoding of the
    training data; else an image path or a literal text, as the task takes.

    Raises:
        UserError: If a table is missing or lacks a column, a pair is wanted and no table given, or a
            text is empty.
    """
    from mdpd_deploy.data.examples import refuse_empty
    from mdpd_deploy.data.table import is_table, read_inputs

    columns: list[str] = task.facts["data"]["columns"]
    encoding: str | None = task.facts["data"].get("options", {}).get("encoding")
    names: list[str] = []
    raws: list[Raw] = []
    takes = task.preprocess.takes
    for word in inputs:
        path = Path(word)
        if is_table(path) and (path.is_file() or not any(map(str.isspace, word))):
            rows = read_inputs(path, columns, takes, encoding)
            names += [_shown(raw) for raw in rows]
            raws += rows
            continue
        if takes == "image":
            raws.append(path)
        elif len(task.fields) > 1:
            raise UserError(
                f"this model takes pairs of texts, and {word!r:.60} is one: give a table with the "
                f"columns {', '.join(columns)}."
            )
        else:
            refuse_empty([word])
            raws.append(word)
        names.append(word)
    return names, raws


def _shown(raw: Raw) -> str:
    return " | ".join(raw) if isinstance(raw, tuple) else str(raw)


def _print(names: Sequence[str], predictions: Sequence[Prediction], top: int) -> None:
    from mdpd_deploy.report.terminal import print_table

    rows = [
        (name if len(name) <= SHOWN else f"{name[: SHOWN - 1]}…", *prediction.cells(top).values())
        for name, prediction in zip(names, predictions, strict=True)
    ]
    print_table(None, ["input", *predictions[0].cells(top)], rows)
