"""Labels as written → class indices or scores, checked row by row."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.data.cells import class_of
from mdpd_deploy.data.rows import Rows
from mdpd_deploy.errors import UserError
from mdpd_deploy.text import require_unicode


def sorted_names(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct labels in order: by value if all are whole numbers, else by name."""
    names = {class_of(label) for label in labels if label}
    if all(name.removeprefix("-").isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def class_names(
    found: Iterable[str], given: Sequence[str] | None, own: Sequence[str] | None
) -> tuple[str, ...]:
    """Settle the class list: the user's order, else the task's own, else the names found.

    Args:
        found: Labels of the training split.
        given: `data.labels`.
        own: The class list that belongs to the task.

    Raises:
        UserError: If the list has doubles, leaves out a class of the task, is too short, or holds a
            name that is no valid Unicode.
    """
    names = tuple(class_of(name) for name in given or own or sorted_names(found))
    for name in names:
        require_unicode(name, "the class")
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise UserError(f"the class list names {doubles[0]!r} twice: list each class once.")
    if given and own and set(names) != set(map(class_of, own)):
        raise UserError(f"data.labels must be this task's own classes in any order: {listed(own)}.")
    if len(names) < 2:
        raise UserError(
            f"classification needs two classes or more, found only {listed(names) or 'none'}: "
            "check --label, or use --task regress for numbers."
        )
    return names


def class_indices(rows: Rows, names: Sequence[str]) -> NDArray[np.int64]:
    """Return the class index of every row [n].

    Raises:
        UserError: For a missing label or one outside `names`, with its file and row.
    """
    index = {class_of(name): number for number, name in enumerate(names)}
    labels = [class_of(label) for label in rows.labels]
    try:
        return np.array([index[label] for label in labels], dtype=np.int64)
    except KeyError:
        at = next(i for i, label in enumerate(labels) if label not in index)
    label = rows.labels[at]
    if not label:
        raise UserError(f"{rows.where(at)} has no label: fill it in or remove the row.")
    raise UserError(
        f"{rows.where(at)}: the label {label!r:.60} is not one of the classes {listed(names)}: "
        "correct it; a class that the training data lack is named by data.labels=[...] when training."
    )


def scores(rows: Rows) -> NDArray[np.float64]:
    """Return the score of every row [n].

    Raises:
        UserError: For a label that is missing, no number, NaN or infinite, with its file and row.
    """
    values = np.empty(len(rows), dtype=np.float64)
    for i, label in enumerate(rows.labels):
        try:
            values[i] = float(label)
        except ValueError:
            values[i] = math.nan
        if not math.isfinite(values[i]):
            shown = f"{label!r:.60}" if label else "missing"
            raise UserError(
                f"{rows.where(i)}: the label is {shown}, and regression needs a finite number: "
                "correct the row or remove it."
            )
    return values


def require_every_class(labels: NDArray[np.int64], names: Sequence[str], where: str) -> None:
    """Raise `UserError` naming a class without a training example."""
    counts = np.bincount(labels, minlength=len(names))
    empty = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if empty:
        raise UserError(
            f"the class {empty[0]!r} has no training example in {where}: "
            "add some, or remove the class."
        )


def listed(names: Sequence[str], most: int = 10) -> str:
    """Write a class list for a message, shortened after `most` names."""
    shown = ", ".join(names[:most])
    return f"{shown}, … ({len(names)} in all)" if len(names) > most else shown
