"""What every runtime is: arrays by name in, arrays by name out. No torch here."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.errors import UserError

Arrays = dict[str, NDArray[Any]]
Outputs = dict[str, NDArray[np.float32]]

TASK_ID = "task_id"  # input int64 [B] of a graph that answers many tasks: which one each row asks
TASKS_NOTE = "mdpd.tasks"  # note of such a graph: its tasks in the order of `task_id`


class Forward(Protocol):
    """Anything that maps a batch of named arrays to its outputs by name, batch axis first."""

    def __call__(self, arrays: Mapping[str, NDArray[Any]], /) -> Outputs: ...


class Runtime(Forward, Protocol):
    """An open graph or engine, whatever runs it.

    Attributes:
        device: "cpu" or "cuda".
        provider: What runs it, as it calls itself.
        input_names: The graph's inputs in order.
        output_names: The graph's outputs in order.
        metadata: The graph's own `mdpd.*` notes.
        max_batch: The largest batch it takes; None = any.
        failed: Why it answers no more, so that its process is to be started again; None while all
            is well.
    """

    device: str
    provider: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    metadata: dict[str, str]
    max_batch: int | None
    failed: str | None


def run_cut(runner: Runtime, arrays: Mapping[str, NDArray[Any]], /) -> Outputs:
    """Run a batch of any size in pieces that the runner takes."""
    rows = len(next(iter(arrays.values())))
    size = runner.max_batch or rows
    return joined(
        runner({name: array[start : start + size] for name, array in arrays.items()})
        for start in range(0, rows, size)
    )


def joined(parts: Iterable[Mapping[str, NDArray[np.float32]]]) -> Outputs:
    """Put the outputs of several batches under each other, by name."""
    first, *others = parts
    return {
        name: np.concatenate([array, *(part[name] for part in others)])
        for name, array in first.items()
    }


def first_columns(outputs: Mapping[str, NDArray[np.float32]], width: int | None) -> Outputs:
    """Return the first `width` columns of every output; None = all."""
    return {name: array[:, :width] for name, array in outputs.items()}


def only(outputs: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the output of a graph that has one; `UserError` names them where it has several."""
    if len(outputs) != 1:
        raise UserError(f"one output is asked for, and the graph has {', '.join(outputs)}.")
    return next(iter(outputs.values()))


def task_names(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return a graph's tasks by `task_id`, from its notes; empty for a graph of one."""
    return tuple(str(task["name"]) for task in json.loads(metadata.get(TASKS_NOTE, "[]")))


def check_task_ids(arrays: Mapping[str, NDArray[Any]], names: Sequence[str]) -> None:
    """Refuse a mixed batch unless every row names one of the tasks.

    Raises:
        UserError: With the valid values.
    """
    valid = ", ".join(f"{index} ({name})" for index, name in enumerate(names[:8]))
    more = f", … {len(names) - 1} ({names[-1]})" if len(names) > 8 else ""
    wanted = f"give int64 [batch] with values of {valid}{more}"
    ids = arrays.get(TASK_ID)
    rows = {array.shape[:1] for name, array in arrays.items() if name != TASK_ID}
    if ids is None:
        raise UserError(f"this graph answers several tasks and {TASK_ID} is missing: {wanted}.")
    if ids.dtype != np.int64 or ids.ndim != 1 or {ids.shape} != rows:
        counts = ", ".join(str(count) for shape in sorted(rows) for count in shape)
        raise UserError(
            f"{TASK_ID} is {ids.dtype} {list(ids.shape)}, other inputs have {counts} rows: {wanted}."
        )
    outside = ids[(ids < 0) | (ids >= len(names))]
    if len(outside):
        raise UserError(f"{TASK_ID} {outside[0]} names no task: {wanted}.")
