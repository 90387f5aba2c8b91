"""Lists of pictures: a line is `relative/path.jpg CLASS_INDEX`, split at its last space."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from mdpd_deploy.data.examples import Raw
from mdpd_deploy.data.images import looks_like_picture
from mdpd_deploy.data.inventory import Inventory, left_out, walk
from mdpd_deploy.data.rows import Rows
from mdpd_deploy.data.table_file import read_lines
from mdpd_deploy.errors import UserError

MOST_DIGITS = 6  # of a class index
METRICS = ("accuracy", "balanced_accuracy")


def read_list(path: Path, pictures: Path, hint: str, *, must_exist: bool) -> Rows:
    """Read a list file; labels are class indices as text.

    Args:
        path: The list.
        pictures: The folder that its paths start from.
        hint: What to do where there is no such file.
        must_exist: Whether a picture that is missing is an error.

    Raises:
        UserError: For a list that is missing, a damaged line or a missing picture.
    """
    inputs: list[Raw] = []
    labels: list[str] = []
    places: list[int] = []
    for number, line in enumerate(read_lines(path, hint), start=1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal() or len(label) > MOST_DIGITS:
            raise UserError(
                f"{path} line {number} is not `relative/path.jpg CLASS_INDEX`: correct the line."
            )
        if must_exist:
            require_picture(pictures / name, f"{path} line {number}")
        inputs.append(pictures / name)
        labels.append(str(int(label)))
        places.append(number)
    return Rows(inputs, labels, lambda i: f"{path} line {places[i]}", str(path))


def require_picture(picture: Path, where: str) -> None:
    """Raise `UserError` for a picture that a list names and that is not there."""
    if not picture.is_file():
        raise UserError(
            f"{where}: the picture {picture} does not exist: correct the line or add the picture."
        )


def class_count(splits: Iterable[Rows]) -> int:
    """Return how many classes lists have at least: one more than the highest index."""
    return 1 + max((int(label) for rows in splits for label in rows.labels), default=-1)


def named(rows: Rows, names: tuple[str, ...], mend: str) -> Rows:
    """Return rows with names for indices; raises `UserError` for an index without a name."""
    for i, label in enumerate(rows.labels):
        if int(label) >= len(names):
            raise UserError(
                f"{rows.where(i)}: the class index {label} is outside the {len(names)} classes "
                f"(0 to {len(names) - 1}): {mend}."
            )
    return replace(rows, labels=[names[int(label)] for label in rows.labels])


def unlisted(folder: Path, splits: Mapping[str, Rows], layout: Iterable[str]) -> Inventory:
    """Return the account of what no list names; the layout's own files count as used."""
    used = {os.path.normpath(str(raw)) for rows in splits.values() for raw in rows.inputs}
    used |= {str(folder / name) for name in layout}
    return left_out(
        (why or _why_unlisted(path), path.relative_to(folder).as_posix())
        for path, why in walk(folder)
        if str(path) not in used
    )


def _why_unlisted(path: Path) -> str:
    kind = "pictures" if looks_like_picture(path) else "files"
    return f"{kind} that no list names"
