"""Data: readers from files to examples, and the preprocessing that travels with a model.

No torch here: inputs are text, paths or PIL pictures, arrays are numpy.

    --task                    reader
    glue/NAME                 glue.py          official GLUE folders
    vtab/NAME vtab-full/NAME  vtab.py          VTAB-1K list files
    classify, regress         own.py           tables, image folders, hub data sets
    digits                    digits.py        the embedded default
"""

from collections.abc import Sequence
from pathlib import Path

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data import digits, glue, own, vtab  # noqa: F401  (each registers its tasks)
from mdpd_deploy.data.check import check_images, readable
from mdpd_deploy.data.examples import Kind, Picture, Raw, Split, TaskData, Text, data_fingerprint
from mdpd_deploy.data.registry import TASKS, default_resize, find_reader

__all__ = [
    "TASKS",
    "Kind",
    "Picture",
    "Raw",
    "Split",
    "TaskData",
    "Text",
    "check_images",
    "data_fingerprint",
    "default_resize",
    "find_reader",
    "load_evaluation",
    "load_task",
    "readable",
]


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


def load_evaluation(
    task: str, config: DataConfig, *, seed: int, label_names: Sequence[str]
) -> dict[str, Split]:
    """Read only what is to be measured, for a model whose classes are known.

    For `classify` and `regress`, `data.eval_path` (or else `data.path`) is what is measured, and
    no training data is read. Other tasks are read as by `load_task`, from the folder `eval_path` if
    it is given.

    Args:
        task: The task that the model was trained on.
        config: Where the data is, and its options.
        seed: Seed of the splits that are made.
        label_names: The model's classes in index order; empty for regression.

    Raises:
        UserError: As `load_task`.
    """
    if task in ("classify", "regress"):
        kind: Kind = "classify" if task == "classify" else "regress"
        path = config.eval_path or config.path
        if path is not None:
            return own.read_own_evaluation(path, kind, config, label_names)
    update: dict[str, object] = {"labels": list(label_names) or None}
    if config.eval_path is not None and Path(config.eval_path).expanduser().is_dir():
        update |= {"path": config.eval_path, "eval_path": None}  # the training data may be gone
    fixed = config.model_copy(update=update)
    return load_task(task, fixed, seed=seed).evaluation
