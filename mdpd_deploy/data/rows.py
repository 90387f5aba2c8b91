"""What a reader is, and what it finds before labels become numbers.

A new source of data is one file and one entry in `TASKS`: a whole task name (`glue/sst2`,
`classify`), or a prefix that ends in `/` for a family whose members are folders of the user
(`vtab/`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.examples import Field, Indices, Raw, TaskData, texts
from mdpd_deploy.data.inventory import NOTHING, Inventory
from mdpd_deploy.errors import UserError
from mdpd_deploy.registry import Registry


@dataclass(frozen=True)
class Rows:
    """One split as written.

    Attributes:
        inputs: Raw inputs; a list, or a lazy sequence.
        labels: Labels as text, in the order of `inputs`; "" where the label is missing.
        where: Names the place of example i for messages, e.g. `reviews.csv line 7`.
        source: Names the split for messages, e.g. `reviews.csv`.
    """

    inputs: Sequence[Raw]
    labels: Sequence[str]
    where: Callable[[int], str]
    source: str

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, indices: Indices) -> "Rows":
        """Return the rows at `indices`, in that order."""
        places: list[int] = indices.tolist()
        inputs, labels = [self.inputs[i] for i in places], [self.labels[i] for i in places]
        return Rows(inputs, labels, lambda i: self.where(places[i]), self.source)


@dataclass(frozen=True)
class Columns:
    """Which columns of a table the inputs and the label come from."""

    inputs: tuple[str, ...]
    image: bool
    label: str


@dataclass(frozen=True)
class Found:
    """What lies at one path of the user's.

    Attributes:
        splits: Rows by split; everything is `train` if `whole`.
        whole: True for one table, or pictures without split folders.
        columns: None for an image folder.
        notes: Sentences the user should see.
        inventory: What is left out.
    """

    splits: dict[str, Rows]
    whole: bool
    columns: Columns | None = None
    notes: tuple[str, ...] = ()
    inventory: Inventory = NOTHING

    @property
    def fields(self) -> tuple[Field, ...]:
        """What one input is made of."""
        if self.columns is None or self.columns.image:
            return ("image",)
        return texts(len(self.columns.inputs))


@dataclass(frozen=True)
class Source:
    """All splits of a task, and what is known of them.

    Attributes:
        splits: Name to rows; `train` always, `validation` where the source has one, others by name.
        fields: What one input is made of, in order.
        names: The task's own class names in index order; None to take those of the train split.
        all_classes: True if a class without a training example is an error.
        columns: Input columns of a table.
        notes: Sentences the user should see.
        inventory: What the reader found and left out.
    """

    splits: dict[str, Rows]
    fields: tuple[Field, ...]
    names: tuple[str, ...] | None = None
    all_classes: bool = True
    columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    inventory: Inventory = NOTHING


class Reader(Protocol):
    """Reads one task: the name as typed, the data options, and the seed of every split made."""

    def __call__(self, task: str, config: DataConfig, *, seed: int) -> TaskData: ...


TASKS: Registry[Reader] = Registry("--task")


def refuse_options(task: str, config: DataConfig, *names: str) -> None:
    """Raise `UserError` for a data option that this task cannot use (none is ignored in silence)."""
    for name in names:
        if getattr(config, name) is not None:
            raise UserError(f"--task {task} does not use data.{name}: leave it out.")
