"""The user's own data, for every kind of task: tables, image folders and hub data sets."""

from pathlib import Path
from typing import TYPE_CHECKING

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.assemble import assemble, to_split, without_unlabelled_test
from mdpd_deploy.data.examples import Split, TaskData, words_of
from mdpd_deploy.data.hub import PREFIX, SPLITS_FILE, is_saved, load_hub, load_saved, read_hub
from mdpd_deploy.data.image_folder import read_image_folder
from mdpd_deploy.data.inventory import Inventory, left_out
from mdpd_deploy.data.rows import TASKS, Columns, Found, Rows, Source, refuse_options
from mdpd_deploy.data.split_files import beside_tables, split_files, unnamed_pictures
from mdpd_deploy.data.table import Table, is_text_table, read_table, table_texts
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import KINDS, Task

if TYPE_CHECKING:
    from datasets import DatasetDict


@TASKS.register(*KINDS)
def read_own(task: str, config: DataConfig, *, seed: int) -> TaskData:
    """Read `data.path`: a table, a folder of tables by split, of pictures, or saved by `datasets`;
    or `hub:NAME`.

    `data.eval_path` takes the place of the validation and test splits that `data.path` has.

    Raises:
        UserError: For a wrong path, column, label, text or picture, with its file and row.
    """
    refuse_options(task, config, "splits")
    kind = KINDS[task]
    if config.path is None:
        raise UserError(f"--task {task} needs --data: a table, a folder, or hub:NAME.")
    found = _read(config.path, "--data", kind, config)
    if "train" not in found.splits:
        raise UserError(
            f"{config.path} has no train split, only {', '.join(found.splits)}: "
            "add train.* (or train/CLASS/*.jpg)."
        )
    splits, inventory = found.splits, found.inventory
    if config.eval_path is not None:
        measured = _read(config.eval_path, "--eval-data", kind, config)
        if measured.fields != found.fields:
            raise UserError(
                f"--eval-data {config.eval_path} holds {words_of(measured.fields)}, the training "
                f"data holds {words_of(found.fields)}: give the same kind."
            )
        evaluation = _measured(measured, config.eval_path)
        if "validation" not in evaluation:
            evaluation = {"validation": evaluation["test"]}
        inventory += measured.inventory + _replaced(splits)
        splits = {"train": splits["train"], **evaluation}
    splits, unlabelled = without_unlabelled_test(splits)
    columns = found.columns
    source = Source(
        splits,
        found.fields,
        columns=columns.inputs if columns else (),
        notes=found.notes,
        inventory=inventory + unlabelled,
    )
    return assemble(task, task, source, config, seed=seed)


def read_own_evaluation(path: str, task: Task, config: DataConfig) -> dict[str, Split]:
    """Read only what is to be measured, for a model whose task is settled.

    Args:
        path: A table, a folder, or `hub:NAME`. A single table, and pictures without split
            folders, are `validation` whole; else the validation and test splits count.
        task: What the model knows of it.
        config: The column options.

    Raises:
        UserError: As `read_own`, and if there is nothing to measure.
    """
    splits, _ = without_unlabelled_test(_measured(_read(path, "--data", type(task), config), path))
    if not splits:
        raise UserError(f"{path} has no labels to measure against: add the label column.")
    return {name: to_split(rows, task) for name, rows in splits.items()}


def _replaced(splits: dict[str, Rows]) -> Inventory:
    """Return the account of the splits in whose place `--eval-data` comes."""
    return left_out(
        ("splits that --eval-data replaces", rows.source)
        for name, rows in splits.items()
        if name != "train"
    )


def _measured(found: Found, path: str) -> dict[str, Rows]:
    """Return the splits to measure on, `validation` or `test` or both."""
    if found.whole:
        return {"validation": found.splits["train"]}
    measured = {name: rows for name, rows in found.splits.items() if name != "train"}
    if not measured:
        raise UserError(
            f"{path} has neither a validation nor a test split: name the file to measure on."
        )
    return measured


