"""VTAB-1K list files: `train800.txt`, `val200.txt`, `train800val200.txt`, `test.txt`.

A line is `relative/path.jpg INDEX`, the path relative to the data set's folder; an optional
`classes.txt` names the classes, one per line.

    vtab/NAME       trains on train800, chooses the best weights on val200, measures test
    vtab-full/NAME  trains on all 1000 (train800val200) and measures test after the last epoch, as
                    the papers do; their augmentation, schedules and rates are not part of it, and
                    `validation` is then seen in training, so use train.keep=last
"""

import os
from pathlib import Path

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.assemble import assemble
from mdpd_deploy.data.examples import Raw, TaskData
from mdpd_deploy.data.images import looks_like_picture
from mdpd_deploy.data.inventory import Inventory, left_out, walk
from mdpd_deploy.data.rows import TASKS, Rows, Source, refuse_options
from mdpd_deploy.data.table_file import read_lines
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Classify

# Class counts of the 19 official data sets: 1000 pictures do not always show every class.
OFFICIAL_CLASSES = {
    "cifar": 100,
    "caltech101": 102,
    "dtd": 47,
    "oxford_flowers102": 102,
    "oxford_iiit_pet": 37,
    "svhn": 10,
    "sun397": 397,
    "patch_camelyon": 2,
    "eurosat": 10,
    "resisc45": 45,
    "diabetic_retinopathy": 5,
    "clevr_count": 8,
    "clevr_dist": 6,
    "dmlab": 6,
    "kitti": 4,
    "dsprites_loc": 16,
    "dsprites_ori": 16,
    "smallnorb_azi": 18,
    "smallnorb_ele": 9,
}
LAYOUT = (
    "train800.txt",
    "val200.txt",
    "train800val200.txt",
    "train800val200test.txt",
    "test.txt",
    "classes.txt",
)
MOST_DIGITS = 6  # of a class index
METRICS = ("accuracy", "balanced_accuracy")
FULL_NOTE = (
    "validation pictures are part of the training data (train800val200): "
    "use train.keep=last and read the figure of `test`."
)


@TASKS.register("vtab/", "vtab-full/")
def read_vtab(task: str, config: DataConfig, *, seed: int) -> TaskData:
    """Read one data set in VTAB-1K's layout; `data.path` is the folder that holds its folder.

    `data.eval_path` is another such folder, whose val200 and test lists are measured instead.

    Raises:
        UserError: If a folder, list or picture is missing, or a line is damaged.
    """
    refuse_options(task, config, "text", "image", "label", "encoding")
    family, _, name = task.partition("/")
    if config.path is None:
        raise UserError(f"--task {task} needs --data: the folder that holds {name}/.")
    folder = _data_folder(config.path, name, task)
    measured = _data_folder(config.eval_path, name, task) if config.eval_path else folder
    full = family == "vtab-full"
    files = {
        "train": folder / ("train800val200.txt" if full else "train800.txt"),
        "validation": measured / "val200.txt",
        "test": measured / "test.txt",
    }
    if not files["test"].is_file() and not full:
        del files["test"]
    check = config.bad_images == "stop"
    splits = {split: _read_list(path, must_exist=check) for split, path in files.items()}
    names = _class_names(folder, name, splits)
    for split, rows in splits.items():
        splits[split] = _named(rows, names)
    notes = (FULL_NOTE,) if full and config.eval_path is None else ()
    inventory = _unlisted(folder, splits)
    source = Source(
        splits, ("image",), names=names, all_classes=False, notes=notes, inventory=inventory
    )
    return assemble(task, Classify.kind, source, config, seed=seed, metrics=METRICS)


def _data_folder(root: str, name: str, task: str) -> Path:
    path = Path(root).expanduser()
    if (path / name).is_dir():
        return path / name
    if path.name == name and path.is_dir():
        return path
    near = sorted(entry.parent.name for entry in path.glob("*/train800.txt"))
    has = f" It has: {', '.join(near)}." if near else ""
    raise UserError(
        f"--task {task}: {path} holds no folder {name!r} in VTAB-1K's layout: "
        f"name the folder above it.{has}"
    )


def _read_list(path: Path, *, must_exist: bool) -> Rows:
    lines = read_lines(path, "VTAB-1K's layout has this list.")
    inputs: list[Raw] = []
    labels: list[str] = []
    places: list[int] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        if not name or not label.isdecimal() or len(label) > MOST_DIGITS:
            raise UserError(
                f"{path} line {number} is not `relative/path.jpg CLASS_INDEX`: correct the line."
            )
        if must_exist and not (path.parent / name).is_file():
            raise UserError(
                f"{path} line {number}: the picture {path.parent / name} does not exist: "
                "correct the line or add the picture."
            )
        inputs.append(path.parent / name)
        labels.append(str(int(label)))
        places.append(number)
    return Rows(inputs, labels, lambda i: f"{path} line {places[i]}", str(path))


def _unlisted(folder: Path, splits: dict[str, Rows]) -> Inventory:
    """Return the account of what no list names; the layout's own files count as used."""
    used = {os.path.normpath(str(raw)) for rows in splits.values() for raw in rows.inputs}
    used |= {str(folder / name) for name in LAYOUT}
    return left_out(
        (why or _why_unlisted(path), path.relative_to(folder).as_posix())
        for path, why in walk(folder)
        if str(path) not in used
    )


def _why_unlisted(path: Path) -> str:
    kind = "pictures" if looks_like_picture(path) else "files"
    return f"{kind} that no list names"


def _class_names(folder: Path, name: str, splits: dict[str, Rows]) -> tuple[str, ...]:
    named = folder / "classes.txt"
    if named.is_file():
        return tuple(line.strip() for line in read_lines(named, "") if line.strip())
    highest = max((int(label) for rows in splits.values() for label in rows.labels), default=0)
    return tuple(str(index) for index in range(OFFICIAL_CLASSES.get(name, highest + 1)))


def _named(rows: Rows, names: tuple[str, ...]) -> Rows:
    for i, label in enumerate(rows.labels):
        if int(label) >= len(names):
            raise UserError(
                f"{rows.where(i)}: the class index {label} is outside the {len(names)} classes "
                f"(0 to {len(names) - 1}): correct the line or classes.txt."
            )
    named = [names[int(label)] for label in rows.labels]
    return Rows(rows.inputs, named, rows.where, rows.source)
