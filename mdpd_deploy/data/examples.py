"""What every reader returns: examples by split, before any preprocessing. No torch here."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mdpd_deploy.data.inventory import NOTHING, Inventory
from mdpd_deploy.errors import UserError

if TYPE_CHECKING:
    from mdpd_deploy.tasks.base import Task

Indices = NDArray[np.int64]
Field = Literal["text", "image"]  # a part of one input

Text = str | tuple[str, str]  # a sentence, or a pair
Picture = Path | Image.Image  # a file that is opened when needed, or a picture in memory
Raw = Text | Picture


class Lazy(Sequence[Raw]):
    """Inputs that are made each time they are asked for.

    Args:
        read: Makes the input of a place.
        places: Where the inputs are, in order.
    """

    def __init__(self, read: Callable[[int], Raw], places: Sequence[int] | Indices) -> None:
        self._read = read
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Raw: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Raw]: ...
    def __getitem__(self, index: int | slice) -> Raw | Sequence[Raw]:
        if isinstance(index, slice):
            return Lazy(self._read, self._places[index])
        return self._read(int(self._places[index]))


def joined(columns: Sequence[Sequence[str]]) -> list[Raw]:
    """Return inputs of one column of texts, or pairs of two."""
    return list(columns[0]) if len(columns) == 1 else list(zip(*columns, strict=True))


@dataclass(frozen=True)
class Split:
    """Examples of one split.

    Attributes:
        inputs: Raw inputs, all of the same fields.
        labels: What the task makes of the labels, e.g. int64 class indices, [len(inputs)].
    """

    inputs: Sequence[Raw]
    labels: NDArray[np.int64] | NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class TaskData:
    """A task and its examples.

    Attributes:
        name: As the user typed it, e.g. `glue/sst2`, `vtab/cifar10`, `classify`, `digits`.
        task: What is made of an input: classes, a score, ….
        fields: What one input is made of, in order: `("image",)`, `("text", "text")` for pairs.
        metrics: Metric names to report, of `tasks.metrics.METRICS`; the first is the primary one.
        train: Training examples.
        evaluation: Splits to measure, e.g. `{"validation": ..., "test": ...}`; `validation` always
            exists and is the one that selects the best weights.
        columns: The columns inputs came from (for `predict` on a table); empty if not a table.
        notes: Sentences a user should see (a split that was made, pictures that were skipped).
        inventory: What was found and is used, or left out and why.
    """

    name: str
    task: Task
    fields: tuple[Field, ...]
    metrics: tuple[str, ...]
    train: Split
    evaluation: dict[str, Split]
    columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    inventory: Inventory = NOTHING


def fits(raw: object, fields: Sequence[Field]) -> bool:
    """Tell whether a text, or several in a tuple, is what one input of these fields of text is."""
    return isinstance(raw, tuple if len(fields) > 1 else str)


def parts_of(raw: Raw) -> tuple[str, ...]:
    """Return the texts of an input of text, one or a pair."""
    assert isinstance(raw, str | tuple)
    return raw if isinstance(raw, tuple) else (raw,)


def texts(count: int) -> tuple[Field, ...]:
    """Return the fields of inputs of so many texts."""
    text: Field = "text"
    return (text,) * count


def words_of(fields: Sequence[Field]) -> str:
    """Say what inputs of these fields are, for a message."""
    if "image" in fields:
        return "pictures"
    return "pairs of texts" if len(fields) > 1 else "single texts"


def refuse_empty(raws: Sequence[Raw]) -> None:
    """Check inputs that are to be predicted, at every door the same.

    Raises:
        UserError: If a text, or one of a pair, holds nothing but white space.
    """
    for raw in raws:
        texts = raw if isinstance(raw, tuple) else (raw,)
        if any(isinstance(text, str) and not text.strip() for text in texts):
            raise UserError("a text to predict is empty: leave it out.")


def data_fingerprint(data: TaskData) -> str:
    """Return a hash of all labels and inputs: texts, pictures in memory, paths and file sizes.

    Pictures that only a data set knows how to decode count by their number.
    """
    digest = hashlib.sha256()
    for name, split in {"train": data.train, **data.evaluation}.items():
        digest.update(f"{name} {len(split)}\n".encode())
        digest.update(np.ascontiguousarray(split.labels).tobytes())
        if isinstance(split.inputs, list | tuple):
            for raw in split.inputs:
                digest.update(_identity(raw))
    return digest.hexdigest()


def split_sha256(split: Split) -> str:
    """Return a hash of a split's labels and inputs that is the same wherever the data lies.

    Texts, pictures in memory and the bytes of picture files count; pictures that only a data set
    knows how to decode count by their number.
    """
    digest = hashlib.sha256(f"{len(split)}\n".encode())
    digest.update(np.ascontiguousarray(split.labels).tobytes())
    made_when_asked = not isinstance(split.inputs, list | tuple)
    if len(split) and not (made_when_asked and isinstance(split.inputs[0], Image.Image)):
        for raw in split.inputs:
            content = raw.read_bytes() if isinstance(raw, Path) else _identity(raw)
            digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _identity(raw: Raw) -> bytes:
    if isinstance(raw, Path):
        return os.fsencode(raw) + f" {raw.stat().st_size if raw.is_file() else 0}\n".encode()
    if isinstance(raw, Image.Image):
        return f"{raw.mode} {raw.size}".encode() + raw.tobytes()
    return (repr(raw) + "\n").encode()
