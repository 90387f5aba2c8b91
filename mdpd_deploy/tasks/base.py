"""A task: everything behind the last block, from labels as they are written to what a user reads.

One object goes through the house: made from the training rows, fitted to their labels, asked for
head and losses while training, and for predictions, tolerances and pages afterwards. Its other half
(heads, losses) imports torch when it is called, so that a server needs none.

Shapes: n examples, B in a batch, C outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, device

    from mdpd_deploy.config import Config, LossConfig
    from mdpd_deploy.data.rows import Rows
    from mdpd_deploy.report.predictions import TaskPage
    from mdpd_deploy.tasks.head import Head
    from mdpd_deploy.tasks.metrics import Values

Targets = NDArray[np.int64] | NDArray[np.float64]
Answers = NDArray[np.floating]  # [n, C], one row for each example
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Prediction(ABC):
    """What a model says of one input; each task has its own.

    Attributes:
        label: The class; None where there is none.
        probability: That of the class.
        probabilities: Every class with its probability, most probable first.
        score: The number; None where there is none.
    """

    label: str | None = None
    probability: float | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict)
    score: float | None = None

    @abstractmethod
    def to_json(self, top: int = 1) -> dict[str, Any]:
        """Return plain values, with the `top` best answers where there are several."""

    @abstractmethod
    def cells(self, top: int = 1) -> dict[str, str]:
        """Return what a table shows, by heading."""


@dataclass(frozen=True)
class Task(ABC):
    """What one kind of task knows.

    Attributes:
        kind: Its name in runs, manifests and the registry.
        output: Name of the graph's output.
        mixes: Whether `loss` and `errors` take shares of classes [B, C] for labels too.
        logits_form: Of the logits distillation, where none is chosen.
        usual_metrics: Metric names, the primary one first, where a data set has none of its own.
        labels: Class names in index order; empty where outputs are no classes.
    """

    kind: ClassVar[str]
    output: ClassVar[str]
    usual_metrics: ClassVar[tuple[str, ...]]
    mixes: ClassVar[bool] = False
    logits_form: ClassVar[Literal["mse", "kl"]] = "kl"
    labels: tuple[str, ...] = ()

    @property
    @abstractmethod
    def width(self) -> int:
        """C."""

    @property
    @abstractmethod
    def words(self) -> str:
        """What the outputs are, for a sentence, e.g. `3 class names in order`."""

    # --- labels as written ---------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def of_rows(
        cls, name: str, rows: Rows, given: Sequence[str] | None, own: Sequence[str] | None
    ) -> Self:
        """Make the task from its training rows.

        Args:
            name: The task as typed.
            rows: The training split.
            given: `data.labels`.
            own: The class names that belong to the data set.

        Raises:
            UserError: If these contradict each other.
        """

    @classmethod  # noqa: B027  # folders name classes
    def refuse_folders(cls, where: str) -> None:
        """Raise `UserError` where a folder's name cannot be a label of this task."""

    @abstractmethod
    def targets(self, rows: Rows) -> Targets:
        """Return the label of every row as a number [n]; `UserError` names file and row."""

    @abstractmethod
    def check_training(self, targets: Targets, rows: Rows, *, all_classes: bool) -> None:
        """Raise `UserError` where nothing can be learnt from these labels."""

    @abstractmethod
    def hold_out(self, targets: Targets, held: int, seed: int) -> tuple[Indices, Indices]:
        """Split range(n) into (kept, held), by class where there are classes."""

    @abstractmethod
    def cautions(self, train: Targets, validation: Targets) -> Iterator[str]:
        """Yield what in these labels makes training or scores doubtful, as sentences."""

    # --- training; torch is imported in these --------------------------------------------------

    @abstractmethod
    def fitted(self, targets: Targets, name: str, config: Config) -> Self:
        """Return the task with what training takes from the labels (weights, scale).

        Raises:
            UserError: For an option that this kind of task would ignore, or labels that do not fit.
        """

    @abstractmethod
    def example(self, config: Config) -> Self:
        """Return the task as if it were fitted to labels that shape nothing."""

    @abstractmethod
    def weights(self, targets: Targets) -> NDArray[np.float64]:
        """Return how much each example counts in the task loss [n]."""

    @abstractmethod
    def wanted(self, targets: Targets) -> Targets:
        """Return what the raw outputs are compared with [n]: int64 classes, or scaled scores."""

    @abstractmethod
    def example_labels(self, batch: int, device: device) -> Tensor:
        """Return labels of a made-up batch [B]."""

    @abstractmethod
    def new_head(self, width: int) -> Head:
        """Return a fresh head for features of width D."""

    @abstractmethod
    def loss(self, raw: Tensor, labels: Tensor) -> Tensor:
        """Σ over the batch of the task loss: raw [B, C], labels [B] → a scalar."""

    @abstractmethod
    def errors(self, raw: Tensor, labels: Tensor) -> Tensor:
        """Return each example's own loss, unweighted: [B]."""

    def distils(self, loss: LossConfig) -> LossConfig:
        """Return the options of the loss with the form of the distillation, where none is chosen."""
        return loss.model_copy(update={"logits_form": loss.logits_form or self.logits_form})

    def distance(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        config: LossConfig,
        *,
        answer: Tensor | None = None,
    ) -> Tensor:
        """Σ over the batch of the logits distillation; the teacher is detached.

        Args:
            student: What is drawn to the teacher [B, C].
            teacher: Y_S [B, C].
            labels: [B]; None where the form reads none.
            config: Form of the loss.
            answer: What the student answers, where that is not what is drawn [B, C].
        """
        from mdpd_deploy.tasks.losses import logits_loss

        return logits_loss(student, teacher, config, labels, errors=self.errors, answer=answer)

    # --- what outputs mean ---------------------------------------------------------------------

    @abstractmethod
    def decode(self, outputs: Mapping[str, Answers]) -> list[Prediction]:
        """Turn a graph's outputs, by name, into one prediction of each example."""

    @abstractmethod
    def mistakes(self, targets: Targets, outputs: Answers) -> tuple[Answers, NDArray[np.bool_]]:
        """Return how wrong each example is [n], and whether it counts as a mistake [n]."""

    @abstractmethod
    def floor(self, metrics: Sequence[str], train: Targets, targets: Targets) -> Values | None:
        """Return what a model scores that has learnt nothing of the inputs; None where unknown."""

    @abstractmethod
    def page(self) -> TaskPage:
        """Return how a report shows its predictions."""

    @abstractmethod
    def unsaid(self, targets: Targets, outputs: Answers) -> str | None:
        """Say which answers never come although they are right ones; None if all do."""


KINDS: Registry[type[Task]] = Registry("kind of task")


def task_of(kind: str, labels: Sequence[str] = ()) -> Task:
    """Return the task that a run or a manifest names; raises `UserError` for an unknown kind."""
    return KINDS.get_or_raise(kind)(tuple(labels))
