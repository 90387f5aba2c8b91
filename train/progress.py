"""What a user sees while training: a bar on a terminal, plain lines in a log file."""

import time
from collections.abc import Callable
from typing import Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from mdpd_deploy.artifacts.scores import split_name
from mdpd_deploy.report.page import duration
from mdpd_deploy.report.terminal import Console
from mdpd_deploy.tasks.metrics import Values, metric_text

TENTHS = 10  # a log file gets a line for each of so many parts of the steps,
SILENCE = 30.0  # and one after so many seconds without any


class ProgressBar:
    """Step, time left, loss, last validation score and throughput on stderr.

    On a terminal a bar: step and time left have their place at any width, the rest is cut where it
    does not fit. Elsewhere lines, at least each tenth of the steps and each half minute.

    Args:
        total: Steps.
        enabled: False on all processes but the main one, and where silence was asked for.
        console: Where to; default: stderr.
        clock: Seconds; tests replace it.
    """

    def __init__(
        self,
        total: int,
        *,
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console(stderr=True)
        self.enabled, self.total, self.clock = enabled, total, clock
        self.drawn = enabled and self.console.is_terminal
        self.loss = self.score = self.rate = ""
        self.said_step, self.said_at = 0, clock()
        self.bar = Progress(
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=12),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            TextColumn(
                "{task.fields[note]}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            console=self.console,
            disable=not self.drawn,
            expand=True,
            get_time=clock,
        )
        self.task = self.bar.add_task("training", total=total, note="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        """Print one line, above the bar where there is one."""
        if self.enabled:
            self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, step: int, loss: float | None, samples_per_s: float | None) -> None:
        """Show how far it is; `step` counts the steps that are done, a loss of None is the last one."""
        self.loss = self.loss if loss is None else f"loss {loss:.4g}"
        self.rate = f"{samples_per_s:,.0f} examples/s" if samples_per_s else ""
        self._draw(step)
        if not self.drawn and self._due(step):
            self._line(step, _joined(self.loss, self.rate, self._left()))

    def evaluated(self, step: int, split: str, examples: int, metric: str, values: Values) -> None:
        """Show a score of each model; without a terminal this is a line of its own."""
        self.score = f"{split} {metric_text(values['deployed'])} at {step}"
        self._draw(step)
        if not self.drawn:
            scores = ", ".join(f"{name} {metric_text(value)}" for name, value in values.items())
            self._line(step, f"{metric} on {split_name(split, examples)}: {scores}")

    def _draw(self, step: int) -> None:
        note = _joined(self.loss, self.score, self.rate)
        self.bar.update(self.task, completed=step, note=note)

    def _due(self, step: int) -> bool:
        tenth = step * TENTHS // self.total > self.said_step * TENTHS // self.total
        return tenth or self.clock() - self.said_at >= SILENCE

    def _line(self, step: int, text: str) -> None:
        self.said_step, self.said_at = step, self.clock()
        self.say(f"step {step}/{self.total} · {text}")

    def _left(self) -> str:
        seconds = self.bar.tasks[0].time_remaining
        return f"{duration(seconds)} left" if seconds else ""


def _joined(*pieces: str) -> str:
    return " · ".join(piece for piece in pieces if piece)
