"""Metrics against formulas written out by hand."""

import math

import numpy as np
import pytest

from mdpd_deploy.errors import UserError, WorkFailed
from mdpd_deploy.tasks.metrics import METRICS, agree, compute, is_better, majority


def logits(predictions: list[int], classes: int) -> np.ndarray:
    """Outputs [n, C] whose largest entry is the prediction."""
    return np.eye(classes, dtype=np.float32)[predictions] * 3 - 1


TRUTH = [1, 1, 1, 0, 0, 0, 1, 0]
GUESS = [1, 0, 1, 0, 1, 1, 1, 0]  # TP 3, FN 1, FP 2, TN 2


def binary(*names: str) -> dict[str, float | None]:
    return compute(names, logits(GUESS, 2), np.array(TRUTH))


def test_binary_metrics_by_hand() -> None:
    tp, fn, fp, tn = 3, 1, 2, 2
    accuracy = (tp + tn) / 8
    f1 = 2 * tp / (2 * tp + fp + fn)
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    found = binary("accuracy", "f1", "matthews", "accuracy_f1", "balanced_accuracy")
    assert found == pytest.approx(
        {
            "accuracy": accuracy,
            "f1": f1,
            "matthews": (tp * tn - fp * fn) / root,
            "accuracy_f1": (accuracy + f1) / 2,
            "balanced_accuracy": (tp / 4 + tn / 4) / 2,
        }
    )
    assert list(found) == ["accuracy", "f1", "matthews", "accuracy_f1", "balanced_accuracy"]


def test_macro_f1_over_three_classes() -> None:
    # class 0: P 1/1 R 1/2; class 1: P 1/2 R 1/1; class 2: P 1/1 R 1/1
    found = compute(["f1_macro"], logits([0, 1, 1, 2], 3), np.array([0, 0, 1, 2]))
    assert found["f1_macro"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_regression_metrics_by_hand() -> None:
    scores = np.array([1.0, 2.0, 3.0, 10.0])
    labels = np.array([1.0, 3.0, 2.0, 4.0])
    x, y = scores - scores.mean(), labels - labels.mean()
    pearson = (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())
    spearman = 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15)
    found = compute(
        ["pearson", "spearman", "pearson_spearman", "rmse", "mae"], scores[:, None], labels
    )
    assert found == pytest.approx(
        {
            "pearson": pearson,
            "spearman": spearman,
            "pearson_spearman": (pearson + spearman) / 2,
            "rmse": math.sqrt((0 + 1 + 1 + 36) / 4),
            "mae": 8 / 4,
        }
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["pearson", "spearman", "pearson_spearman"])
def test_undefined_correlations_are_none(name: str) -> None:
    assert compute([name], np.full((3, 1), 2.5), np.array([1.0, 2.0, 3.0])) == {name: None}
    assert compute([name], np.array([[1.0], [2.0]]), np.array([3.0, 3.0])) == {name: None}
    assert compute([name], np.array([[1.0]]), np.array([3.0])) == {name: None}
    rounding = np.array([[2.5], [np.nextafter(np.float32(2.5), 3)], [2.5]], dtype=np.float32)
    assert compute([name], rounding, np.array([1.0, 2.0, 3.0])) == {name: None}


def test_matthews_of_one_class_only() -> None:
    truth = np.array([0, 1, 1])
    assert compute(["matthews"], logits([1, 1, 1], 2), truth) == {"matthews": 0.0}  # as GLUE has it
    assert compute(["matthews"], logits([0, 1, 1], 2), np.array([1, 1, 1])) == {"matthews": None}


def test_f1_is_undefined_only_where_its_class_is_nowhere() -> None:
    nowhere, missed = np.array([0, 0, 0]), np.array([0, 1, 0])
    assert compute(["f1", "accuracy_f1"], logits([0, 0, 0], 2), nowhere) == {
        "f1": None,
        "accuracy_f1": None,
    }
    assert compute(["f1"], logits([0, 0, 0], 2), missed) == {"f1": 0.0}
    assert compute(["f1"], logits([0, 1, 0], 2), nowhere) == {"f1": 0.0}


def test_an_undefined_metric_beats_none_and_agrees_with_itself_only() -> None:
    assert is_better(0.1, None) and is_better(0.2, 0.1)
    assert not is_better(None, None) and not is_better(None, -1.0) and not is_better(0.1, 0.1)
    assert agree(None, None, 0.0) and not agree(None, 0.0, 1.0) and not agree(0.0, None, 1.0)
    assert agree(0.5, 0.6, 0.2) and not agree(0.5, 0.8, 0.2)


@pytest.mark.filterwarnings("error")
def test_one_class_only_is_no_warning() -> None:
    found = compute(
        ["accuracy", "f1", "f1_macro", "matthews", "balanced_accuracy"],
        logits([0, 0, 0], 2),
        np.array([0, 0, 0]),
    )
    assert found == {
        "accuracy": 1.0,
        "f1": None,
        "f1_macro": 1.0,
        "matthews": None,
        "balanced_accuracy": 1.0,
    }


@pytest.mark.filterwarnings("error")
def test_a_class_that_is_only_predicted_does_not_enter_balanced_accuracy() -> None:
    found = compute(["balanced_accuracy"], logits([0, 2], 3), np.array([0, 1]))
    assert found == {"balanced_accuracy": 0.5}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_not_finite_fail_the_work(bad: float) -> None:
    outputs = logits(GUESS, 2)
    outputs[3, 1] = bad
    with pytest.raises(WorkFailed, match="1 of 8 outputs are not finite"):
        compute(["accuracy"], outputs, np.array(TRUTH))


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'matthews'"):
        binary("mathews")


def test_every_metric_is_a_plain_float() -> None:
    for name in METRICS:
        assert type(binary(name)[name]) is float


def test_majority_is_the_score_of_one_constant_answer():
    train, labels = np.array([0, 1, 1, 2]), np.array([1, 1, 1, 0])
    floor = majority(["accuracy", "f1"], train, labels % 2, 3)
    assert floor["accuracy"] == pytest.approx(0.75)
    assert floor["f1"] == pytest.approx(2 * 0.75 / 1.75)
