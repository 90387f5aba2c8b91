"""VTAB-1K list files: `train800.txt`, `val200.txt`, `train800val200.txt`, `test.txt`.

A line is `relative/path.jpg INDEX`, the path relative to the data set's folder; an optional
`classes.txt` names the classes, one per line.

    vtab/NAME       trains on train800, chooses the best weights on val200, measures test
    vtab-full/NAME  trains on all 1000 (train800val200) and measures test after the last epoch, as
                    the papers do (`--recipe vtab-dtl` has their schedules and rates); `validation`
                    is then seen in training, so use train.keep=last
"""

from pathlib import Path

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.assemble import assemble
from mdpd_deploy.data.examples import TaskData
from mdpd_deploy.data.lists import METRICS, class_count, named, read_list, unlisted
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
HINT = "VTAB-1K's layout has this list."
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
    refuse_options(task, config, "text", "image", "label", "encoding", "splits")
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
    splits = {
        split: read_list(path, path.parent, HINT, must_exist=check) for split, path in files.items()
    }
    names = _class_names(folder, name, splits)
    for split, rows in splits.items():
        splits[split] = named(rows, names, "correct the line or classes.txt")
    notes = (FULL_NOTE,) if full and config.eval_path is None else ()
    inventory = unlisted(folder, splits, LAYOUT)
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


def _class_names(folder: Path, name: str, splits: dict[str, Rows]) -> tuple[str, ...]:
    file, official = folder / "classes.txt", OFFICIAL_CLASSES.get(name)
    if not file.is_file():
        return tuple(str(index) for index in range(official or class_count(splits.values())))
    names = tuple(line.strip() for line in read_lines(file, "") if line.strip())
    if official not in (None, len(names)):
        raise UserError(
            f"{file} names {len(names)} classes, and VTAB-1K's {name} has {official}: correct it, or "
            "call the folder otherwise."
        )
    return names
