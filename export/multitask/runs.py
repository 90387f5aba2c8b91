"""Which runs can share one graph, what their tasks are called, and their models in little memory."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mdpd_deploy.artifacts.manifest import TASK_NAME
from mdpd_deploy.artifacts.run import Run
from mdpd_deploy.data.examples import Split
from mdpd_deploy.data.preprocess import ImagePreprocess
from mdpd_deploy.errors import UserError
from mdpd_deploy.export.fade import Faded, bare_norms, fade


@dataclass(frozen=True, eq=False)
class TaskRun:
    """One run on its way into a bundle of several tasks.

    Attributes:
        name: Its task, as requests will name it.
        run: The run.
        faded: Its model; what it does not tune it shares with the first member's.
        validation: Its validation examples, or None when nothing asks for them.
    """

    name: str
    run: Run
    faded: Faded
    validation: Split | None

    @property
    def width(self) -> int:
        """C, the task's own number of outputs."""
        return self.run.task.width


def refuse_strangers(runs: Sequence[Run]) -> None:
    """Refuse a run that cannot share the first one's graph, by what the runs say of themselves.

    Raises:
        UserError: One sentence that names the run.
    """
    first = runs[0]
    shared = _shared(first)
    for run in runs:
        if run.keeps:
            raise UserError(
                f"--multi: {run.path} (method {run.config.method}) keeps a {run.keeps} at inference, "
                "and only runs that deploy the backbone with other norms and a head can share it."
            )
        for what, value in _shared(run).items():
            if value != shared[what]:
                raise UserError(
                    f"--multi: {run.path} has another {what} than {first.path} ({value} instead of "
                    f"{shared[what]}), and tasks of one bundle share one graph: export it alone."
                )


def _shared(run: Run) -> dict[str, Any]:
    preprocess = run.preprocess
    size = preprocess.size if isinstance(preprocess, ImagePreprocess) else None
    return {
        "backbone, by the SHA-256 of its weights,": f"{run.summary['backbone']['sha256'][:12]}…",
        "image size": size,
        "pooling": run.config.backbone.pooling,
        "set of inputs": ", ".join(preprocess.input_names),
    }


def task_names(runs: Sequence[Run], given: Sequence[str] | None) -> list[str]:
    """Return a name for each run's task: the given ones, or the runs' own, numbered where equal.

    Raises:
        UserError: If the given names are too few, too many, equal or no plain words.
    """
    if given is None:
        own = [run.config.task.rpartition("/")[2] for run in runs]
        return [
            name if own.index(name) == place else f"{name}-{own[: place + 1].count(name)}"
            for place, name in enumerate(own)
        ]
    if len(given) != len(runs):
        raise UserError(
            f"--names {','.join(given)}: {len(given)} names for {len(runs)} runs; give one for each."
        )
    for name in given:
        if not re.match(TASK_NAME, name):
            raise UserError(
                f"--names: {name!r} cannot name a task: use letters, digits, '.', '_' and '-'."
            )
        if list(given).count(name) > 1:
            raise UserError(f"--names: {name!r} is given twice; every task needs its own name.")
    return list(given)


def fade_all(runs: Sequence[Run]) -> list[Faded]:
    """Load every run's model; the weights that none of them tunes are held once.

    Raises:
        UserError: If a run changed more of the backbone than norms; the message names it.
    """
    found: list[Faded] = []
    for run in runs:
        faded = fade(run)
        _refuse_other_changes(run, faded)
        if found:
            first = found[0]
            assert first.bare is not None
            for name, tensor in first.bare.backbone.named_parameters():
                if f"backbone.{name}" not in faded.changed:
                    faded.model.backbone.get_parameter(name).data = tensor.data
            faded = Faded(faded.model, first.bare, faded.changed)
        found.append(faded)
    return found


def _refuse_other_changes(run: Run, faded: Faded) -> None:
    if bare_norms(faded) is not None:
        return
    norms = {f"backbone.{name}" for name in faded.model.backbone.norms()}
    other = next(name for name in faded.changed if name not in norms)
    raise UserError(
        f"--multi: {run.path} (method {run.config.method}) changed {other}, which is no norm: only "
        "runs that differ in norms and head can share a backbone (mdpd, norms, probe)."
    )
