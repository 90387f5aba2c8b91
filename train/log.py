"""metrics.jsonl, and the trackers that get the same numbers (opt-in, through accelerate)."""

import json
import math
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker

from mdpd_deploy.artifacts.run import read_metrics
from mdpd_deploy.errors import WorkFailed, missing_extra
from mdpd_deploy.files import saying_disk_full, write_text

Line = dict[str, Any]


class MetricsLog:
    """Appends lines to metrics.jsonl and sends their numbers to trackers.

    On a resume, lines after the checkpoint are dropped.

    Args:
        out: The run folder; its name is the run's name, TensorBoard logs lie in `out/tensorboard`.
        step: Where the run goes on.
        trackers: Names, see `track.to`.
        enabled: Only the main process writes.
    """

    def __init__(self, out: Path, step: int, trackers: Sequence[str], *, enabled: bool) -> None:
        self.path = out / "metrics.jsonl"
        self.enabled = enabled
        self.trackers: list[GeneralTracker] = []
        if enabled:
            kept = read_metrics(self.path) if self.path.is_file() else []
            text = "".join(json.dumps(line) + "\n" for line in kept if line["step"] <= step)
            write_text(self.path, text)
            self.trackers = [_tracker(name, out) for name in trackers]
        for tracker in self.trackers:
            tracker.start()

    def write(self, line: Line) -> None:
        """Append one line; trackers get its finite numbers as SPLIT/NAME or SPLIT/MODEL/NAME."""
        if not self.enabled:
            return
        require_folder(self.path.parent)
        with saying_disk_full(self.path), self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        for tracker in self.trackers:
            tracker.log(dict(_numbers(line, str(line["split"]))), step=line["step"])

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.finish()


def require_folder(out: Path) -> None:
    """Stop a run whose folder was deleted, before anything is written to another one of its name."""
    if not (out / "config.yaml").is_file():
        raise WorkFailed(
            f"the run folder {out} was deleted or moved while training: put it back and go on with "
            "--resume, or start the run again."
        )


def check_trackers(names: Sequence[str]) -> None:
    """Raise `UserError` if the package of a tracker, which has its name, is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise missing_extra(name, "track", f"track.to={name}")


def _tracker(name: str, out: Path) -> GeneralTracker:
    if name == "tensorboard":
        return TensorBoardTracker("tensorboard", str(out))
    return TrackioTracker("mdpd", name=out.name)


def _numbers(line: Line, prefix: str) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}/{name}")
        elif isinstance(value, int | float) and name != "step" and math.isfinite(value):
            yield f"{prefix}/{name}", float(value)
