"""Fine-grained sets: CUB-200-2011, NABirds, Oxford Flowers, Stanford Dogs and Stanford Cars.

`fgvc/NAME` reads, in the set's folder, the first of these that is there:

    train.txt  test.txt  (val.txt)                        lists of `relative/path.jpg CLASS_INDEX`
    images.txt  image_class_labels.txt  train_test_split.txt     cub and nabirds as published
    setid.mat  imagelabels.mat  jpg/                      flowers as published
    train_list.mat  test_list.mat  Images/                dogs as published
    devkit/*.mat  cars_train/  cars_test/                 cars as published, with the test's labels

`test` is measured; without a validation list a part of train is held out.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.assemble import assemble
from mdpd_deploy.data.examples import TaskData
from mdpd_deploy.data.lists import METRICS, read_list, require_picture, unlisted
from mdpd_deploy.data.rows import TASKS, Rows, Source, refuse_options
from mdpd_deploy.data.table_file import read_lines
from mdpd_deploy.errors import UserError, unknown
from mdpd_deploy.tasks import Classify

Found = dict[str, list[tuple[str, str, str]]]  # split → (path in the folder, label, its place)


class FineSet(NamedTuple):
    """One of the five: its title, classes and the folders that it may lie in."""

    title: str
    classes: int
    folders: tuple[str, ...]


SETS = {
    "cub": FineSet("CUB-200-2011", 200, ("CUB_200_2011",)),
    "nabirds": FineSet("NABirds", 555, ("nabirds",)),
    "flowers": FineSet("Oxford Flowers", 102, ("102flowers", "flowers-102", "OxfordFlower")),
    "dogs": FineSet("Stanford Dogs", 120, ("stanford_dogs", "StanfordDogs", "Stanford-dogs")),
    "cars": FineSet("Stanford Cars", 196, ("stanford_cars", "StanfordCars", "Stanford-cars")),
}


@TASKS.register("fgvc/")
def read_fgvc(task: str, config: DataConfig, *, seed: int) -> TaskData:
    """Read one set; `data.path` is its folder, or the one that holds it.

    Raises:
        UserError: If a folder, list or picture is missing, a line is damaged, or the number of
            classes is not the set's.
    """
    refuse_options(task, config, "eval_path", "text", "image", "label", "encoding", "splits")
    name = task.removeprefix("fgvc/")
    if name not in SETS:
        raise unknown("--task", task, [f"fgvc/{known}" for known in SETS])
    if config.path is None:
        raise UserError(f"--task {task} needs --data: the folder that holds {name}/.")
    folder = _folder(Path(config.path).expanduser(), name)
    files, read = _layout(folder) or _refuse(folder, task)
    check = config.bad_images == "stop"
    splits = {split: _rows(split, folder, found, check) for split, found in read(folder).items()}
    labels = {label for rows in splits.values() for label in rows.labels}
    if len(labels) != SETS[name].classes:
        raise UserError(
            f"{folder} has {len(labels)} classes, and {SETS[name].title} has {SETS[name].classes}: "
            f"give the whole set, or train on it as --task {Classify.kind}."
        )
    names = tuple(sorted(labels, key=int))
    inventory = unlisted(folder, splits, (*files, "val.txt", "classes.txt"))
    source = Source(splits, ("image",), names=names, inventory=inventory)
    return assemble(task, Classify.kind, source, config, seed=seed, metrics=METRICS)


def _folder(root: Path, name: str) -> Path:
    places = (root / place for place in (name, *SETS[name].folders))
    return next((place for place in places if place.is_dir()), root)


def _layout(folder: Path) -> tuple[tuple[str, ...], Callable[[Path], Found]] | None:
    """Return the first layout whose files are there: these, and what reads them."""
    layouts = LAYOUTS.items()
    return next((pair for pair in layouts if all((folder / f).is_file() for f in pair[0])), None)


def _refuse(folder: Path, task: str) -> Any:
    known = "; ".join(", ".join(files) for files in LAYOUTS)
    raise UserError(f"--task {task}: {folder} holds none of these: {known}.")


def _rows(split: str, folder: Path, found: Sequence[tuple[str, str, str]], check: bool) -> Rows:
    if not found:
        raise UserError(f"{folder} has no picture for {split}: take whole files.")
    paths, labels, places = (list(column) for column in zip(*found, strict=True))
    if check:
        for path, place in zip(paths, places, strict=True):
            require_picture(folder / path, place)
    if odd := [label for label in labels if not label.isdecimal()]:
        raise UserError(f"{places[labels.index(odd[0])]}: the class {odd[0]!r:.60} is no number.")
    return Rows([folder / path for path in paths], labels, places.__getitem__, str(folder))


# --- layouts -------------------------------------------------------------------------------------


def _of_lists(folder: Path) -> Found:
    files = {"train": "train.txt", "validation": "val.txt", "test": "test.txt"}
    found: Found = {}
    for split, file in files.items():
        if not (folder / file).is_file():
            continue
        rows = read_list(folder / file, Path(), "", must_exist=False)
        inputs = zip(map(str, rows.inputs), rows.labels, strict=True)
        found[split] = [(path, label, rows.where(i)) for i, (path, label) in enumerate(inputs)]
    return found


def _of_birds(folder: Path) -> Found:
    """Read CUB's three tables; NABirds has the same, with marks instead of numbers for pictures."""
    tables = [_pairs(folder / file) for file in BIRDS]
    found: Found = {"train": [], "test": []}
    for key, path in tables[0].items():
        where = f"{folder / BIRDS[0]} {key}"
        try:
            label, train = tables[1][key], tables[2][key]
        except KeyError:
            raise UserError(
                f"{where} is not in {BIRDS[1]} or {BIRDS[2]}: take whole files."
            ) from None
        found["train" if train == "1" else "test"].append((f"images/{path}", label, where))
    return found


