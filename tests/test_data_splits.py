"""Seeded splits, subsets and label handling."""

import numpy as np
import pytest

from mdpd_deploy.data.examples import Lazy, Split
from mdpd_deploy.data.splits import hold_out, random_split, stratified_split, subset
from mdpd_deploy.tasks.classify.task import sorted_names


def test_stratified_split_is_exact_and_fair() -> None:
    labels = np.array([0] * 60 + [1] * 30 + [2] * 10)
    keep, held = stratified_split(labels, 20, seed=3)
    assert np.array_equal(np.bincount(labels[held]), [12, 6, 2])
    assert np.array_equal(np.sort(np.concatenate([keep, held])), np.arange(100))


def test_largest_remainder_gets_the_odd_ones() -> None:
    labels = np.array([0] * 7 + [1] * 2 + [2] * 1)  # shares of 5: 3.5, 1.0, 0.5 (no room)
    _, held = stratified_split(labels, 5, seed=0)
    assert np.array_equal(np.bincount(labels[held], minlength=3), [4, 1, 0])


def test_every_class_keeps_an_example() -> None:
    labels = np.array([0, 1, 2, 3, 3, 3])
    keep, held = stratified_split(labels, 5, seed=0)
    assert set(labels[keep]) == {0, 1, 2, 3}
    assert len(held) == 2  # all that the classes can spare


def test_splits_depend_on_the_seed_only() -> None:
    labels = np.arange(200) % 2
    first, second = stratified_split(labels, 20, 7)[1], stratified_split(labels, 20, 7)[1]
    assert np.array_equal(first, second)
    assert not np.array_equal(first, stratified_split(labels, 20, 8)[1])
    assert not np.array_equal(random_split(200, 20, 7)[1], random_split(200, 20, 8)[1])


def test_random_split_is_a_partition() -> None:
    keep, held = random_split(11, 3, seed=1)
    assert len(held) == 3
    assert np.array_equal(np.sort(np.concatenate([keep, held])), np.arange(11))


@pytest.mark.parametrize(("n", "fraction", "held"), [(100, 0.1, 10), (3, 0.1, 1), (2, 0.9, 1)])
def test_hold_out_leaves_something_on_both_sides(n: int, fraction: float, held: int) -> None:
    assert hold_out(n, fraction) == held


def test_subset_keeps_lazy_inputs_lazy() -> None:
    read: list[int] = []

    class Watched(tuple):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    part = subset(Split(Watched(("a", "b", "c", "d")), np.arange(4)), np.array([3, 1]))
    assert not read
    assert isinstance(part.inputs, Lazy)
    assert (part.inputs[0], part.inputs[1], len(part)) == ("d", "b", 2)
    assert list(part.inputs[1:]) == ["b"]
    assert np.array_equal(part.labels, [3, 1])


def test_subset_of_a_list_is_a_list() -> None:
    assert subset(Split(["a", "b"], np.arange(2)), np.array([1])).inputs == ["b"]


def test_names_sort_by_value_when_all_are_whole_numbers() -> None:
    assert sorted_names(["10", "2", "1"]) == ("1", "2", "10")
    assert sorted_names(["10", "b", "2", ""]) == ("10", "2", "b")
    assert sorted_names(["1", "-1"]) == ("-1", "1")
