"""What a trained model said about the evaluation data, and how a report shows it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from mdpd_deploy.artifacts.scores import split_name
from mdpd_deploy.data.examples import Raw
from mdpd_deploy.report.page import Html, join, picture, section, tag
from mdpd_deploy.tasks.base import Answers, Targets, Task


@dataclass(frozen=True)
class Sample:
    """One evaluation example that the report shows."""

    index: int  # its row in `Predictions.labels`
    raw: Raw


@dataclass(frozen=True)
class Predictions:
    """Answers on the evaluation data, n examples and C outputs.

    Attributes:
        task: What was learnt.
        labels: What the task makes of the labels [n].
        deployed: Answers of the deployed model [n, C].
        side: Answers of the side network [n, C]; None for a run without one.
        samples: Examples to show, see `pick_samples`.
        split: What the examples are.
    """

    task: Task
    labels: Targets
    deployed: Answers
    side: Answers | None
    samples: tuple[Sample, ...] = ()
    split: str = "validation"

    def titled(self, title: str) -> str:
        """Return a section's title with the split and its size."""
        return f"{title} · {split_name(self.split, len(self.labels))}"


class TaskPage(ABC):
    """How a report shows predictions of one kind of task.

    Attributes:
        samples_note: In which order examples are shown.
        side_by_side: Whether outcome and agreement fit beside each other.
    """

    samples_note: ClassVar[str]
    side_by_side: bool = True

    @abstractmethod
    def outcome(self, predictions: Predictions) -> Html:
        """Show labels against the deployed model's predictions."""

    @abstractmethod
    def agreement(self, predictions: Predictions, side: Answers) -> Html:
        """Compare deployed model and side network."""

    @abstractmethod
    def verdict(self, label: float, output: Answers) -> list[Html | None]:
        """Say what was predicted of an example [C], and its label."""


def pick_samples(
    task: Task, inputs: Sequence[Raw], labels: Targets, outputs: Answers, *, most: int = 12
) -> tuple[Sample, ...]:
    """Choose up to `most` examples: the worst mistakes for a half, the rest evenly spread."""
    error, wrong = task.mistakes(labels, outputs)
    order = np.argsort(-error, kind="stable")
    worst = [int(i) for i in order if wrong[i]][: most // 2]
    others = [i for i in range(len(labels)) if i not in set(worst) and not wrong[i]]
    spread = np.linspace(0, len(others) - 1, min(len(others), most - len(worst))).round()
    chosen = worst + [others[int(i)] for i in spread]
    return tuple(Sample(index, inputs[index]) for index in chosen)


def comparison(predictions: Predictions) -> Html:
    """Show labels, deployed predictions and, if there is one, the side network's, side by side."""
    page, side = predictions.task.page(), predictions.side
    parts = [page.outcome(predictions), None if side is None else page.agreement(predictions, side)]
    return tag("div", parts, class_="pair") if page.side_by_side else join(parts)


def samples(predictions: Predictions) -> Html | None:
    """Show the sample inputs with label and prediction; None when there are none."""
    if not predictions.samples:
        return None
    page = predictions.task.page()
    tiles = [
        tag(
            "div",
            _shown(sample.raw),
            page.verdict(predictions.labels[sample.index], predictions.deployed[sample.index]),
        )
        for sample in predictions.samples
    ]
    text = isinstance(predictions.samples[0].raw, str | tuple)
    return section(
        predictions.titled("Examples"),
        tag("div", tiles, class_="samples text" if text else "samples"),
        note=page.samples_note,
    )


def _shown(raw: Raw) -> Html | list[Html]:
    if isinstance(raw, str):
        return tag("q", _short(raw))
    if isinstance(raw, tuple):
        return [tag("q", _short(text)) for text in raw]
    if isinstance(raw, Image.Image):
        return picture(raw)
    from mdpd_deploy.data.images import open_image

    return picture(open_image(raw))


def _short(text: str, most: int = 280) -> str:
    return text if len(text) <= most else text[:most].rstrip() + "…"
