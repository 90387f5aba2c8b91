"""One training of a study, in a child process that may fail without taking the study along."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdpd_deploy.files import is_claimed, read_json, write_text
from mdpd_deploy.run import Run
from mdpd_deploy.study.plan import Trial

TRIALS = "trials"
LOG = "log.txt"
POLL = 0.2  # seconds

_children: set[subprocess.Popen[bytes]] = set()


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        folder: The trial's folder.
        summary: The run's summary.json; None when it failed.
        reason: Why it failed, one sentence; empty when it did not.
        repeated: Whether it was found finished.
    """

    folder: Path
    summary: dict[str, Any] | None
    reason: str = ""
    repeated: bool = False

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    def score(self, split: str = "validation") -> float | None:
        """Return the deployed model's primary metric on a split; None where there is none."""
        if self.summary is None:
            return None
        metrics = self.summary.get("metrics" if split == "validation" else f"metrics_{split}", {})
        value = metrics.get("deployed", {}).get(self.summary["primary_metric"])
        return None if value is None else float(value)


def find_outcome(study: Path, trial: Trial) -> Outcome | None:
    """Return the outcome of a trial that has ended well; None when it must be run."""
    folder = study / TRIALS / trial.folder
    if not (folder / "run" / "summary.json").is_file():
        return None
    return Outcome(folder, read_json(folder / "run" / "summary.json", "trial"), repeated=True)


def run_trial(study: Path, trial: Trial, threads: int) -> Outcome:
    """Train, or go on where an earlier attempt stopped; never raises for a child that fails.

    Args:
        study: The study's folder.
        trial: What to train.
        threads: Of the child.
    """
    folder = study / TRIALS / trial.folder
    run = folder / "run"
    while is_claimed(run):  # the child of a study that was killed is still at work
        time.sleep(POLL)
    if found := find_outcome(study, trial):
        return found
    write_text(folder / "config.yaml", trial.config.to_yaml())
    if (run / "config.yaml").is_file():
        words = ["--resume", str(run)]
    else:
        words = [str(folder / "config.yaml"), "--out", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (folder / LOG).open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "mdpd_deploy", "train", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        _children.add(child)
        code = child.wait()
        _children.discard(child)
    if code == 0:
        Run.open(run)  # a summary that cannot be read is no success
        return Outcome(folder, read_json(run / "summary.json", "trial"))
    return Outcome(folder, None, _reason(folder / LOG, code))


def stop_children() -> None:
    """End the trainings that this process has started; each can be resumed."""
    for child in list(_children):
        child.terminate()


def _reason(log: Path, code: int) -> str:
    """Return why a child ended: its own last words, or the signal that ended it."""
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    lines = [
        line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line
    ]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (said or lines or [f"the process ended with exit code {code}"])[-1]
