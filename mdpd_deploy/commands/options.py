"""Options that several verbs have, spelled once, and how their words are split."""

import re
from typing import Annotated

import typer

from mdpd_deploy.errors import UserError

Data = Annotated[
    str | None, typer.Option(help="File, folder or hub:NAME; for glue and vtab their root.")
]
EvalData = Annotated[str | None, typer.Option(help="Separate evaluation data.")]
Text = Annotated[str | None, typer.Option(help="Text column, or two: A,B.")]
Image = Annotated[str | None, typer.Option(help="Column of image paths.")]
Label = Annotated[str | None, typer.Option(help="Label column.")]
Backbone = Annotated[
    str | None, typer.Option(help="timm:NAME, hf:NAME[@revision] or a local folder.")
]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps of a training.")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the data; default 10.")]
Batch = Annotated[int | None, typer.Option(help="Examples per step; default 32.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]


def split_words(text: str) -> list[str]:
    """Split at commas outside brackets; empty words are left out."""
    return [word.strip() for word in re.split(r",(?![^\[]*\])", text) if word.strip()]


def split_numbers(text: str, option: str) -> list[int]:
    """Split whole numbers at commas; `option` names them in the message."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: give whole numbers with commas, as in 1,8,32.") from None
