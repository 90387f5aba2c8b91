"""From what a reader found to a `TaskData`: classes, numbers, the validation split, the limit."""

from dataclasses import replace

import numpy as np

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.cells import class_of
from mdpd_deploy.data.examples import Kind, Split, TaskData
from mdpd_deploy.data.inventory import Inventory, many_left_out
from mdpd_deploy.data.labels import class_indices, class_names, listed, require_every_class, scores
from mdpd_deploy.data.rows import Rows, Source
from mdpd_deploy.data.splits import hold_out, random_split, stratified_split, subset
from mdpd_deploy.errors import UserError

CLASSIFY_METRICS = ("accuracy", "f1_macro")
REGRESS_METRICS = ("pearson_spearman", "pearson", "spearman", "rmse", "mae")


def assemble(
    task: str,
    kind: Kind,
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
        task: The task as typed.
        kind: classify or regress.
        source: What the reader found.
        config: The data options.
        seed: Seed of the split and of the shuffle.
        metrics: Metric names, the primary one first; default: the usual ones of `kind`.

    Raises:
        UserError: For a wrong or missing label, a class without examples, or too few examples.
    """
    rows = source.splits["train"]
    names: tuple[str, ...] = ()
    if kind == "classify":
        names = class_names(rows.labels, config.labels, source.names)
    elif config.labels is not None:
        raise UserError(f"--task {task} is a regression and has no classes: leave out data.labels.")
    train = to_split(rows, names)
    _check_training(train, rows, names, all_classes=source.all_classes)
    evaluation = {
        name: to_split(found, names) for name, found in source.splits.items() if name != "train"
    }
    notes, inventory = list(source.notes), source.inventory
    if "validation" not in evaluation:
        train, held = _hold_out(train, config.validation_fraction, seed, by_class=bool(names))
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
        if lost := sorted(set(range(len(names))) - set(train.labels.astype(int).tolist())):
            notes.append(
                f"data.limit leaves no training example of: {listed([names[i] for i in lost])}."
            )
    return TaskData(
        task=task,
        kind=kind,
        modality=source.modality,
        pair=source.pair,
        label_names=names,
        metrics=metrics or (CLASSIFY_METRICS if kind == "classify" else REGRESS_METRICS),
        train=train,
        evaluation=evaluation,
        columns=source.columns,
        notes=tuple(notes),
        inventory=inventory + Inventory(used_of(train, evaluation)),
    )


def used_of(train: Split, evaluation: dict[str, Split]) -> dict[str, int]:
    """Return the number of examples by split."""
    return {"train": len(train), **{name: len(split) for name, split in evaluation.items()}}


def to_split(rows: Rows, names: tuple[str, ...]) -> Split:
    """Turn the labels of one split into class indices, or into scores when `names` is empty."""
    if not len(rows):
        raise UserError(f"{rows.source} holds no examples: give it at least one.")
    return Split(rows.inputs, class_indices(rows, names) if names else scores(rows))


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


def _check_training(train: Split, rows: Rows, names: tuple[str, ...], *, all_classes: bool) -> None:
    if len(train) < 2:
        raise UserError(f"{rows.source} holds one example only: give more to train on.")
    if not names and np.ptp(train.labels) == 0:
        raise UserError(
            f"every label in {rows.source} is {train.labels[0]:g}: there is nothing to learn, "
            "check --label."
        )
    if names and all_classes:
        require_every_class(train.labels.astype(np.int64), names, rows.source)


def _hold_out(train: Split, fraction: float, seed: int, *, by_class: bool) -> tuple[Split, Split]:
    held = hold_out(len(train), fraction)
    if by_class:
        keep, out = stratified_split(train.labels.astype(np.int64), held, seed)
        if not len(out):
            raise UserError(
                "every class has one training example only, so none can be held out: "
                "give a validation split with --eval-data."
            )
    else:
        keep, out = random_split(len(train), held, seed)
    return subset(train, keep), subset(train, out)
