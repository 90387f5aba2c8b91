"""What a trained model said about the evaluation data, and how a report shows it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mdpd_deploy.artifacts.scores import split_name
from mdpd_deploy.data.examples import Kind, Raw
from mdpd_deploy.report.charts import scatter_chart
from mdpd_deploy.report.page import Html, count, join, percent, picture, section, table, tag

MATRIX_CLASSES = 30  # more classes than this get a table of the worst confusions
SIDE_BY_SIDE_CLASSES = 10  # a matrix of so many leaves room beside it
WORST = 15  # rows of such a table


@dataclass(frozen=True)
class Sample:
    """One evaluation example that the report shows."""

    index: int  # its row in `Predictions.labels`
    raw: Raw


@dataclass(frozen=True)
class Predictions:
    """Outputs on the evaluation data, n examples and C classes (C = 1 for regression).

    Attributes:
        label_names: Class names in index order; empty for regression.
        kind: classify or regress.
        labels: int64 [n], or float64 [n] in the label's own unit.
        deployed: Outputs of the deployed model [n, C]: logits, or scores in the label's unit.
        side: Outputs of the side network [n, C]; None for a run without one.
        samples: Examples to show, see `pick_samples`.
        split: What the examples are.
    """

    label_names: tuple[str, ...]
    kind: Kind
    labels: NDArray[np.int64] | NDArray[np.float64]
    deployed: NDArray[np.floating]
    side: NDArray[np.floating] | None
    samples: tuple[Sample, ...] = ()
    split: str = "validation"

    def titled(self, title: str) -> str:
        """Return a section's title with the split and its size."""
        return f"{title} · {split_name(self.split, len(self.labels))}"


