"""What a report shows of classes: confusion matrix, agreement, examples."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.report.page import Html, count, percent, section, table, tag
from mdpd_deploy.report.predictions import Predictions, TaskPage
from mdpd_deploy.tasks.base import Answers
from mdpd_deploy.tasks.classify.task import Classify, softmax

MATRIX_CLASSES = 30  # more classes than this get a table of the worst confusions
SIDE_BY_SIDE_CLASSES = 10  # a matrix of so many leaves room beside it
WORST = 15  # rows of such a table


class ClassPage(TaskPage):
    """Predictions of a class.

    Args:
        task: Gives the names.
    """

    samples_note = "The surest mistakes first, then examples spread over the evaluation data."

    def __init__(self, task: Classify) -> None:
        self.names = task.labels
        self.side_by_side = len(self.names) <= SIDE_BY_SIDE_CLASSES

    def outcome(self, predictions: Predictions) -> Html:
        """Show the confusion matrix, or the worst confusions where there are many classes."""
        matrix = confusion_matrix(predictions, len(self.names))
        if len(self.names) <= MATRIX_CLASSES:
            return section(
                predictions.titled("Confusion matrix"),
                _matrix(matrix, self.names),
                note="Rows are labels, columns what the deployed model said; recall is at the "
                "right.",
            )
        return section(predictions.titled("Where it goes wrong"), _worst(matrix, self.names))

    def agreement(self, predictions: Predictions, side: Answers) -> Html:
        """Count where deployed model and side network are right."""
        said, side_said = predictions.deployed.argmax(1), side.argmax(1)
        right, side_right = said == predictions.labels, side_said == predictions.labels
        n = len(right)

        def cell(chosen: NDArray[np.bool_]) -> Html:
            number = int(chosen.sum())
            return tag("td", tag("b", count(number)), " ", tag("small", percent(number / n)))

        rows = [
            tag(
                "tr",
                tag("th", f"deployed {word}"),
                cell(mine & side_right),
                cell(mine & ~side_right),
            )
            for word, mine in (("right", right), ("wrong", ~right))
        ]
        head = tag("tr", tag("th"), tag("th", "side right"), tag("th", "side wrong"))
        return section(
            predictions.titled("Agreement of side network and deployed model"),
            tag("div", tag("table", head, rows), class_="scroll"),
            note=f"Same prediction for {percent(float((said == side_said).mean()))} of {count(n)} "
            "evaluation examples.",
        )

    def verdict(self, label: float, output: Answers) -> list[Html | None]:
        """Say what was predicted of an example, how surely, and the label if that is another."""
        guess = int(output.argmax())
        right = guess == int(label)
        sure = percent(float(softmax(output[None]).max()), 0)
        said = f"{'✓' if right else '✗'} {self.names[guess]} "
        return [
            tag("div", said, tag("small", sure), class_="right" if right else "wrong"),
            None if right else tag("small", f"label: {self.names[int(label)]}"),
        ]


def confusion_matrix(predictions: Predictions, classes: int) -> NDArray[np.int64]:
    """Count examples by label (row) and deployed prediction (column): int64 [C, C]."""
    labels = predictions.labels.astype(np.int64)
    pairs = labels * classes + predictions.deployed.argmax(1)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def _matrix(matrix: NDArray[np.int64], names: Sequence[str]) -> Html:
    longest = max(map(len, names))
    upright = longest > 14 or (longest > 3 and len(names) > 4)
    head = [
        tag("th", tag("div", name, class_="upright" if upright else None), scope="col", title=name)
        for name in names
    ]
    rows = []
    for row, name in enumerate(names):
        total = int(matrix[row].sum())
        cells = [_shade(int(number), total) for number in matrix[row]]
        recall = percent(matrix[row, row] / total) if total else "none"
        title = tag("th", name, scope="row", title=name)
        rows.append(tag("tr", title, cells, tag("td", recall, class_="total")))
    body = [tag("thead", tag("tr", tag("th"), head, tag("th"))), tag("tbody", rows)]
    return tag("div", tag("table", body, class_="grid"), class_="scroll")


def _shade(number: int, total: int) -> Html:
    if number == 0:
        return tag("td", "·", class_="zero")
    share = number / total
    dense = "dense" if share > 0.55 else None
    return tag("td", count(number), class_=dense, style=f"--share: {0.08 + 0.87 * share:.3f}")


def _worst(matrix: NDArray[np.int64], names: Sequence[str]) -> Html:
    totals = matrix.sum(1)
    mistakes = matrix.copy()
    np.fill_diagonal(mistakes, 0)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:WORST]
    pairs = [(int(i) // len(names), int(i) % len(names)) for i in order]
    confused = [
        (names[a], names[b], count(int(matrix[a, b])), percent(matrix[a, b] / totals[a]))
        for a, b in pairs
        if mistakes[a, b]
    ]
    recall = np.diag(matrix) / np.maximum(totals, 1)
    seen = [int(i) for i in np.argsort(recall, kind="stable") if totals[i]][:WORST]
    weak = [(names[i], percent(float(recall[i])), count(int(totals[i]))) for i in seen]
    return tag(
        "div",
        [
            tag(
                "div",
                tag("h3", "Most frequent confusions"),
                table(["label", "predicted", "times", "of that label"], confused),
            ),
            tag("div", tag("h3", "Lowest recall"), table(["label", "recall", "examples"], weak)),
        ],
        class_="sides",
    )
