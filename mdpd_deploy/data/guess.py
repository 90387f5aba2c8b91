"""What to learn from data whose task was not named: plain where it can only be classes, else asked."""

import math
import shlex
from pathlib import Path

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.glue import GLUE
from mdpd_deploy.data.hub import PREFIX, is_saved
from mdpd_deploy.data.split_files import split_files
from mdpd_deploy.data.table import is_table, read_table
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Classify, Regress

MANY = 100  # distinct whole numbers beyond which they may be amounts


def is_data(word: str) -> bool:
    """Tell whether a word names data where a config file could stand; `.json` may be either."""
    path = Path(word).expanduser()
    if word.startswith(PREFIX) or path.is_dir():
        return True
    return path.suffix.lower() != ".json" and is_table(path)


def guess_task(config: DataConfig) -> str:
    """Return `classify` where `data.path` holds classes and nothing else it could be meant for.

    Raises:
        UserError: If it may be meant otherwise; the message has the command to type.
    """
    assert config.path is not None
    root = Path(config.path).expanduser()
    if config.path.startswith(PREFIX) or is_saved(root):
        raise _which(config, "a data set may be learned in several ways")
    if not root.is_dir():
        return _of_table(root, config)
    if (root / "config.yaml").is_file():
        quoted = shlex.quote(str(root))
        raise UserError(
            f"{root} is a run, no data: `mdpd train --resume {quoted}` ends one that was "
            f"interrupted, `mdpd train {shlex.quote(str(root / 'config.yaml'))}` trains it anew."
        )
    _refuse_suites(root)
    files = split_files(root)
    return (
        _of_table(files.get("train") or next(iter(files.values())), config)
        if files
        else Classify.kind
    )


def _of_table(path: Path, config: DataConfig) -> str:
    table = read_table(path, config.encoding)
    column = config.label or ("label" if "label" in table.columns else None)
    if column is None:
        raise _which(config, f"its columns are {', '.join(table.columns)}")
    if _amounts(table.labels(column)):
        raise _which(config, f"the column {column!r} holds numbers")
    return Classify.kind


def _amounts(labels: list[str]) -> bool:
    """Tell whether labels are numbers that need not be classes: with a fraction, or very many."""
    try:
        numbers = {float(label) for label in labels if label}
    except ValueError:
        return False
    whole = all(math.isfinite(number) and number.is_integer() for number in numbers)
    return not whole or len(numbers) > MANY


def _refuse_suites(root: Path) -> None:
    """Say which task it is where the folder is one of GLUE or VTAB."""
    above = shlex.quote(str(root))
    for name, glue in GLUE.items():
        if (root / glue.folder / "train.tsv").is_file():
            raise UserError(
                f"{root} holds GLUE's folders: say which task, e.g. "
                f"`mdpd train --task glue/{name} --data {above}`."
            )
    found = sorted(path.parent.name for path in root.glob("*/train800.txt"))
    if not found and (root / "train800.txt").is_file():
        found = [root.name]
    if found:
        raise UserError(
            f"{root} has VTAB-1K's layout: say which task, e.g. "
            f"`mdpd train --task vtab/{found[0]} --data {above}`."
        )


def _which(config: DataConfig, why: str) -> UserError:
    words = ["mdpd", "train", "--task", Classify.kind, "--data", shlex.quote(str(config.path))]
    for option, value in (("--text", config.text), ("--image", config.image)):
        if value is not None:
            words += [option, shlex.quote(value if isinstance(value, str) else ",".join(value))]
    if config.text is None and config.image is None:
        words += ["--text", "COLUMN"]
    words += ["--label", shlex.quote(config.label) if config.label else "COLUMN"]
    return UserError(
        f"--task is needed for {config.path}, as {why}: `{' '.join(words)}` for classes, or --task "
        f"{Regress.kind} for amounts."
    )
