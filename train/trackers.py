"""Trackers beside the run's own files: opt-in, through accelerate, numbers only (extra `track`)."""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker

from mdpd_deploy.errors import missing_extra

PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio"}


def check_trackers(names: Sequence[str]) -> None:
    """Raise `UserError` if a tracker's package is not installed."""
    for name in names:
        if find_spec(PACKAGES[name]) is None:
            raise missing_extra(PACKAGES[name], "track", f"track.to={name}")


class Trackers:
    """Sends the lines of metrics.jsonl to every tracker of `track.to`.

    Args:
        names: Of `track.to`.
        out: The run folder; its name is the run's name, TensorBoard logs lie in `out/tensorboard`.
    """

    def __init__(self, names: Sequence[str], out: Path) -> None:
        self.trackers = [_tracker(name, out) for name in names]
        for tracker in self.trackers:
            tracker.start()

    def write(self, line: dict[str, Any]) -> None:
        """Send one line: finite numbers, named SPLIT/NAME or SPLIT/MODEL/NAME."""
        values = dict(_numbers(line, str(line["split"])))
        for tracker in self.trackers:
            tracker.log(values, step=line["step"])

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.finish()


def _tracker(name: str, out: Path) -> GeneralTracker:
    if name == "tensorboard":
        return TensorBoardTracker("tensorboard", str(out))
    return TrackioTracker("mdpd", name=out.name)


def _numbers(line: dict[str, Any], prefix: str) -> list[tuple[str, float]]:
    found = []
    for name, value in line.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}/{name}")
        elif isinstance(value, int | float) and name not in ("step",) and math.isfinite(value):
            found.append((f"{prefix}/{name}", float(value)))
    return found
