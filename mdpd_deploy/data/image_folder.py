"""Image folders: `train/CLASS/*.jpg`, `validation/CLASS/*.jpg`, or `CLASS/*.jpg` without splits."""

from pathlib import Path

from mdpd_deploy.data.examples import Raw
from mdpd_deploy.data.images import SUFFIXES
from mdpd_deploy.data.rows import Rows
from mdpd_deploy.data.splits import SPLIT_NAMES
from mdpd_deploy.errors import UserError

OTHERS = (".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif", ".ppm", ".jp2")


def split_folders(root: Path) -> dict[str, Path]:
    """Return split name → folder, for folders called train, validation (valid, val, dev) or test.

    A folder without folders inside is a class that happens to have such a name.

    Raises:
        UserError: If a split has two folders.
    """
    splits: dict[str, Path] = {}
    for folder in _folders(root):
        split = SPLIT_NAMES.get(folder.name.lower())
        if split is None or not _folders(folder):
            continue
        if split in splits:
            raise UserError(
                f"{root} has two folders for {split}, {splits[split].name} and {folder.name}: "
                "keep one."
            )
        splits[split] = folder
    return splits


def read_classes(root: Path) -> Rows:
    """Read the pictures below a folder of class folders; the class is the folder's name.

    Endings .jpg .jpeg .png .webp in any case; folders inside a class folder belong to the class;
    names that start with a dot are passed over.

    Raises:
        UserError: If there are no class folders, or one holds no picture.
    """
    inputs: list[Raw] = []
    labels: list[str] = []
    for folder in _folders(root):
        pictures = sorted(_pictures(folder))
        if not pictures:
            raise UserError(
                f"the class folder {folder} holds no picture ({', '.join(sorted(SUFFIXES))}): "
                "add some or remove the folder."
            )
        inputs.extend(pictures)
        labels.extend([folder.name] * len(pictures))
    if not inputs:
        raise UserError(
            f"{root} holds neither a table (train.csv, ...) nor class folders with pictures: "
            "expected train/CLASS/*.jpg or CLASS/*.jpg."
        )
    return Rows(inputs, labels, lambda i: str(inputs[i]), str(root))


def other_pictures(root: Path) -> str | None:
    """Return a note on files of other picture formats below `root`, which are left out."""
    count = sum(path.suffix.lower() in OTHERS for path in root.rglob("*"))
    if not count:
        return None
    return (
        f"{count} files below {root} are left out: only {', '.join(sorted(SUFFIXES))} are read, "
        f"not {', '.join(OTHERS)}."
    )


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _pictures(folder: Path) -> list[Path]:
    return [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