def pick_samples(
    inputs: Sequence[Raw],
    labels: NDArray[np.int64] | NDArray[np.float64],
    outputs: NDArray[np.floating],
    *,
    kind: Kind,
    most: int = 12,
) -> tuple[Sample, ...]:
    """Choose up to `most` examples: the worst mistakes for a half, the rest evenly spread.

    Classification: a mistake is worse the surer the model was. Regression: the farther it is.
    """
    error, wrong = _errors(labels, outputs, kind)
    order = np.argsort(-error, kind="stable")
    worst = [int(i) for i in order if wrong[i]][: most // 2]
    others = [i for i in range(len(labels)) if i not in set(worst) and not wrong[i]]
    spread = np.linspace(0, len(others) - 1, min(len(others), most - len(worst))).round()
    chosen = worst + [others[int(i)] for i in spread]
    return tuple(Sample(index, inputs[index]) for index in chosen)


def _errors(
    labels: NDArray[np.int64] | NDArray[np.float64], outputs: NDArray[np.floating], kind: Kind
) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    """Return how wrong each example is [n], and whether it counts as a mistake [n]."""
    if kind == "regress":
        error = np.abs(outputs[:, 0] - labels)
        return error, error > np.median(error)
    guess = outputs.argmax(1)
    return _softmax(outputs).max(1), guess != labels


def comparison(predictions: Predictions) -> Html:
    """Show labels, deployed predictions and, if there is one, the side network's, side by side."""
    parts = [outcome(predictions), agreement(predictions)]
    if len(predictions.label_names) > SIDE_BY_SIDE_CLASSES:
        return join(parts)
    return tag("div", parts, class_="pair")


def agreement(predictions: Predictions) -> Html | None:
    """Compare deployed model and side network; None for a run without a side network."""
    if predictions.side is None:
        return None
    if predictions.kind == "regress":
        title = predictions.titled("Agreement of side network and deployed model")
        return _agreement_of_scores(title, predictions.deployed[:, 0], predictions.side[:, 0])
    deployed, side = predictions.deployed.argmax(1), predictions.side.argmax(1)
    right, side_right = deployed == predictions.labels, side == predictions.labels
    n = len(right)

    def cell(chosen: NDArray[np.bool_]) -> Html:
        number = int(chosen.sum())
        return tag("td", tag("b", count(number)), " ", tag("small", percent(number / n)))

    rows = [
        tag("tr", tag("th", "deployed right"), cell(right & side_right), cell(right & ~side_right)),
        tag(
            "tr", tag("th", "deployed wrong"), cell(~right & side_right), cell(~right & ~side_right)
        ),
    ]
    head = tag("tr", tag("th"), tag("th", "side right"), tag("th", "side wrong"))
    return section(
        predictions.titled("Agreement of side network and deployed model"),
        tag("div", tag("table", head, rows), class_="scroll"),
        note=f"Same prediction for {percent(float((deployed == side).mean()))} of {count(n)} "
        "evaluation examples.",
    )


def _agreement_of_scores(
    title: str, deployed: NDArray[np.floating], side: NDArray[np.floating]
) -> Html:
    gap = np.abs(deployed - side)
    varied = len(gap) > 1 and deployed.std() > 0 and side.std() > 0
    related = f"{np.corrcoef(deployed, side)[0, 1]:.3f}" if varied else "undefined"
    return section(
        title,
        tag(
            "div",
            Html(scatter_chart(side, deployed, x_label="side", y_label="deployed")),
            class_="wide-chart",
        ),
        note=f"Correlation {related}; mean difference {gap.mean():.4g}, largest {gap.max():.4g}.",
    )


def outcome(predictions: Predictions) -> Html:
    """Show labels against the deployed model's predictions, as suits the task."""
    if predictions.kind == "regress":
        chart = scatter_chart(
            np.asarray(predictions.labels, dtype=float),
            predictions.deployed[:, 0],
            x_label="label",
            y_label="deployed prediction",
        )
        return section(
            predictions.titled("Predictions against labels"),
            tag("div", Html(chart), class_="wide-chart"),
            note="One dot per evaluation example; on the dashed line the prediction is exact.",
        )
    matrix = confusion_matrix(predictions)
    if len(predictions.label_names) <= MATRIX_CLASSES:
        return section(
            predictions.titled("Confusion matrix"),
            _matrix(matrix, predictions.label_names),
            note="Rows are labels, columns what the deployed model said; recall is at the right.",
        )
    return section(
        predictions.titled("Where it goes wrong"), _worst(matrix, predictions.label_names)
    )


def confusion_matrix(predictions: Predictions) -> NDArray[np.int64]:
    """Count examples by label (row) and deployed prediction (column): int64 [C, C]."""
    classes = len(predictions.label_names)
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


def samples(predictions: Predictions) -> Html | None:
    """Show the sample inputs with label and prediction; None when there are none."""
    if not predictions.samples:
        return None
    tiles = [_tile(predictions, sample) for sample in predictions.samples]
    text = isinstance(predictions.samples[0].raw, str | tuple)
    return section(
        predictions.titled("Examples"),
        tag("div", tiles, class_="samples text" if text else "samples"),
        note="The surest mistakes first, then examples spread over the evaluation data."
        if predictions.kind == "classify"
        else "The largest errors first, then examples spread over the evaluation data.",
    )


def _tile(predictions: Predictions, sample: Sample) -> Html:
    label, output = predictions.labels[sample.index], predictions.deployed[sample.index]
    if predictions.kind == "regress":
        said = [tag("div", f"predicted {output[0]:.4g}"), tag("small", f"label {label:.4g}")]
        return tag("div", _shown(sample.raw), said)
    guess = int(output.argmax())
    right = guess == int(label)
    names = predictions.label_names
    sure = percent(float(_softmax(output[None]).max()), 0)
    verdict = tag(
        "div",
        f"{'✓' if right else '✗'} {names[guess]} ",
        tag("small", sure),
        class_="right" if right else "wrong",
    )
    return tag(
        "div",
        _shown(sample.raw),
        verdict,
        None if right else tag("small", f"label: {names[int(label)]}"),
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


def _softmax(outputs: NDArray[np.floating]) -> NDArray[np.floating]:
    powers = np.exp(outputs - outputs.max(1, keepdims=True))
    shares: NDArray[np.floating] = powers / powers.sum(1, keepdims=True)
    return shares
