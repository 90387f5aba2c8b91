"""One training of a study, in a child process that may fail without taking the study along."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdpd_deploy.artifacts.folders import is_claimed, remove_leftovers
from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.artifacts.scores import key_of
from mdpd_deploy.config import Config, read_config
from mdpd_deploy.errors import MdpdError, UserError
from mdpd_deploy.files import write_text
from mdpd_deploy.study.plan import Trial

TRIALS = "trials"
LOG = "log.txt"
POLL = 0.2  # seconds

_children: set[subprocess.Popen[bytes]] = set()
_stopped = threading.Event()


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        folder: The trial's folder.
        summary: The run's summary.json; None when it failed.
        reason: Why it failed, one sentence; empty when it did not.
    """

    folder: Path
    summary: dict[str, Any] | None
    reason: str = ""

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    def score(self, split: str = "validation") -> float | None:
        """Return the deployed model's primary metric on a split; None where there is none."""
        if self.summary is None:
            return None
        metrics = self.summary.get(key_of("metrics", split), {})
        value = metrics.get("deployed", {}).get(self.summary["primary_metric"])
        return None if value is None else float(value)


def find_outcome(study: Path, trial: Trial) -> Outcome | None:
    """Return the outcome of a trial that has ended, or cannot go on; None when it must be run."""
    folder = study / TRIALS / trial.folder
    run = folder / "run"
    try:
        if (run / "config.yaml").is_file():
            _refuse_difference(read_config(run / "config.yaml"), trial.config)
        if not (run / "summary.json").is_file():
            return None
        return Outcome(folder, Run.open(run).summary)
    except MdpdError as err:
        return Outcome(folder, None, str(err))


def _refuse_difference(before: Config, now: Config) -> None:
    """Refuse a run that was made by other options, as when a default has changed since."""
    plain, asked = before.flat(), now.flat()
    for name, value in asked.items():
        if name != "out" and plain.get(name) != value:
            raise UserError(
                f"its folder holds a run with {name}={plain.get(name)}, and now it is {value}: "
                "compare anew in another folder."
            )


def run_trial(study: Path, trial: Trial, threads: int) -> Outcome:
    """Train, or go on where an earlier attempt stopped; a child that fails is an outcome.

    Args:
        study: The study's folder.
        trial: What to train.
        threads: Of the child.
    """
    folder = study / TRIALS / trial.folder
    run = folder / "run"
    if found := _wait(study, trial):
        return found
    write_text(folder / "config.yaml", trial.config.to_yaml())
    remove_leftovers(run)
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
        try:
            if _stopped.is_set():
                child.terminate()
            while (code := child.poll()) is None:
                time.sleep(POLL)  # a wait in the system would not hear that Ray cancels the task
        finally:
            child.terminate()  # where this thread or process is ended itself
            _children.discard(child)
    if code and (found := _wait(study, trial)):  # another child of it had the run
        return found
    found = None if code else find_outcome(study, trial)
    return found or Outcome(folder, None, _reason(folder / LOG, code, trial.config, study))


def _wait(study: Path, trial: Trial) -> Outcome | None:
    """Wait for the child of a study that was killed, if one is still at work; see what it left."""
    while is_claimed(study / TRIALS / trial.folder / "run") and not _stopped.is_set():
        time.sleep(POLL)
    return find_outcome(study, trial)


def allow_children() -> None:
    """Let trainings start again after `stop_children`."""
    _stopped.clear()


def stop_children() -> None:
    """End the trainings that this process has started, and start no more; each can be resumed."""
    _stopped.set()
    for child in list(_children):
        child.terminate()


def _reason(log: Path, code: int, config: Config, study: Path) -> str:
    """Return why a child ended: its own last words without places, or the signal that ended it."""
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    lines = [
        line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line
    ]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    reason = (said or lines or [f"the process ended with exit code {code}"])[-1]
    return without_places(reason.replace(str(study), study.name), config)


def without_places(text: str, config: Config) -> str:
    """Return a sentence that goes into a report without the folders of this machine."""
    for place in (config.data.path, config.data.eval_path, config.backbone.name):
        if place is not None and Path(place).is_absolute():
            text = text.replace(str(place), Path(place).name)
    return text
