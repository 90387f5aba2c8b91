"""Task names and the reader of each: a new source of data is one file and one entry here.

A key is a whole task name (`glue/sst2`, `classify`), or a prefix that ends in `/` for a family
whose members are folders of the user (`vtab/`).
"""

from typing import Literal, Protocol

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.examples import TaskData
from mdpd_deploy.errors import UserError
from mdpd_deploy.registry import Registry


class Reader(Protocol):
    """Reads one task: the name as typed, the data options, and the seed of every split made."""

    def __call__(self, task: str, config: DataConfig, *, seed: int) -> TaskData: ...


TASKS: Registry[Reader] = Registry("--task")


def default_resize(task: str) -> Literal["squash"] | None:
    """Return how a task's pictures are resized unless `data.resize` says; None = the model's way.

    VTAB's papers show the model the whole picture; a crop leaves a quarter of one of KITTI.
    """
    return "squash" if task.startswith(("vtab/", "vtab-full/")) else None


def refuse_options(task: str, config: DataConfig, *names: str) -> None:
    """Raise `UserError` for a data option that this task cannot use (none is ignored in silence)."""
    for name in names:
        if getattr(config, name) is not None:
            raise UserError(f"--task {task} does not use data.{name}: leave it out.")
