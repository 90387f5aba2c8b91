"""Image folders: `train/CLASS/*.jpg`, `validation/CLASS/*.jpg`, or `CLASS/*.jpg` without splits.

Every file below the folder is a picture that is used, or counted with the reason why it is not.
"""

import shlex
from collections.abc import Iterator
from pathlib import Path

from mdpd_deploy.data.cells import class_of
from mdpd_deploy.data.examples import Raw
from mdpd_deploy.data.images import SUFFIXES, looks_like_picture
from mdpd_deploy.data.inventory import (
    FOLDER_LINK,
    is_system,
    left_out,
    walk,
    why_unread,
)
from mdpd_deploy.data.rows import Found, Rows
from mdpd_deploy.data.splits import SPLIT_NAMES
from mdpd_deploy.errors import UserError
from mdpd_deploy.text import listed

Left = list[tuple[str, str]]  # (reason, name) of what is not used
SEARCH_DEPTH = 3  # folders below the one given in which splits are looked for, to name them


def read_image_folder(root: Path) -> Found:
    """Read every picture in the class folders of every split.

    Endings of `images.SUFFIXES` in any case, and files without an ending that are pictures;
    folders inside a class folder belong to the class; names that start with a dot and the folders
    of systems (`@eaDir`, `__MACOSX`, ...) are passed over.

    Raises:
        UserError: If there are no class folders, one holds no picture, or the folders are arranged
            in another way; a folder further down that fits is named.
    """
    found = split_folders(root)
    if not found:
        _refuse_other_layouts(root)
    left: Left = []
    notes: list[str] = []
    for path in sorted(root.iterdir()) if found else ():
        if path not in found.values():
            left += _all_of(path, root, "beside the split folders")
    splits = {
        split: _read_classes(folder, root, left, notes)
        for split, folder in (found or {"train": root}).items()
    }
    return Found(splits, not found, notes=tuple(notes), inventory=left_out(left))


def split_folders(root: Path) -> dict[str, Path]:
    """Return split name → folder, for folders called train, validation (valid, val, dev) or test.

    A folder without folders inside is a class that happens to have such a name.

    Raises:
        UserError: If a split has two folders.
    """
    splits: dict[str, Path] = {}
    for folder in _folders(root):
        split = _split_of(folder)
        if split is None or not _folders(folder):
            continue
        if split in splits:
            raise UserError(
                f"{root} has two folders for {split}, {splits[split].name} and {folder.name}: "
                "keep one."
            )
        splits[split] = folder
    return splits


def _read_classes(root: Path, top: Path, left: Left, notes: list[str]) -> Rows:
    """Read a folder of class folders; the class is the folder's name."""
    inputs: list[Raw] = []
    labels: list[str] = []
    spelled: dict[str, str] = {}
    for folder in sorted(root.iterdir()):
        reason = _why_no_class(folder, root)
        if reason is not None:
            left.append((reason, _below(folder, top)))
            continue
        pictures = _class_pictures(folder, top, left)
        first = spelled.setdefault(class_of(folder.name), folder.name)
        if first != folder.name:
            notes.append(
                f"the folders {first!a} and {folder.name!a} in {root} spell one name in two "
                "ways: they are one class."
            )
        inputs.extend(pictures)
        labels.extend([folder.name] * len(pictures))
    if not inputs:
        raise _no_classes(root)
    return Rows(inputs, labels, lambda i: str(inputs[i]), str(root))


def _why_no_class(path: Path, root: Path) -> str | None:
    reason = why_unread(path)
    if reason is not None:
        return reason
    if not path.is_dir():
        return f"{'pictures' if looks_like_picture(path) else 'files'} outside the class folders"
    above = root.resolve().is_relative_to(path.resolve())
    return FOLDER_LINK if above else None


def _class_pictures(folder: Path, top: Path, left: Left) -> list[Path]:
    pictures: list[Path] = []
    endings: list[str] = []
    for path, unread in walk(folder):
        reason = unread or _why_no_picture(path)
        if reason is None:
            pictures.append(path)
        else:
            left.append((reason, _below(path, top)))
            endings += [path.suffix.lower() or path.name] if unread is None else []
    if not pictures:
        holds = f" but {len(endings)} files ({listed(sorted(set(endings)), 3)})" if endings else ""
        raise UserError(
            f"the class folder {folder} holds no picture ({', '.join(sorted(SUFFIXES))}){holds}: "
            "add some or remove the folder."
        )
    return sorted(pictures)


def _why_no_picture(path: Path) -> str | None:
    if looks_like_picture(path):
        return None
    if not path.suffix:
        return "files without an ending that are no pictures"
    return f"files {path.suffix.lower()}, which are not read"


def _all_of(path: Path, top: Path, reason: str) -> Iterator[tuple[str, str]]:
    """Yield what a file or folder holds that is not used at all."""
    unread = why_unread(path)
    if unread is not None or not path.is_dir() or path.is_symlink():
        yield unread or reason, _below(path, top)
        return
    for inner, hidden in walk(path):
        yield hidden or reason, _below(inner, top)


# --- layouts that are not read, in words -----------------------------------------------------


def _refuse_other_layouts(root: Path) -> None:
    """Raise `UserError` where class folders would be taken for something else."""
    folders = _folders(root)
    flat = {split: folder for folder in folders if (split := _split_of(folder))}
    if len(flat) > 1:
        named = " and ".join(sorted(folder.name for folder in flat.values()))
        raise UserError(
            f"{named} in {root} hold pictures without class folders: expected train/CLASS/*.jpg, or "
            "a table with --image COL --label COL."
        )
    nested = _nested(root)
    if nested is not None:
        raise UserError(
            f"{root} holds no class folders, they are in {nested}: give --data "
            f"{shlex.quote(str(nested))}."
        )
    inside = [folder for folder in folders if _splits_in(folder)]
    if len(inside) > 1:
        raise UserError(
            f"{root} holds the splits inside the classes ({inside[0].name}/"
            f"{_splits_in(inside[0])[0].name}): put them above, as in train/{inside[0].name}/*.jpg."
        )


def _nested(root: Path) -> Path | None:
    """Return a folder below the one given that looks like the image folder that was meant."""
    level = [root]
    for _ in range(SEARCH_DEPTH):
        level = [folder for above in level for folder in _folders(above)]
        for folder in level:
            if split_folders(folder):
                return folder
    alone = _folders(root)
    while len(alone) == 1 and not any(looks_like_picture(path) for path in _files(alone[0])):
        folder, alone = alone[0], _folders(alone[0])
        if len(alone) > 1:
            return folder
    return None


def _splits_in(folder: Path) -> list[Path]:
    """Return the split folders inside what would be a class folder, if there are two."""
    found = [inner for inner in _folders(folder) if _split_of(inner)]
    return found if len({_split_of(inner) for inner in found}) > 1 else []


def _no_classes(root: Path) -> UserError:
    loose = sum(looks_like_picture(path) for path in _files(root))
    if loose:
        return UserError(
            f"{root} holds {loose} pictures without class folders: put them into "
            "CLASS/*.jpg, or give a table with --image COL --label COL."
        )
    return UserError(
        f"{root} holds neither a table (train.csv, ...) nor class folders with pictures: "
        "expected train/CLASS/*.jpg or CLASS/*.jpg."
    )


def _split_of(folder: Path) -> str | None:
    return SPLIT_NAMES.get(folder.name.lower())


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not is_system(p.name))


def _files(root: Path) -> list[Path]:
    return [p for p in root.iterdir() if p.is_file() and not is_system(p.name)]


def _below(path: Path, top: Path) -> str:
    return path.relative_to(top).as_posix()