def _pairs(path: Path) -> dict[str, str]:
    lines = (line.strip().split(" ", 1) for line in read_lines(path, "") if line.strip())
    try:
        return {key: value for key, value in lines}
    except ValueError:
        raise UserError(
            f"{path} has a line that is not `NUMBER VALUE`: take a sound copy."
        ) from None


def _of_flowers(folder: Path) -> Found:
    ids, labels = _matlab(folder / "setid.mat"), _matlab(folder / "imagelabels.mat")["labels"]
    keys = {"train": "trnid", "validation": "valid", "test": "tstid"}
    return {
        split: [
            (
                f"jpg/image_{number:05d}.jpg",
                str(labels.flat[number - 1]),
                f"{folder / 'setid.mat'} {number}",
            )
            for number in map(int, ids[key].flat)
        ]
        for split, key in keys.items()
    }


def _of_dogs(folder: Path) -> Found:
    found: Found = {}
    for split in ("train", "test"):
        table = _matlab(folder / f"{split}_list.mat")
        pairs = zip(table["file_list"].flat, table["labels"].flat, strict=True)
        found[split] = [
            (
                f"Images/{np.asarray(path).item()}",
                str(label),
                f"{folder / split}_list.mat row {row}",
            )
            for row, (path, label) in enumerate(pairs, start=1)
        ]
    return found


def _of_cars(folder: Path) -> Found:
    found: Found = {}
    for split, file in zip(("train", "test"), CARS, strict=True):
        rows = _matlab(folder / file)["annotations"].flat
        found[split] = [
            (
                f"cars_{split}/{row['fname'].item()}",
                str(row["class"].item()),
                f"{folder / file} row {number}",
            )
            for number, row in enumerate(rows, start=1)
        ]
    return found


def _matlab(path: Path) -> dict[str, Any]:
    from scipy.io import loadmat

    try:
        return dict(loadmat(path))
    except Exception as err:  # whatever its reader stumbles on
        raise UserError(
            f"{path} is no sound MATLAB file ({err!s:.100}): take a sound copy."
        ) from err


BIRDS = ("images.txt", "image_class_labels.txt", "train_test_split.txt")
CARS = ("devkit/cars_train_annos.mat", "devkit/cars_test_annos_withlabels.mat")
LAYOUTS: dict[tuple[str, ...], Callable[[Path], Found]] = {
    ("train.txt", "test.txt"): _of_lists,
    BIRDS: _of_birds,
    ("setid.mat", "imagelabels.mat"): _of_flowers,
    ("train_list.mat", "test_list.mat"): _of_dogs,
    CARS: _of_cars,
}
