"""From a task's name and the data options to examples.

--task                    reader
glue/NAME                 glue.py          official GLUE folders
vtab/NAME vtab-full/NAME  vtab.py          VTAB-1K list files
few-shot/NAME:K           few_shot.py      fine-grained sets, K pictures a class
domains/NAME              domains.py       one set to train on, others to measure
fgvc/NAME                 fgvc.py          fine-grained sets, lists or as published
classify, regress         own.py           tables, image folders, hub data sets
digits                    digits.py        the embedded default
"""

from pathlib import Path
from typing import Literal

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data import (  # noqa: F401  (each registers its names)
    digits,
    domains,
    few_shot,
    fgvc,
    glue,
    own,
    vtab,
)
from mdpd_deploy.data.examples import Split, TaskData
from mdpd_deploy.data.rows import TASKS, Reader
from mdpd_deploy.errors import UserError, unknown
from mdpd_deploy.tasks import KINDS, Task


def find_reader(task: str) -> Reader:
    """Return the reader of a task; raises `UserError` with the nearest name when there is none."""
    if task in TASKS and not task.endswith("/"):
        return TASKS[task]
    family, slash, member = task.partition("/")
    if slash and family + slash in TASKS:
        if not member:
            raise UserError(f"--task {task!r} lacks the data set: write {family}/NAME.")
        return TASKS[family + slash]
    raise unknown("--task", task, (f"{n}NAME" if n.endswith("/") else n for n in TASKS))


def default_resize(task: str) -> Literal["squash"] | None:
    """Return how a task's pictures are resized unless `data.resize` says; None = the model's way.

    VTAB's papers show the model the whole picture; a crop leaves a quarter of one of KITTI.
    """
    return "squash" if task.startswith(("vtab/", "vtab-full/")) else None


def load_task(task: str, config: DataConfig, *, seed: int) -> TaskData:
    """Read a task's examples.

    Args:
        task: A task name, see the table above.
        config: Where the data is, and its options.
        seed: Seed of the splits that are made and of the shuffle before `data.limit`;
            `data.split_seed` takes its place.

    Raises:
        UserError: For an unknown task, a wrong path or anything wrong in the data, naming the file
            and the row.
    """
    own = config.split_seed
    return find_reader(task)(task, config, seed=seed if own is None else own)


def load_evaluation(name: str, task: Task, config: DataConfig, *, seed: int) -> dict[str, Split]:
    """Read only what is to be measured, for a model whose task is settled.

    Of the user's own data, `data.eval_path` (or else `data.path`) is what is measured, and no
    training data is read. Other tasks are read as by `load_task`, from the folder `eval_path` if it
    is given.

    Args:
        name: The task that the model was trained on, as typed.
        task: What the model knows of it.
        config: Where the data is, and its options.
        seed: Seed of the splits that are made.

    Raises:
        UserError: As `load_task`.
    """
    path = config.eval_path or config.path
    if name in KINDS and path is not None:
        return own.read_own_evaluation(path, task, config)
    update: dict[str, object] = {"labels": list(task.labels) or None}
    if config.eval_path is not None and Path(config.eval_path).expanduser().is_dir():
        update |= {"path": config.eval_path, "eval_path": None}  # the training data may be gone
    elif config.eval_path is not None:
        update |= {"splits": None}  # what is measured is the file
    fixed = config.model_copy(update=update)
    return load_task(name, fixed, seed=seed).evaluation
