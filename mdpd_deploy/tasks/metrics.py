"""Task metrics from outputs and labels, by scikit-learn and scipy. No torch here.

Metrics of correlation and of correctness are fractions in [-1, 1]; `rmse` and `mae` are in
the label's own unit. The combined ones are GLUE's: MRPC and QQP report the mean of accuracy and
F1, STS-B the mean of Pearson and Spearman.

A metric that the data leave without a value, such as the correlation with labels that are all the
same, is None: undefined, and not 0.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.errors import WorkFailed
from mdpd_deploy.registry import Registry

Numbers = NDArray[np.float64]
Values = dict[str, float | None]  # metric name → value, None where it is undefined
Metric = Callable[[Numbers, Numbers], float]

LOWER_IS_BETTER = frozenset({"rmse", "mae"})

_UNDEFINED = math.nan
GROUPS = 50  # of examples, of which one is left out at a time
_RESOLUTION = 1e-6  # of a score's size: what differs by less is the same in float32

# What an undefined ratio counts; scikit-learn takes numbers here but annotates its default "warn".
_ZERO: Any = 0

# Each entry maps (predictions [n], labels [n]) to a number; predictions are class indices or scores.
METRICS: Registry[Metric] = Registry("metric")


def compute(
    names: Sequence[str],
    outputs: NDArray[np.floating],
    labels: NDArray[np.int64] | NDArray[np.float64],
) -> Values:
    """Measure predictions against labels.

    Args:
        names: Names of `METRICS`, in the order wanted.
        outputs: Logits [n, C], or scores [n, 1] in the label's unit for regression.
        labels: Class indices [n], or scores [n].

    Returns:
        Name to value: a finite plain float, or None where the metric is undefined.

    Raises:
        UserError: For an unknown metric name.
        WorkFailed: If an output is NaN or infinite.
    """
    metrics = {name: METRICS.get_or_raise(name) for name in names}
    if outputs.ndim != 2 or len(outputs) != len(labels) or not len(labels):
        raise ValueError(f"outputs {outputs.shape} do not fit {len(labels)} labels")
    wrong = int((~np.isfinite(outputs)).any(axis=1).sum())
    if wrong:
        raise WorkFailed(
            f"{wrong} of {len(outputs)} outputs are not finite, so nothing can be measured: "
            "training diverged or the precision overflowed; lower optim.lr or use fp32."
        )
    predictions = (
        outputs[:, 0].astype(np.float64)
        if outputs.shape[1] == 1
        else outputs.argmax(axis=1).astype(np.float64)
    )
    truth = labels.astype(np.float64)
    values = {name: float(metric(predictions, truth)) for name, metric in metrics.items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def pseudo_values(
    name: str, outputs: NDArray[np.floating], labels: NDArray[np.int64] | NDArray[np.float64]
) -> Numbers | None:
    """Return the jackknife's values of a metric: how it would be on groups of examples [G].

    Their mean is the metric (less its bias), their spread that of the examples: each is G times
    the metric less G − 1 times the metric without that group (Tukey 1958). Every G-th example makes
    a group, so that two models' values on the same examples can be subtracted.

    Args:
        name: Of `METRICS`.
        outputs: As for `compute`.
        labels: The same.

    Returns:
        None where the metric is undefined on the whole or without a group.
    """
    count = min(GROUPS, len(labels))
    group = np.arange(len(labels)) % count
    whole = compute([name], outputs, labels)[name]
    without = [compute([name], outputs[group != g], labels[group != g])[name] for g in range(count)]
    if whole is None or any(value is None for value in without):
        return None
    return count * whole - (count - 1) * np.array(without, dtype=np.float64)


def is_better(value: float | None, best: float | None) -> bool:
    """Return whether a metric beats another one; an undefined one beats none."""
    return value is not None and (best is None or value > best)


def agree(value: float | None, expected: float | None, allowed: float) -> bool:
    """Return whether a metric is within `allowed` of what is expected, or undefined as that is."""
    if value is None or expected is None:
        return value is expected
    return abs(value - expected) <= allowed


def metric_text(value: float | None) -> str:
    """Return a metric as a table shows it."""
    return "undefined" if value is None else f"{value:.4f}"


def majority(
    names: Sequence[str], train: NDArray[np.int64], labels: NDArray[np.int64], classes: int
) -> Values:
    """Measure what the most frequent training class scores: the floor of any classifier.

    Args:
        names: Names of `METRICS`.
        train: Class indices of the training examples.
        labels: Class indices to measure against.
        classes: C.
    """
    counts = np.bincount(train, minlength=classes)
    always = np.zeros((len(labels), classes), dtype=np.float32)
    always[:, int(counts.argmax())] = 1
    return compute(names, always, labels)


@METRICS.register("accuracy")
def accuracy(predictions: Numbers, labels: Numbers) -> float:
    """Share of right predictions."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


