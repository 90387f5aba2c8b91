"""Running a graph that answers many tasks: one batch of several tasks, or one task at a time.

`mixed_batch` and `TaskRunner` use the mixed graph (`task_id` per row), `Swap` the base graph, which
is fed a task's norms and head with every run. No torch here.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.artifacts.tasks import BundleTask
from mdpd_deploy.data.examples import Raw
from mdpd_deploy.data.preprocess import TextPreprocess
from mdpd_deploy.errors import UserError
from mdpd_deploy.files import Read
from mdpd_deploy.graphs.deltas import Delta
from mdpd_deploy.runtimes.base import TASK_ID, Arrays, Forward, Outputs, first_columns
from mdpd_deploy.runtimes.onnx import OnnxRunner


def mixed_batch(requests: Sequence[tuple[BundleTask, Raw]]) -> Arrays:
    """Preprocess inputs of several tasks into one batch.

    Args:
        requests: Each input with its task; every task's own preprocessing is applied, and shorter
            texts are padded to the longest of the batch.

    Returns:
        The mixed graph's inputs, rows in the order given: `task_id` among them.
    """
    rows_of: dict[int, list[int]] = {}
    for row, (task, _) in enumerate(requests):
        rows_of.setdefault(task.index, []).append(row)
    parts = []
    for rows in rows_of.values():
        preprocess = requests[rows[0]][0].preprocess
        filler = preprocess.pad_id if isinstance(preprocess, TextPreprocess) else 0
        parts.append((rows, preprocess([requests[row][1] for row in rows]), filler))
    ids = np.array([task.index for task, _ in requests], dtype=np.int64)
    return {**_joined(len(requests), parts), TASK_ID: ids}


def _joined(count: int, parts: Sequence[tuple[list[int], Arrays, int]]) -> Arrays:
    """Put the rows of several batches back into one order; `filler` pads `input_ids`, 0 the rest."""
    joined: Arrays = {}
    for name, first in parts[0][1].items():
        shape = np.max([arrays[name].shape[1:] for _, arrays, _ in parts], axis=0)
        joined[name] = np.zeros((count, *shape), dtype=first.dtype)
        for rows, arrays, filler in parts:
            whole = [(0, 0), *((0, int(gap)) for gap in shape - arrays[name].shape[1:])]
            value = filler if name == "input_ids" else 0
            joined[name][rows] = np.pad(arrays[name], whole, constant_values=value)
    return joined


class TaskRunner:
    """One task of an open mixed graph: arrays in, the task's own columns [B, C] out."""

    def __init__(self, runner: Forward, task: BundleTask) -> None:
        self.runner = runner
        self.task = task

    def __call__(self, arrays: Mapping[str, NDArray[Any]], /) -> Outputs:
        rows = len(next(iter(arrays.values())))
        ids = np.full(rows, self.task.index, dtype=np.int64)
        return first_columns(self.runner({**arrays, TASK_ID: ids}), self.task.width)


class Swap(Mapping[str, Forward]):
    """The base graph, open once: task name → runner of that task alone, outputs [B, C].

    A task is swapped in by feeding its norms and head with the run, so the backbone is neither
    read nor prepared again, and runs of several tasks may overlap.

    Args:
        path: The base graph.
        deltas: Task name → delta; `add` takes more.
        device: "cpu" or "cuda".
        threads: Threads inside one operator; default: the CPU quota.
        read: How the graph's files are read; None = ONNX Runtime opens them itself.

    Raises:
        UserError: If a delta is not of this base graph or does not fit it.
    """

    def __init__(
        self,
        path: Path,
        deltas: Mapping[str, Delta],
        *,
        device: str = "cpu",
        threads: int | None = None,
        read: Read | None = None,
    ) -> None:
        self.base = OnnxRunner(path, device=device, threads=threads, read=read)
        self.base_sha256 = hashlib.sha256((read or Path.read_bytes)(path)).hexdigest()
        self._runners: dict[str, Forward] = {}
        for name, delta in deltas.items():
            self.add(name, delta)

    def add(self, name: str, delta: Delta) -> Forward:
        """Make a task known by its delta, and return its runner."""
        if delta.base_sha256 != self.base_sha256:
            raise UserError(f"the delta of {name!r} belongs to another base graph than this one.")
        self._runners[name] = _Fed(self.base, delta)
        return self._runners[name]

    def __getitem__(self, name: str) -> Forward:
        return self._runners[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._runners)

    def __len__(self) -> int:
        return len(self._runners)


class _Fed:
    """The base graph with one task's weights."""

    def __init__(self, base: OnnxRunner, delta: Delta) -> None:
        self._base = base
        self._width = delta.width
        self._weights = delta.fit(base.replaceable)

    def __call__(self, arrays: Mapping[str, NDArray[Any]], /) -> Outputs:
        return first_columns(self._base({**arrays, **self._weights}), self._width)
