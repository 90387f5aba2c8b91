"""From what a reader found to a `TaskData`: numbers for labels, the validation split, the limit."""

from dataclasses import replace

import numpy as np

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.cells import class_of
from mdpd_deploy.data.examples import Split, TaskData
from mdpd_deploy.data.inventory import Inventory, many_left_out
from mdpd_deploy.data.rows import Rows, Source
from mdpd_deploy.data.splits import hold_out, subset
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import KINDS, Task
from mdpd_deploy.text import listed


def assemble(
    name: str,
    kind: str,
    source: Source,
    config: DataConfig,
    *,
    seed: int,
    metrics: tuple[str, ...] | None = None,
) -> TaskData:
    """Turn rows into examples with numeric labels.

    Without a validation split, a seeded share of the training examples is held out
    (`data.validation_fraction`, by class for classification). `data.limit` then keeps that many
    training examples after a seeded shuffle.

    Args:
        name: The task as typed.
        kind: A name of `KINDS`.
        source: What the reader found.
        config: The data options.
        seed: Seed of the split and of the shuffle.
        metrics: Metric names, the primary one first; default: the usual ones of `kind`.

    Raises:
        UserError: For a wrong or missing label, a class without examples, or too few examples.
    """
    rows = source.splits["train"]
    task = KINDS[kind].of_rows(name, rows, config.labels, source.names)
    train = to_split(rows, task)
    if len(train) < 2:
        raise UserError(f"{rows.source} holds one example only: give more to train on.")
    task.check_training(train.labels, rows, all_classes=source.all_classes)
    evaluation = {
        split: to_split(found, task) for split, found in source.splits.items() if split != "train"
    }
    notes, inventory = list(source.notes), source.inventory
    if "validation" not in evaluation:
        count = hold_out(len(train), config.validation_fraction)
        keep, out = task.hold_out(train.labels, count, seed)
        train, held = subset(train, keep), subset(train, out)
        evaluation = {"validation": held, **evaluation}
        notes.append(
            f"no validation split was given: {len(held)} of {len(rows)} training examples were "
            f"held out at random (data.validation_fraction={config.validation_fraction}, "
            f"seed {seed})."
        )
    if config.limit is not None and config.limit < len(train):
        beyond = many_left_out("training examples beyond data.limit", len(train) - config.limit)
        inventory += beyond
        order = np.random.RandomState(seed).permutation(len(train))
        train = subset(train, order[: config.limit])
        if lost := sorted(set(range(len(task.labels))) - set(train.labels.astype(int).tolist())):
            gone = listed([task.labels[i] for i in lost])
            notes.append(f"data.limit leaves no training example of: {gone}.")
    return TaskData(
        name=name,
        task=task,
        fields=source.fields,
        metrics=metrics or task.usual_metrics,
        train=train,
        evaluation=evaluation,
        columns=source.columns,
        notes=tuple(notes),
        inventory=inventory + Inventory(used_of(train, evaluation)),
    )


def used_of(train: Split, evaluation: dict[str, Split]) -> dict[str, int]:
    """Return the number of examples by split."""
    return {"train": len(train), **{name: len(split) for name, split in evaluation.items()}}


def to_split(rows: Rows, task: Task) -> Split:
    """Turn the labels of one split into numbers."""
    if not len(rows):
        raise UserError(f"{rows.source} holds no examples: give it at least one.")
    return Split(rows.inputs, task.targets(rows))


def without_unlabelled_test(splits: dict[str, Rows]) -> tuple[dict[str, Rows], Inventory]:
    """Drop a `test` split none of whose rows has a label (as competitions publish it)."""
    test = splits.get("test")
    if test is None or any(test.labels):
        return splits, Inventory()
    kept = {name: rows for name, rows in splits.items() if name != "test"}
    return kept, many_left_out("test examples without labels", len(test), test.source)


def relabelled(split: Rows, mapping: dict[str, str]) -> Rows:
    """Return rows with labels replaced as `mapping` says; others stay for the check to name."""
    return replace(split, labels=[mapping.get(class_of(label), label) for label in split.labels])
