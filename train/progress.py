"""What a user sees while training: a bar on a terminal, plain lines in a log file."""

import sys
from typing import Any, Self

import psutil
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from mdpd_deploy.terminal import Console


class ProgressBar:
    """A bar with loss, metric, throughput and memory on stderr.

    Args:
        total: Steps.
        enabled: False on all processes but the main one, and where silence was asked for.
    """

    def __init__(self, total: int, *, enabled: bool = True) -> None:
        self.console = Console(stderr=True)
        self.enabled = enabled
        self.metric = self.note = ""
        self.total = total
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not (enabled and sys.stderr.isatty()),
        )
        self.task = self.bar.add_task("training", total=total, note="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        """Print one line above the bar."""
        if self.enabled:
            self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, step: int, line: dict[str, Any]) -> None:
        """Show the newest log line."""
        rate = f"{line['samples_per_s']:.0f} samples/s" if "samples_per_s" in line else ""
        memory = f"{psutil.Process().memory_info().rss / 1e9:.1f} GB"
        pieces = [f"loss {line['loss']:.4g}", self.metric, rate, memory]
        note = " · ".join(piece for piece in pieces if piece)
        self.bar.update(self.task, completed=step, note=note)
        self.note = note

    def evaluated(self, step: int, metric: str, values: dict[str, float]) -> None:
        """Show a validation result; without a terminal this is the line of the log."""
        self.metric = " ".join(f"{name} {value:.4f}" for name, value in values.items())
        if not sys.stderr.isatty():
            self.say(f"step {step}/{self.total} · {metric}: {self.metric} · {self.note}")
