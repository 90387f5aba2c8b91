"""The tasks that a bundle's graph answers: one, or several on one backbone. No torch here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.artifacts.manifest import (
    BASE_FILE,
    DELTA_FILE,
    FILE,
    GOLDEN_FILE,
    PREPROCESSOR,
    TASKS,
    Manifest,
)
from mdpd_deploy.artifacts.sealed import reader
from mdpd_deploy.data.examples import Field
from mdpd_deploy.data.preprocess import TOKENIZER_FILE, Preprocess, load_preprocess
from mdpd_deploy.errors import UserError, unknown
from mdpd_deploy.files import Read, read_json
from mdpd_deploy.graphs.deltas import load_delta
from mdpd_deploy.runtimes.base import TASK_ID, only
from mdpd_deploy.tasks import Prediction, Task, task_of


@dataclass(frozen=True, eq=False)
class BundleTask:
    """One task that a bundle's graph answers.

    Attributes:
        name: As requests name it.
        index: The row's `task_id`, where the graph takes one.
        task: What its outputs mean.
        fields: What one input is made of, in order.
        preprocess: Raw inputs → the graph's inputs, but for `task_id`.
        facts: What the manifest says of the task.
        golden: Its golden vectors.
    """

    name: str
    index: int
    task: Task
    fields: tuple[Field, ...]
    preprocess: Preprocess
    facts: Mapping[str, Any] = field(default_factory=dict)
    golden: Path | None = None

    @property
    def width(self) -> int:
        """How many of the graph's output columns belong to the task, counted from the first."""
        return self.task.width

    def decode(self, outputs: Mapping[str, NDArray[np.float32]]) -> list[Prediction]:
        """Turn rows of the graph's outputs, by name, into predictions.

        A graph of several tasks has one output, whose first columns are the task's own.
        """
        if self.task.output in outputs:
            return self.task.decode(outputs)
        return self.task.decode({self.task.output: only(outputs)[:, : self.width]})


def load_tasks(folder: Path, plain: dict[str, Any], manifest: Manifest) -> tuple[BundleTask, ...]:
    """Return a bundle's tasks in the order of `task_id`.

    Args:
        folder: The bundle, its files checked.
        plain: `manifest.json` as read.
        manifest: The same, parsed.

    Raises:
        UserError: If preprocessing or a delta contradicts the manifest.
    """
    read = reader(folder, plain)
    if not manifest.tasks:
        preprocess = load_preprocess(folder / PREPROCESSOR, read=read)
        _check(folder, folder / PREPROCESSOR, plain, manifest, preprocess.input_names, read)
        return (_task(name_of(plain), 0, plain, preprocess, folder / GOLDEN_FILE),)
    return tuple(
        _one_of_many(folder, index, facts, manifest, read)
        for index, facts in enumerate(plain["tasks"])
    )


def open_task(
    folder: Path, index: int, facts: Mapping[str, Any], read: Read = Path.read_bytes
) -> BundleTask:
    """Open one of several tasks from its folder in a bundle, with its preprocessing.

    Args:
        folder: The bundle.
        index: The task's `task_id`.
        facts: The task's entry in the manifest.
        read: How files are read.
    """
    own = folder / TASKS / facts["name"]
    preprocess = load_preprocess(own, tokenizer_of(folder, facts["name"]), read=read)
    return _task(facts["name"], index, facts, preprocess, own / GOLDEN_FILE)


def tokenizer_of(folder: Path, task: str | None = None) -> Path | None:
    """Return the tokenizer of a bundle or of one of its several tasks; None for pictures."""
    own = [] if task is None else [folder / TASKS / task / TOKENIZER_FILE]
    files = [*own, folder / PREPROCESSOR / TOKENIZER_FILE]
    return next((file for file in files if file.is_file()), None)


def meaning_of(
    folder: Path,
    facts: Mapping[str, Any],
    task: str | None = None,
    read: Read = Path.read_bytes,
) -> dict[str, str | None]:
    """Return the digests of what gives a task's inputs and outputs their meaning.

    Args:
        folder: The bundle, sealed or not.
        facts: What its manifest says of the task.
        task: Its name, where the bundle answers several.
        read: How files are read.
    """
    tokenizer = tokenizer_of(folder, task)
    outputs = [task or name_of(facts), facts["kind"], len(facts["fields"]) > 1, facts["labels"]]
    return {
        "outputs_sha256": _sha256_of(outputs),
        "preprocessing_sha256": _sha256_of(facts["preprocess"]),
        "tokenizer_sha256": None if tokenizer is None else sha256(read(tokenizer)).hexdigest(),
    }


def name_of(facts: Mapping[str, Any]) -> str:
    """Return the name by which the only task of a bundle is asked."""
    return str(facts["task"]).rpartition("/")[2]


def _sha256_of(plain: Any) -> str:
    return sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _one_of_many(
    folder: Path, index: int, facts: dict[str, Any], manifest: Manifest, read: Read
) -> BundleTask:
    task = open_task(folder, index, facts, read)
    own = folder / TASKS / task.name
    _check(folder, own, facts, manifest, (*task.preprocess.input_names, TASK_ID), read)
    delta = load_delta(own / DELTA_FILE, manifest.files[BASE_FILE].sha256, read)
    if delta.width != task.width:
        raise UserError(
            f"bundle {folder}: the delta of {task.name!r} answers {delta.width} outputs and "
            f"{FILE} lists {task.width}; export the runs again."
        )
    return task


def _task(
    name: str, index: int, facts: Mapping[str, Any], preprocess: Preprocess, golden: Path
) -> BundleTask:
    task = task_of(facts["kind"], facts["labels"])
    return BundleTask(name, index, task, tuple(facts["fields"]), preprocess, facts, golden)


def _check(
    folder: Path,
    where: Path,
    facts: Mapping[str, Any],
    manifest: Manifest,
    inputs: Sequence[str],
    read: Read,
) -> None:
    written = read_json(where / "preprocess.json", "preprocessing", read)
    ports = [port.name for port in manifest.graph().inputs]
    if written != facts["preprocess"] or ports != list(inputs):
        raise UserError(
            f"bundle {folder}: {where.relative_to(folder)}/ contradicts {FILE}; export the run again."
        )


def choose_task(tasks: Sequence[BundleTask], name: str | None, path: Path) -> BundleTask:
    """Return the task of a name; None is enough where there is one.

    Raises:
        UserError: If the name is missing or unknown, with the valid ones.
    """
    if name is None and len(tasks) == 1:
        return tasks[0]
    names = [task.name for task in tasks]
    if name is None:
        raise UserError(
            f"bundle {path} answers {len(tasks)} tasks: name one with --task {'|'.join(names)}."
        )
    if name not in names:
        raise unknown("--task", name, names)
    return tasks[names.index(name)]
