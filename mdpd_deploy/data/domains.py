"""Domain generalisation: trained on a few pictures of one set, measured on others as well.

    ROOT/imagenet/annotations/train_meta.list.num_shot_16.seed_S  val_meta.list
    ROOT/imagenet/images/train/…  images/val/…
    ROOT/OTHER/annotations/val_meta.list      ROOT/OTHER/…          imagenetv2, imagenet-sketch, …

`domains/imagenet` trains on the list of `data.split_seed`, or else of the run's seed. `validation` is
that set's own; every other folder of ROOT with such a list is measured under its name, in the same
classes.
"""

from pathlib import Path

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.assemble import assemble
from mdpd_deploy.data.examples import TaskData
from mdpd_deploy.data.lists import METRICS, class_count, named, read_list
from mdpd_deploy.data.rows import TASKS, Source, refuse_options
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Classify
from mdpd_deploy.text import listed

CLASSES = {"imagenet": 1000}
OFFICIAL = ("imagenetv2", "imagenet-sketch", "imagenet-adversarial", "imagenet-rendition")
SHOTS = 16
LIST = Path("annotations", "val_meta.list")


@TASKS.register("domains/")
def read_domains(task: str, config: DataConfig, *, seed: int) -> TaskData:
    """Read the set that is trained on and those that are measured; `data.path` is ROOT.

    Raises:
        UserError: If a folder, list or picture is missing, or a line is damaged.
    """
    refuse_options(task, config, "eval_path", "text", "image", "label", "encoding", "splits")
    name = task.removeprefix("domains/")
    if config.path is None:
        raise UserError(f"--task {task} needs --data: the folder that holds {name}/.")
    root = Path(config.path).expanduser()
    train = f"train_meta.list.num_shot_{SHOTS}.seed_{seed}"
    places = {
        "train": (root / name / "annotations" / train, root / name / "images" / "train"),
        "validation": (root / name / LIST, root / name / "images" / "val"),
    }
    further = _further(root, name)
    places |= {other: (root / other / LIST, root / other) for other in further}
    hint = f"--task {task} reads it below --data {root}."
    check = config.bad_images == "stop"
    splits = {
        split: read_list(file, pictures, hint, must_exist=check)
        for split, (file, pictures) in places.items()
    }
    count = CLASSES.get(name, class_count(splits.values()))
    names = tuple(str(index) for index in range(count))
    for split, rows in splits.items():
        splits[split] = named(rows, names, "correct the line")
    source = Source(splits, ("image",), names=names, notes=_missing(name, further))
    return assemble(task, Classify.kind, source, config, seed=seed, metrics=METRICS)


def _further(root: Path, name: str) -> list[str]:
    """Return the other sets below a folder."""
    found = sorted(path.parents[1].name for path in root.glob(f"*/{LIST}"))
    if taken := {"train", "validation"} & set(found):
        raise UserError(f"{root / min(taken)} has the name of a split: call it otherwise.")
    return [other for other in found if other != name]


def _missing(name: str, further: list[str]) -> tuple[str, ...]:
    missing = [other for other in OFFICIAL if other not in further]
    if name not in CLASSES or not missing:
        return ()
    return (f"not there, and so not measured: {listed(missing)}.",)