def _read(path: str, option: str, kind: type[Task], config: DataConfig) -> Found:
    if path.startswith(PREFIX):
        return _read_data_set(path, load_hub(path), config)
    root = Path(path).expanduser()
    if not root.exists():
        raise UserError(f"{option} {path} does not exist: correct the path.")
    if is_saved(root):
        whole = not (root / SPLITS_FILE).is_file()
        return _read_data_set(path, load_saved(root), config, whole=whole)
    files = {"train": root} if root.is_file() else split_files(root)
    if not files:
        return _read_pictures(root, kind, config)
    if not any(map(is_text_table, files.values())):
        _refuse_encoding(path, config)
    tables = {split: read_table(file, config.encoding) for split, file in files.items()}
    first = tables.get("train") or next(iter(tables.values()))
    columns = _choose(config, list(first.columns), str(first.path))
    rows = {split: _table_rows(table, columns, split, config) for split, table in tables.items()}
    named = [raw for part in rows.values() for raw in part.inputs if isinstance(raw, Path)]
    inventory = unnamed_pictures(named)
    inventory += left_out(entry for table in tables.values() for entry in table.left_out)
    if root.is_dir():
        inventory += beside_tables(root, files.values(), named)
    return Found(rows, root.is_file(), columns, inventory=inventory)


def _refuse_encoding(path: str, config: DataConfig) -> None:
    if config.encoding is not None:
        raise UserError(
            f"data.encoding is for tables of text (CSV, TSV, JSON), and {path} holds none: leave it "
            "out."
        )


def _read_data_set(
    path: str, loaded: "DatasetDict", config: DataConfig, *, whole: bool = False
) -> Found:
    _refuse_encoding(path, config)
    columns = _choose(config, list(next(iter(loaded.values())).column_names), path)
    rows, inventory = read_hub(path, loaded, columns)
    return Found(rows, whole, columns, inventory=inventory)


def _read_pictures(root: Path, kind: type[Task], config: DataConfig) -> Found:
    kind.refuse_folders(str(root))
    _refuse_encoding(str(root), config)
    given = [name for name in ("text", "image", "label") if getattr(config, name) is not None]
    if given:
        raise UserError(
            f"{root} holds no table (train.csv, ...), so data.{given[0]} names no column: "
            "leave it out for an image folder, or correct the path."
        )
    return read_image_folder(root)


def _choose(config: DataConfig, existing: list[str], where: str) -> Columns:
    """Settle the columns; one that is not named is `text`, `image` or `label` if there is such."""
    if config.text is not None and config.image is not None:
        raise UserError("--text and --image exclude each other: give one of them.")
    has = f"{where} has the columns: {', '.join(existing)}."
    text, image = config.text, config.image
    if text is None and image is None:
        image = "image" if "image" in existing else None
        text = ["text"] if "text" in existing and image is None else None
        if text is None and image is None:
            raise UserError(f"name the input column with --text A[,B] or --image COL. {has}")
    if text is not None and len(text) not in (1, 2):
        raise UserError(f"--text takes one column or two (a pair), given {len(text)}. {has}")
    label = config.label or ("label" if "label" in existing else None)
    if label is None:
        raise UserError(f"name the label column with --label COL. {has}")
    inputs = tuple(text) if text is not None else (str(image),)
    if label in inputs:
        raise UserError(f"the column {label!r} cannot be both input and label. {has}")
    return Columns(inputs, image is not None, label)


def _table_rows(table: Table, columns: Columns, split: str, config: DataConfig) -> Rows:
    if columns.image:
        inputs = table.pictures(columns.inputs[0], must_exist=config.bad_images == "stop")
    else:
        inputs = table_texts(table, columns.inputs)
    if split == "test" and columns.label not in table.columns:
        labels = [""] * len(table)
    else:
        labels = table.labels(columns.label)
    return Rows(inputs, labels, table.where, str(table.path))