@METRICS.register("balanced_accuracy")
def balanced_accuracy(predictions: Numbers, labels: Numbers) -> float:
    """Mean over the classes present in the labels of the share found (mean recall)."""
    from sklearn.metrics import recall_score

    return float(
        recall_score(
            labels, predictions, labels=np.unique(labels), average="macro", zero_division=_ZERO
        )
    )


@METRICS.register("f1")
def f1(predictions: Numbers, labels: Numbers) -> float:
    """F1 of class 1, the positive class of two; undefined if it is neither there nor predicted."""
    from sklearn.metrics import f1_score

    if not (labels == 1).any() and not (predictions == 1).any():
        return _UNDEFINED
    return float(f1_score(labels == 1, predictions == 1, average="binary", zero_division=_ZERO))


@METRICS.register("f1_macro")
def f1_macro(predictions: Numbers, labels: Numbers) -> float:
    """Mean of the F1 of every class that occurs in the labels or the predictions."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=_ZERO))


@METRICS.register("matthews")
def matthews(predictions: Numbers, labels: Numbers) -> float:
    """Matthews correlation; undefined if all labels are of one class.

    If all predictions are of one class it is 0, as GLUE's own figures have it.
    """
    from sklearn.metrics import matthews_corrcoef

    if _constant(labels):
        return _UNDEFINED
    if _constant(predictions):
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


@METRICS.register("pearson")
def pearson(predictions: Numbers, labels: Numbers) -> float:
    """Pearson correlation; undefined if all labels, or all predictions, are the same."""
    from scipy.stats import pearsonr

    if _constant(predictions) or _constant(labels):
        return _UNDEFINED
    found: Any = pearsonr(predictions, labels)
    return float(found.statistic)


@METRICS.register("spearman")
def spearman(predictions: Numbers, labels: Numbers) -> float:
    """Spearman rank correlation; undefined where Pearson's is."""
    from scipy.stats import spearmanr

    if _constant(predictions) or _constant(labels):
        return _UNDEFINED
    found: Any = spearmanr(predictions, labels)
    return float(found.statistic)


@METRICS.register("accuracy_f1")
def accuracy_f1(predictions: Numbers, labels: Numbers) -> float:
    """GLUE's figure for MRPC and QQP: the mean of accuracy and F1."""
    return (accuracy(predictions, labels) + f1(predictions, labels)) / 2


@METRICS.register("pearson_spearman")
def pearson_spearman(predictions: Numbers, labels: Numbers) -> float:
    """GLUE's figure for STS-B: the mean of Pearson and Spearman."""
    return (pearson(predictions, labels) + spearman(predictions, labels)) / 2


@METRICS.register("rmse")
def rmse(predictions: Numbers, labels: Numbers) -> float:
    """Root of the mean squared error, in the label's unit."""
    return float(np.sqrt(np.mean((predictions - labels) ** 2)))


@METRICS.register("mae")
def mae(predictions: Numbers, labels: Numbers) -> float:
    """Mean absolute error, in the label's unit."""
    return float(np.mean(np.abs(predictions - labels)))


def _constant(values: Numbers) -> bool:
    return bool(np.ptp(values) <= _RESOLUTION * np.abs(values).max())
