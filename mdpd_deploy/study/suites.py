"""Groups of tasks under one name, and the means that the papers report over them.

glue       the nine tasks; the mean is over eight, without WNLI
vtab       the 19 tasks of VTAB-1K by their folder names, and any other folder in the same
           layout; the mean is over the means of the three groups
vtab-full  the same, trained on all 1,000 pictures
few-shot   five fine-grained sets with 1, 2, 4, 8 and 16 pictures a class
fgvc       five fine-grained sets
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mdpd_deploy.config import Config
from mdpd_deploy.data.few_shot import CLASSES as FEW_SHOT
from mdpd_deploy.data.few_shot import SHOTS
from mdpd_deploy.data.fgvc import SETS as FGVC
from mdpd_deploy.data.glue import GLUE
from mdpd_deploy.data.load import load_task
from mdpd_deploy.data.vtab import OFFICIAL_CLASSES
from mdpd_deploy.errors import UserError

SUITES = ("glue", "vtab", "vtab-full", "few-shot", "fgvc")
MEMBERS = {  # of the suites whose every task is known
    "glue": list(GLUE),
    "few-shot": [f"{name}:{shots}" for shots in SHOTS for name in FEW_SHOT],
    "fgvc": list(FGVC),
}
OTHER = "other"
LISTS = {
    "vtab": ("train800.txt",),
    "vtab-full": ("train800val200.txt",),
}  # that make a folder a task
VTAB_GROUPS = {
    "natural": ("cifar", "caltech101", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn",
                "sun397"),
    "specialized": ("patch_camelyon", "eurosat", "resisc45", "diabetic_retinopathy"),
    "structured": ("clevr_count", "clevr_dist", "dmlab", "kitti", "dsprites_loc", "dsprites_ori",
                   "smallnorb_azi", "smallnorb_ele"),
}  # fmt: skip
GROUP_SIZES = {
    "glue": len(GLUE) - 1,
    "few-shot": len(MEMBERS["few-shot"]),
    "fgvc": len(FGVC),
    **{name: len(tasks) for name, tasks in VTAB_GROUPS.items()},
}


def expand_tasks(words: Sequence[str], base: Config, warn: Callable[[str], None]) -> list[str]:
    """Return the tasks that the words mean and whose data can be read.

    Args:
        words: Task names and names of suites.
        base: Its data section says where the data are.
        warn: Takes one sentence for each task of a suite that is left out, with the reason.

    Raises:
        UserError: If a task that was named itself cannot be read, or nothing is left.
    """
    tasks: list[str] = []
    for word in words:
        if word not in SUITES:
            _check(word, base)
            tasks.append(word)
            continue
        if base.data.path is None:
            raise UserError(
                f"--task {word} needs --data: the folder that holds its tasks' folders."
            )
        for name in suite_members(word, base.data.path):
            try:
                _check(name, base)
            except UserError as err:
                warn(f"{name} is left out: {err}")
            else:
                tasks.append(name)
    if not tasks:
        raise UserError(
            f"--task {','.join(words)}: none of its tasks can be read; see the reasons above and "
            "name the right folder with --data."
        )
    return list(dict.fromkeys(tasks))


def group_of(task: str) -> str:
    """Return the group of a task: its suite's, of VTAB-1K natural, specialized or structured, or other."""
    family, _, name = task.partition("/")
    if family in MEMBERS and name in MEMBERS[family]:
        return family if name != "wnli" else OTHER
    for group, names in VTAB_GROUPS.items():
        if name in names and family in SUITES:
            return group
    return OTHER


def group_means(scores: Mapping[str, float]) -> dict[str, float]:
    """Return the mean of each group, and the mean of those means where there are several.

    Args:
        scores: Task → score. Tasks of no group count in none.
    """
    groups: dict[str, list[float]] = {}
    for task, score in scores.items():
        groups.setdefault(group_of(task), []).append(score)
    means = {name: statistics.mean(values) for name, values in groups.items() if name != OTHER}
    if len(means) > 1:
        means["mean"] = statistics.mean(means.values())
    return means


def suite_members(suite: str, data: str | None) -> list[str]:
    """Return the tasks of a suite, and what else lies in `data` in its layout."""
    if suite in MEMBERS:
        return [f"{suite}/{name}" for name in MEMBERS[suite]]
    root = Path(data) if data is not None else None
    lists = (path for name in LISTS[suite] for path in (root.glob(f"*/{name}") if root else ()))
    others = sorted(path.parent.name for path in lists)
    return [f"{suite}/{name}" for name in dict.fromkeys((*OFFICIAL_CLASSES, *others))]


def _check(task: str, base: Config) -> None:
    load_task(task, base.data, seed=base.train.seed)
