"""Few-shot lists of fine-grained sets, in the folders that NOAH published and DTL reads.

    ROOT/few-shot_split/NAME/annotations/train_meta.list.num_shot_K.seed_S
    ROOT/few-shot_split/NAME/annotations/val_meta.list  test_meta.list
    ROOT/NAME/…                                          the pictures, from which lists name them

`few-shot/NAME:K` trains on K pictures a class, chooses the best weights on val and measures test. S is
`data.split_seed`, or else the run's seed: every seed has a list of its own.
"""

import re
from pathlib import Path

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.assemble import assemble
from mdpd_deploy.data.examples import TaskData
from mdpd_deploy.data.lists import METRICS, class_count, named, read_list
from mdpd_deploy.data.rows import TASKS, Rows, Source, refuse_options
from mdpd_deploy.errors import UserError, unknown
from mdpd_deploy.tasks import Classify
from mdpd_deploy.text import listed

CLASSES = {
    "fgvc-aircraft": 100,
    "food101": 101,
    "oxford-flowers102": 102,
    "oxford-pets": 37,
    "standford-cars": 196,  # spelled so
}
SHOTS = (1, 2, 4, 8, 16)
SPLIT = "few-shot_split"
_TRAIN = re.compile(r"train_meta\.list\.num_shot_(\d+)\.seed_(\d+)")


@TASKS.register("few-shot/")
def read_few_shot(task: str, config: DataConfig, *, seed: int) -> TaskData:
    """Read one data set at one number of shots; `data.path` is ROOT.

    Raises:
        UserError: If a folder, list or picture is missing, a line is damaged, or a class has no
            training picture.
    """
    refuse_options(task, config, "eval_path", "text", "image", "label", "encoding", "splits")
    name, _, shots = task.removeprefix("few-shot/").partition(":")
    if not shots.isdecimal():
        raise UserError(f"--task {task} lacks the number of shots: write few-shot/{name}:4.")
    if config.path is None:
        raise UserError(f"--task {task} needs --data: the folder that holds {SPLIT}/ and {name}/.")
    root = Path(config.path).expanduser()
    lists = _lists(root, name) / "annotations"
    files = {
        "train": lists / f"train_meta.list.num_shot_{int(shots)}.seed_{seed}",
        "validation": lists / "val_meta.list",
        "test": lists / "test_meta.list",
    }
    hint = f"{lists} has {_there(lists)}."
    check = config.bad_images == "stop"
    splits = {
        split: read_list(path, root / name, hint, must_exist=check) for split, path in files.items()
    }
    count = CLASSES.get(name, class_count(splits.values()))
    names = tuple(str(index) for index in range(count))
    for split, rows in splits.items():
        splits[split] = named(rows, names, "correct the line")
    notes = _fewer(splits["train"], int(shots))
    return assemble(
        task,
        Classify.kind,
        Source(splits, ("image",), names=names, notes=notes),
        config,
        seed=seed,
        metrics=METRICS,
    )


def _lists(root: Path, name: str) -> Path:
    folder = root / SPLIT
    known = sorted(path.name for path in folder.glob("*") if path.is_dir())
    if not known:
        raise UserError(f"{root} holds no {SPLIT}/NAME/annotations: name the folder above it.")
    if name not in known:
        raise unknown(f"{folder}: data set", name, known)
    return folder / name


def _there(lists: Path) -> str:
    found = (_TRAIN.fullmatch(path.name) for path in lists.glob("train_meta.list.*"))
    pairs = sorted((int(match[1]), int(match[2])) for match in found if match)
    return listed([f"{shots} shots seed {seed}" for shots, seed in pairs]) or "no training list"


def _fewer(train: Rows, shots: int) -> tuple[str, ...]:
    counts = {label: train.labels.count(label) for label in sorted(set(train.labels))}
    odd = [label for label, count in counts.items() if count != shots]
    if not odd:
        return ()
    return (
        f"{train.source} has not {shots} pictures of every class, but of {listed(odd)} others.",
    )
