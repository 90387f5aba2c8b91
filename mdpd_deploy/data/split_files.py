"""Tables named by split (`train.csv`, `validation.csv`, `test.csv`), and what lies beside them."""

import shlex
from collections.abc import Iterable
from pathlib import Path

from mdpd_deploy.data.images import looks_like_picture
from mdpd_deploy.data.inventory import Inventory, left_out, why_unread
from mdpd_deploy.data.splits import SPLIT_NAMES
from mdpd_deploy.data.table import is_table, table_stem
from mdpd_deploy.errors import UserError


def split_files(root: Path) -> dict[str, Path]:
    """Return split → table of a folder.

    Raises:
        UserError: If a split has two tables, or the folder's tables are all named otherwise.
    """
    files: dict[str, Path] = {}
    tables = [path for path in sorted(root.iterdir()) if path.is_file() and is_table(path)]
    tables = [path for path in tables if why_unread(path) is None]
    for path in tables:
        split = SPLIT_NAMES.get(table_stem(path).lower())
        if split is None:
            continue
        if split in files:
            raise UserError(
                f"{root} has two files for {split}, {files[split].name} and {path.name}: keep one."
            )
        files[split] = path
    if tables and not files and not any(path.is_dir() for path in root.iterdir()):
        raise UserError(
            f"{root} holds {tables[0].name}, whose name is no split: give --data "
            f"{shlex.quote(str(tables[0]))}, or call it train{''.join(tables[0].suffixes)}."
        )
    return files


def beside_tables(root: Path, files: Iterable[Path], pictures: Iterable[Path]) -> Inventory:
    """Return the account of what lies in a folder of tables and is none of them.

    Args:
        root: The folder.
        files: The tables that are read.
        pictures: Those that their rows name; their folders are part of the data.
    """
    used = {path.name for path in files} | {
        path.relative_to(root).parts[0] for path in pictures if path.is_relative_to(root)
    }
    entries = [path for path in sorted(root.iterdir()) if path.name not in used]
    return left_out((_reason(path), path.name) for path in entries)


def unnamed_pictures(pictures: Iterable[Path]) -> Inventory:
    """Return the account of pictures that lie beside those of a table and that no row names."""
    named = set(pictures)
    folders = sorted({path.parent for path in named})
    return left_out(
        ("pictures that no row names", f"{folder.name}/{path.name}")
        for folder in folders
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if path not in named and path.suffix and looks_like_picture(path) and not why_unread(path)
    )


def _reason(path: Path) -> str:
    unread = why_unread(path)
    if unread is not None:
        return unread
    kind = "folders" if path.is_dir() else "tables" if is_table(path) else "files"
    return f"{kind} beside the tables of the splits"
