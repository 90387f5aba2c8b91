"""What a cell of a table or a data set means, one rule for every format: a text, or a label."""

import math
import re
from collections.abc import Callable, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from unicodedata import normalize

import numpy as np

from mdpd_deploy.errors import UserError
from mdpd_deploy.text import is_unicode, require_unicode

LONGEST_LABEL = 1000  # characters; what is longer is a text, or a mistake

_SCALARS = (str, bool, int, float, Decimal, date, time, timedelta, np.generic)
_REALS = (float, np.floating, Decimal)
_WHOLE = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0+")

Where = Callable[[int], str]  # names the place of cell i for messages


def text_cells(cells: Sequence[object], column: str, where: Where) -> list[str]:
    """Return a column of texts; numbers and dates are taken as they are written.

    Raises:
        UserError: For a cell without text, of another kind, or that is no valid Unicode.
    """
    texts: list[str] = []
    for index, cell in enumerate(cells):
        text = _written(cell)
        if text is None:
            raise UserError(
                f"{where(index)}: column {column!r} holds {kind_of(cell)}, no text: name a column "
                "of texts."
            )
        if not text.strip():
            raise UserError(
                f"{where(index)}: the text in column {column!r} is empty: "
                "fill it in or remove the row."
            )
        if not is_unicode(text):
            require_unicode(text, f"{where(index)}: the text")
        texts.append(text)
    return texts


def label_cells(cells: Sequence[object], column: str, where: Where) -> list[str]:
    """Return a column of labels as text; "" where one is missing.

    Raises:
        UserError: For a list, an object or bytes, a label of thousands of characters, or one that
            is no valid Unicode.
    """
    labels: list[str] = []
    for index, cell in enumerate(cells):
        text = _written(_whole(cell))
        if text is None:
            raise UserError(
                f"{where(index)}: column {column!r} holds {kind_of(cell)}, no label: name a column "
                "of names or numbers."
            )
        label = text.strip()
        if len(label) > LONGEST_LABEL:
            raise UserError(
                f"{where(index)}: the label in column {column!r} has {len(label):,} characters, at "
                f"most {LONGEST_LABEL:,} are taken: name the column of labels with --label."
            )
        if not is_unicode(label):
            require_unicode(label, f"{where(index)}: the label")
        labels.append(label)
    return labels


def class_of(label: str) -> str:
    """Return the class that a label names: `1` for `1.0` too, which is how tables write whole floats.

    Names are brought to Unicode's composed form: `é` is one letter however a system spells it.
    """
    label = normalize("NFC", label)
    whole = _WHOLE.fullmatch(label)
    if whole is None:
        return label
    return "0" if whole[1] == "-0" else whole[1]


def kind_of(value: object) -> str:
    """Name what a cell holds, e.g. `a list`."""
    return "nothing" if value is None or value == "" else f"a {type(value).__name__}"


def _written(cell: object) -> str | None:
    """Return a cell as text, "" if it is missing, None if it is neither text nor number nor date."""
    if cell is None or (isinstance(cell, _REALS) and math.isnan(cell)):
        return ""
    if isinstance(cell, bytes | np.bytes_) or not isinstance(cell, _SCALARS):
        return None
    return str(cell)


def _whole(cell: object) -> object:
    """Return a whole number held as a float as an int: columns with gaps turn 1 into 1.0."""
    if isinstance(cell, _REALS) and math.isfinite(cell) and cell == int(cell):
        return int(cell)
    return cell
