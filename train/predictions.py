"""What a trained model said about the evaluation data, as the numbers that a report shows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.charts import scatter_chart
from mdpd_deploy.data.examples import Kind, Raw
from mdpd_deploy.data.images import open_image
from mdpd_deploy.page import count, percent, picture
from mdpd_deploy.scores import split_name

WORST = 15  # rows of a table of confusions
TEXT = 280  # characters of a text that are shown


@dataclass(frozen=True)
class Sample:
    """One evaluation example that the report shows."""

    index: int  # its row in `Predictions.labels`
    raw: Raw


@dataclass(frozen=True)
class Tile:
    """A sample as it is shown.

    Attributes:
        texts: Of a text example.
        picture: An element of HTML; empty for a text.
        said: The prediction.
        sure: How sure the model is; empty for a score.
        label: Where it is not what was predicted, or a score; else empty.
        verdict: right, wrong, or empty for a score.
    """

    texts: list[str]
    picture: str
    said: str
    sure: str
    label: str
    verdict: str


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

    def scatter(self) -> str:
        """Draw labels against predicted scores."""
        labels = np.asarray(self.labels, dtype=float)
        return scatter_chart(
            labels, self.deployed[:, 0], x_label="label", y_label="deployed prediction"
        )

    def side_scatter(self) -> str:
        """Draw the side network's scores against the deployed model's."""
        assert self.side is not None
        return scatter_chart(
            self.side[:, 0], self.deployed[:, 0], x_label="side", y_label="deployed"
        )

    def agreement(self) -> tuple[str, dict[str, tuple[int, int]]]:
        """Compare deployed model and side network.

        Returns:
            A sentence, and for classes how often the side network is right and wrong, by whether
            the deployed model is.
        """
        assert self.side is not None
        if self.kind == "regress":
            return _correlation(self.deployed[:, 0], self.side[:, 0]), {}
        deployed, side = self.deployed.argmax(1), self.side.argmax(1)
        right, side_right = deployed == self.labels, side == self.labels
        words = (
            f"Same prediction for {percent(float((deployed == side).mean()))} of "
            f"{count(len(right))} evaluation examples."
        )
        return words, {
            "deployed right": (int((right & side_right).sum()), int((right & ~side_right).sum())),
            "deployed wrong": (int((~right & side_right).sum()), int((~right & ~side_right).sum())),
        }

    def tiles(self) -> list[Tile]:
        """Return the samples as they are shown."""
        return [self._tile(sample) for sample in self.samples]

    def _tile(self, sample: Sample) -> Tile:
        texts, shown = _shown(sample.raw)
        label, output = self.labels[sample.index], self.deployed[sample.index]
        if self.kind == "regress":
            return Tile(texts, shown, f"predicted {output[0]:.4g}", "", f"label {label:.4g}", "")
        guess, true = int(output.argmax()), int(label)
        right, names = guess == true, self.label_names
        return Tile(
            texts,
            shown,
            f"{'✓' if right else '✗'} {names[guess]}",
            percent(float(_softmax(output[None]).max()), 0),
            "" if right else f"label: {names[true]}",
            "right" if right else "wrong",
        )


def _correlation(deployed: NDArray[np.floating], side: NDArray[np.floating]) -> str:
    gap = np.abs(deployed - side)
    varied = len(gap) > 1 and deployed.std() > 0 and side.std() > 0
    related = f"{np.corrcoef(deployed, side)[0, 1]:.3f}" if varied else "undefined"
    return f"Correlation {related}; mean difference {gap.mean():.4g}, largest {gap.max():.4g}."


def _shown(raw: Raw) -> tuple[list[str], str]:
    if not isinstance(raw, str | tuple):
        return [], picture(open_image(raw))
    texts = [raw] if isinstance(raw, str) else raw
    return [t if len(t) <= TEXT else t[:TEXT].rstrip() + "…" for t in texts], ""


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
    if kind == "regress":
        error = np.abs(outputs[:, 0] - labels)
        wrong = error > np.median(error)
    else:
        error, wrong = _softmax(outputs).max(1), outputs.argmax(1) != labels
    order = np.argsort(-error, kind="stable")
    worst = [int(i) for i in order if wrong[i]][: most // 2]
    others = np.flatnonzero(~wrong)
    spread = np.linspace(0, len(others) - 1, min(len(others), most - len(worst))).round()
    chosen = worst + [int(others[int(i)]) for i in spread]
    return tuple(Sample(index, inputs[index]) for index in chosen)


def confusion_matrix(predictions: Predictions) -> NDArray[np.int64]:
    """Count examples by label (row) and deployed prediction (column): int64 [C, C]."""
    classes = len(predictions.label_names)
    labels = predictions.labels.astype(np.int64)
    pairs = labels * classes + predictions.deployed.argmax(1)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def worst_confusions(predictions: Predictions) -> list[tuple[str, str, str, str]]:
    """Return label, prediction, how often, and its share of the label: the most frequent first."""
    matrix, names = confusion_matrix(predictions), predictions.label_names
    totals = matrix.sum(1)
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix, axis=None, kind="stable")[:WORST]
    pairs = [divmod(int(i), len(names)) for i in order]
    return [
        (names[a], names[b], count(int(matrix[a, b])), percent(matrix[a, b] / totals[a]))
        for a, b in pairs
        if matrix[a, b]
    ]


def lowest_recalls(predictions: Predictions) -> list[tuple[str, str, str]]:
    """Return label, recall and number of examples of the classes that are found least."""
    matrix = confusion_matrix(predictions)
    totals = matrix.sum(1)
    recall = np.diag(matrix) / np.maximum(totals, 1)
    seen = [int(i) for i in np.argsort(recall, kind="stable") if totals[i]][:WORST]
    names = predictions.label_names
    return [(names[i], percent(float(recall[i])), count(int(totals[i]))) for i in seen]


def _softmax(outputs: NDArray[np.floating]) -> NDArray[np.floating]:
    powers = np.exp(outputs - outputs.max(1, keepdims=True))
    shares: NDArray[np.floating] = powers / powers.sum(1, keepdims=True)
    return shares
