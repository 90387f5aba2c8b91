"""A number, in the unit of the labels: scale, loss and what the score means."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.data.splits import random_split
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks.base import KINDS, Answers, Indices, Prediction, Targets, Task
from mdpd_deploy.tasks.metrics import Values

if TYPE_CHECKING:
    from torch import Tensor, device

    from mdpd_deploy.config import Config
    from mdpd_deploy.data.rows import Rows
    from mdpd_deploy.report.predictions import TaskPage
    from mdpd_deploy.tasks.head import Head


FOR_CLASSES = (
    "loss.logits_form", "loss.temperature", "loss.label_smoothing", "train.class_weights",
)  # fmt: skip


class ScorePrediction(Prediction):
    """A number: `score`, in the unit of the labels."""

    def to_json(self, top: int = 1) -> dict[str, Any]:
        """Return the score."""
        return {"score": self.score}

    def cells(self, top: int = 1) -> dict[str, str]:
        """Return the score."""
        return {"score": f"{self.score:.4f}"}


@dataclass(frozen=True)
class Regress(Task):
    """A number, by squared error on labels of mean 0 and deviation 1; the graph un-scales.

    Attributes:
        scale: (mean, standard deviation) of the training labels.
    """

    kind = "regress"
    output = "scores"
    usual_metrics = ("pearson_spearman", "pearson", "spearman", "rmse", "mae")
    logits_form = "mse"
    scale: tuple[float, float] = (0.0, 1.0)

    @property
    def width(self) -> int:
        """One output."""
        return 1

    @property
    def words(self) -> str:
        """Say what the output is."""
        return "a score"

    # --- labels as written ---------------------------------------------------------------------

    @classmethod
    def of_rows(
        cls, name: str, rows: Rows, given: Sequence[str] | None, own: Sequence[str] | None
    ) -> Self:
        """Refuse a list of classes."""
        if given is not None:
            raise UserError(
                f"--task {name} is a regression and has no classes: leave out data.labels."
            )
        return cls()

    @classmethod
    def refuse_folders(cls, where: str) -> None:
        """Refuse folders of pictures: their names are classes."""
        raise UserError(
            f"--task regress needs numbers as labels, and {where} is an image folder: "
            "give a table with --image COL --label COL."
        )

    def targets(self, rows: Rows) -> NDArray[np.float64]:
        """Return scores [n]; one that is missing, no number, NaN or infinite is refused."""
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

    def check_training(self, targets: Targets, rows: Rows, *, all_classes: bool) -> None:
        """Raise `UserError` where all labels are the same."""
        if np.ptp(targets) == 0:
            raise UserError(
                f"every label in {rows.source} is {targets[0]:g}: there is nothing to learn, "
                "check --label."
            )

    def hold_out(self, targets: Targets, held: int, seed: int) -> tuple[Indices, Indices]:
        """Hold out at random."""
        return random_split(len(targets), held, seed)

    def cautions(self, train: Targets, validation: Targets) -> Iterator[str]:
        """Yield that no correlation is defined where all labels are the same."""
        if np.ptp(validation) == 0:
            yield f"every label of validation is {validation[0]:g}: no correlation is defined."

    # --- training ------------------------------------------------------------------------------

    def fitted(self, targets: Targets, name: str, config: Config) -> Self:
        """Take mean and deviation of the labels; refuse options that are for classes."""
        chosen, plain = config.flat(), type(config)().flat()
        if chosen["loss.logits_form"] == self.logits_form:
            plain["loss.logits_form"] = self.logits_form
        for option in FOR_CLASSES:
            if chosen[option] != plain[option]:
                raise UserError(
                    f"{option}={chosen[option]} is for classes, and task {name} is a regression: "
                    "leave it out."
                )
        deviation = float(targets.std())
        if deviation == 0:
            raise UserError("all training labels are equal: there is nothing to regress.")
        return replace(self, scale=(float(targets.mean()), deviation))

    def example(self, config: Config) -> Self:
        """Return the task of unit scale."""
        return self

    def weights(self, targets: Targets) -> NDArray[np.float64]:
        """Return 1 for each example [n]."""
        return np.ones(len(targets))

    def wanted(self, targets: Targets) -> Targets:
        """Return scores of mean 0 and deviation 1."""
        mean, deviation = self.scale
        return (targets.astype(np.float64) - mean) / deviation

    def example_labels(self, batch: int, device: device) -> Tensor:
        """Return 0 for all [B]."""
        import torch

        return torch.zeros(batch, device=device)

    def new_head(self, width: int) -> Head:
        """Return a linear head to one score that un-scales it."""
        from mdpd_deploy.tasks.head import Head

        return Head(width, 1, self.scale, output=self.output)

    def loss(self, raw: Tensor, labels: Tensor) -> Tensor:
        """Σ squared error of scaled scores: raw [B, 1], labels [B]."""
        from torch.nn.functional import mse_loss

        return mse_loss(raw.float().squeeze(-1), labels.float(), reduction="sum")

    def errors(self, raw: Tensor, labels: Tensor) -> Tensor:
        """Return the squared error of each example [B]."""
        return (raw.squeeze(-1) - labels.float()).square()

    # --- what outputs mean ---------------------------------------------------------------------

    def decode(self, outputs: Mapping[str, Answers]) -> list[Prediction]:
        """Turn scores [n, 1] into predictions."""
        return [ScorePrediction(score=float(row[0])) for row in outputs[self.output]]

    def mistakes(self, targets: Targets, outputs: Answers) -> tuple[Answers, NDArray[np.bool_]]:
        """The larger half of the errors counts as mistakes."""
        error = np.abs(outputs[:, 0] - targets)
        return error, error > np.median(error)

    def floor(self, metrics: Sequence[str], train: Targets, targets: Targets) -> Values | None:
        """Return None: the mean of the labels has no correlation with anything."""
        return None

    def page(self) -> TaskPage:
        """Return the scatter chart and its like."""
        from mdpd_deploy.tasks.regress.page import ScorePage

        return ScorePage()

    def unsaid(self, targets: Targets, outputs: Answers) -> str | None:
        """Return None: a number need not have occurred."""
        return None


KINDS.register(Regress.kind)(Regress)
