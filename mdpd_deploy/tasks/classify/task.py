"""One of several classes: labels, loss and what the logits mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.data.cells import class_of
from mdpd_deploy.data.splits import stratified_split
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks.base import KINDS, Answers, Indices, Prediction, Targets, Task
from mdpd_deploy.tasks.metrics import Values, majority
from mdpd_deploy.text import listed, require_unicode

if TYPE_CHECKING:
    from torch import Tensor, device

    from mdpd_deploy.config import Config
    from mdpd_deploy.data.rows import Rows
    from mdpd_deploy.report.predictions import TaskPage
    from mdpd_deploy.tasks.head import Head


class ClassPrediction(Prediction):
    """A class: `label`, `probability` and `probabilities`."""

    def to_json(self, top: int = 1) -> dict[str, Any]:
        """Return the label with the `top` most probable classes."""
        best = [
            {"label": label, "probability": share}
            for label, share in list(self.probabilities.items())[:top]
        ]
        return {"label": self.label, "probability": self.probability, "top": best}

    def cells(self, top: int = 1) -> dict[str, str]:
        """Return label and probability, or the `top` best in one cell."""
        if top == 1:
            return {"label": str(self.label), "probability": f"{self.probability:.4f}"}
        best = list(self.probabilities.items())[:top]
        return {f"top {len(best)}": "\n".join(f"{label}  {share:.4f}" for label, share in best)}


@dataclass(frozen=True)
class Classify(Task):
    """One of C classes, by cross-entropy.

    Attributes:
        class_weights: One weight per class in the loss; None = all alike.
        label_smoothing: Share of the target that is spread over all classes.
    """

    kind = "classify"
    output = "logits"
    mixes = True
    usual_metrics = ("accuracy", "f1_macro")
    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0

    @classmethod
    def numbered(cls, count: int) -> Self:
        """Return a made-up task of so many classes."""
        return cls(tuple(map(str, range(count))))

    @property
    def width(self) -> int:
        """C."""
        return len(self.labels)

    @property
    def words(self) -> str:
        """Say how many classes there are."""
        return f"{self.width} class names in order"

    # --- labels as written ---------------------------------------------------------------------

    @classmethod
    def of_rows(
        cls, name: str, rows: Rows, given: Sequence[str] | None, own: Sequence[str] | None
    ) -> Self:
        """Settle the class list: the user's order, else the data set's own, else the names found."""
        return cls(class_names(rows.labels, given, own))

    def targets(self, rows: Rows) -> NDArray[np.int64]:
        """Return class indices [n]."""
        index = {class_of(name): number for number, name in enumerate(self.labels)}
        labels = [class_of(label) for label in rows.labels]
        try:
            return np.array([index[label] for label in labels], dtype=np.int64)
        except KeyError:
            at = next(i for i, label in enumerate(labels) if label not in index)
        label = rows.labels[at]
        if not label:
            raise UserError(f"{rows.where(at)} has no label: fill it in or remove the row.")
        raise UserError(
            f"{rows.where(at)}: the label {label!r:.60} is not one of the classes "
            f"{listed(self.labels)}: correct it; a class that the training data lack is named by "
            "data.labels=[...] when training."
        )

    def check_training(self, targets: Targets, rows: Rows, *, all_classes: bool) -> None:
        """Raise `UserError` for a class without a training example, where each must have one."""
        empty = [name for name, n in zip(self.labels, self._counts(targets), strict=True) if not n]
        if empty and all_classes:
            raise UserError(
                f"the class {empty[0]!r} has no training example in {rows.source}: "
                "add some, or remove the class."
            )

    def hold_out(self, targets: Targets, held: int, seed: int) -> tuple[Indices, Indices]:
        """Hold out of every class its share."""
        keep, out = stratified_split(targets.astype(np.int64), held, seed)
        if not len(out):
            raise UserError(
                "every class has one training example only, so none can be held out: "
                "give a validation split with --eval-data."
            )
        return keep, out

    def cautions(self, train: Targets, validation: Targets) -> Iterator[str]:
        """Yield which classes have one training example, or none to measure."""

        def having(number: int, targets: Targets) -> list[str]:
            counts = self._counts(targets)
            return [name for name, n in zip(self.labels, counts, strict=True) if n == number]

        if single := having(1, train):
            yield f"train has one example only of: {listed(single)}."
        if absent := having(0, validation):
            yield f"validation has no example of: {listed(absent)}; its score says nothing of them."

    def _counts(self, targets: Targets) -> NDArray[np.int64]:
        return np.bincount(targets.astype(np.int64), minlength=self.width)

    # --- training ------------------------------------------------------------------------------

    def fitted(self, targets: Targets, name: str, config: Config) -> Self:
        """Take the class weights that `train.class_weights` asks for."""
        weights = self._class_weights(targets, config)
        smoothing = config.loss.label_smoothing
        return replace(self, class_weights=weights, label_smoothing=smoothing)

    def _class_weights(self, targets: Targets, config: Config) -> tuple[float, ...] | None:
        """Return one weight per class: as given, or inverse to its frequency (mean 1)."""
        asked = config.train.class_weights
        if asked == "none":
            return None
        if asked == "balanced":
            even = len(targets) / (self.width * np.maximum(self._counts(targets), 1))
            return tuple(float(weight) for weight in even)
        if len(asked) != self.width:
            raise UserError(
                f"train.class_weights has {len(asked)} values, but there are {self.width} classes "
                f"({', '.join(self.labels)})."
            )
        return tuple(float(weight) for weight in asked)

    def example(self, config: Config) -> Self:
        """Return the task with equal class weights, if the config asks for any."""
        alike = None if config.train.class_weights == "none" else (1.0,) * self.width
        return replace(self, class_weights=alike, label_smoothing=config.loss.label_smoothing)

    def weights(self, targets: Targets) -> NDArray[np.float64]:
        """Return the weight of each example's class [n]."""
        if self.class_weights is None:
            return np.ones(len(targets))
        return np.asarray(self.class_weights)[targets.astype(np.int64)]

    def wanted(self, targets: Targets) -> Targets:
        """Return the class indices."""
        return targets

    def example_labels(self, batch: int, device: device) -> Tensor:
        """Return class 0 for all [B]."""
        import torch

        return torch.zeros(batch, dtype=torch.int64, device=device)

    def new_head(self, width: int) -> Head:
        """Return a linear head to C logits."""
        from mdpd_deploy.tasks.head import Head

        return Head(width, self.width, output=self.output)

    def loss(self, raw: Tensor, labels: Tensor) -> Tensor:
        """Σ weighted, smoothed cross-entropy."""
        from torch.nn.functional import cross_entropy

        raw = raw.float()
        weights = None if self.class_weights is None else raw.new_tensor(self.class_weights)
        return cross_entropy(
            raw, labels, weights, reduction="sum", label_smoothing=self.label_smoothing
        )

    def errors(self, raw: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of each example [B]."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(raw, labels, reduction="none")

    # --- what outputs mean ---------------------------------------------------------------------

    def decode(self, outputs: Mapping[str, Answers]) -> list[Prediction]:
        """Turn logits [n, C] into classes with their probabilities."""
        return [self._ranked(row) for row in outputs[self.output].astype(np.float64)]

    def _ranked(self, logits: NDArray[np.float64]) -> ClassPrediction:
        shares = softmax(logits[None])[0]
        order = np.argsort(-logits, kind="stable")  # shares of far logits are all 0
        ranked = {self.labels[int(index)]: float(shares[index]) for index in order}
        best = self.labels[int(order[0])]
        return ClassPrediction(best, ranked[best], ranked)

    def mistakes(self, targets: Targets, outputs: Answers) -> tuple[Answers, NDArray[np.bool_]]:
        """A wrong class is a mistake, and worse the surer the model was."""
        return softmax(outputs).max(1), outputs.argmax(1) != targets

    def floor(self, metrics: Sequence[str], train: Targets, targets: Targets) -> Values | None:
        """Return what always answering the most frequent class scores."""
        return majority(metrics, train.astype(np.int64), targets.astype(np.int64), self.width)

    def page(self) -> TaskPage:
        """Return the confusion matrix and its like."""
        from mdpd_deploy.tasks.classify.page import ClassPage

        return ClassPage(self)

    def unsaid(self, targets: Targets, outputs: Answers) -> str | None:
        """Name the classes that are there and never predicted."""
        said = set(outputs.argmax(axis=1).tolist())
        there = np.unique(targets.astype(np.int64)).tolist()
        never = [self.labels[index] for index in there if index not in said]
        return listed(never) if never else None


KINDS.register(Classify.kind)(Classify)


def softmax(outputs: Answers) -> Answers:
    """Return logits [n, C] as shares that sum to 1."""
    powers = np.exp(outputs - outputs.max(1, keepdims=True))
    shares: Answers = powers / powers.sum(1, keepdims=True)
    return shares


def sorted_names(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the distinct labels in order: by value if all are whole numbers, else by name."""
    names = {class_of(label) for label in labels if label}
    if all(name.removeprefix("-").isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def class_names(
    found: Iterable[str], given: Sequence[str] | None, own: Sequence[str] | None
) -> tuple[str, ...]:
    """Settle the class list: the user's order, else the data set's own, else the names found.

    Args:
        found: Labels of the training split.
        given: `data.labels`.
        own: The class list that belongs to the data set.

    Raises:
        UserError: If the list has doubles, leaves out a class of the data set, is too short, or
            holds a name that is no valid Unicode.
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
