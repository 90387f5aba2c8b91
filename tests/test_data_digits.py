"""The embedded digits."""

from typing import Any

import numpy as np
import pytest
from sklearn import datasets

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.load import load_evaluation, load_task
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Classify

DIGITS: Any = datasets.load_digits()


def test_the_split_is_fair_and_seeded() -> None:
    data = load_task("digits", DataConfig(), seed=0)
    validation = data.evaluation["validation"]
    assert (len(data.train), len(validation), list(data.evaluation)) == (1000, 797, ["validation"])
    assert data.task.labels == tuple("0123456789")
    whole = np.bincount(DIGITS.target)
    part = np.bincount(validation.labels)
    assert np.abs(part - whole * 797 / 1797).max() < 1
    assert np.array_equal(np.bincount(data.train.labels) + part, whole)
    other = load_task("digits", DataConfig(), seed=1)
    assert not np.array_equal(other.evaluation["validation"].labels, validation.labels)


def test_pictures_are_the_digits() -> None:
    data: Any = load_task("digits", DataConfig(), seed=0)
    pixels = {np.asarray(x).tobytes() for x in data.train.inputs}
    expected = np.rint(DIGITS.images * 255 / 16).astype(np.uint8)
    assert pixels <= {image.tobytes() for image in expected}
    assert data.train.inputs[0].size == (8, 8)
    assert max(int(np.asarray(x).max()) for x in data.train.inputs) == 255


def test_options_that_do_not_apply_are_refused() -> None:
    with pytest.raises(UserError, match=r"digits does not use data\.path"):
        load_task("digits", DataConfig(path="x"), seed=0)


def test_evaluation_of_a_known_model_keeps_its_class_order() -> None:
    names = tuple("9876543210")
    found = load_evaluation("digits", Classify(tuple(names)), DataConfig(), seed=0)["validation"]
    plain = load_task("digits", DataConfig(), seed=0).evaluation["validation"]
    assert np.array_equal(found.labels, 9 - plain.labels)
