"""One refittable TensorRT engine for all tasks of a bundle: a task is put in by refitting.

The counterpart of `mixed.Swap`, which feeds a task's weights with every run. An engine holds them as
constants: it is as fast as one task's, and asking another task than the last one costs a refit.
`mdpd_deploy.export.build_swap` makes one. No torch here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from numpy.typing import NDArray

from mdpd_deploy.checks.compare import Case
from mdpd_deploy.runtimes.base import Forward, Outputs, first_columns, only
from mdpd_deploy.runtimes.tensorrt.refit import Tensors, apply_delta
from mdpd_deploy.runtimes.tensorrt.runner import TrtRunner


@dataclass(frozen=True, eq=False)
class SwapTask:
    """Weights and golden vectors of a task.

    Attributes:
        tensors: A value for every refittable weight (`Delta.fit`).
        golden: Inputs with the one output [B, C] that they must give; C is the task's own width.
    """

    tensors: Tensors
    golden: Case

    @property
    def width(self) -> int:
        """C."""
        assert self.golden.expected is not None
        return int(only(self.golden.expected).shape[1])


class EngineSwap(Mapping[str, Forward]):
    """Task name → runner of that task alone, outputs [B, C]; calls of several threads take turns.

    Every task is put in once at the start and held to its golden vectors, and again whenever it
    comes back: an engine that does not reproduce them answers nobody.

    Args:
        runner: An engine built with refittable norms and head.
        tasks: By name.
        tolerance: Largest difference of an output, in standard deviations of the golden outputs.

    Raises:
        UserError: If a task does not fit the engine.
        VerificationError: If a task's golden vectors do not come back.
    """

    def __init__(
        self, runner: TrtRunner, tasks: Mapping[str, SwapTask], *, tolerance: float
    ) -> None:
        self.runner = runner
        self.tolerance = tolerance
        self.in_place: str | None = None
        self._tasks = dict(tasks)
        for name in self._tasks:
            self.put_in(name)

    def put_in(self, name: str) -> None:
        """Make the engine a task's, unless it is; when that fails, it stays the task before.

        Raises:
            VerificationError: If TensorRT refuses, or the golden vectors do not come back.
        """
        with self.runner.lock:
            if name == self.in_place:
                return
            task = self._tasks[name]
            before = None if self.in_place is None else self._tasks[self.in_place].tensors
            apply_delta(
                self.runner, task.tensors, task.golden, tolerance=self.tolerance, previous=before
            )
            self.in_place = name

    def run(self, name: str, arrays: Mapping[str, NDArray[Any]], /) -> Outputs:
        """Answer a batch as a task, which is put in first if need be."""
        with self.runner.lock:
            self.put_in(name)
            return first_columns(self.runner(arrays), self._tasks[name].width)

    def __getitem__(self, name: str) -> Forward:
        if name not in self._tasks:
            raise KeyError(name)
        return partial(self.run, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)
