"""The nine GLUE tasks in their official folders, files and columns.

Files are unquoted TSV: a `"` is a character. CoLA's train and dev files have no header. train is
trained on and dev is `validation` (MNLI: dev_matched; dev_mismatched is measured as
`validation_mismatched`); a test file counts only where it holds labels, as MRPC's own release does.
Class order and metrics are those of the data set cards, so class 1 is the positive one for F1.

`data.splits=lst` makes `validation` and `test` of the same files as LST, UniPT, SHERL and MDPD do: of
a small task each is half of dev, of a large one 1,000 training examples are validation and dev is test
(MNLI: mismatched and matched). The order is that of `torch.randperm` with the seed 42.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.assemble import assemble, relabelled
from mdpd_deploy.data.examples import Raw, TaskData, texts
from mdpd_deploy.data.inventory import left_out, why_unread
from mdpd_deploy.data.rows import TASKS, Rows, Source, refuse_options
from mdpd_deploy.data.table_file import read_lines
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Classify, Regress

HALVED = ("CoLA", "RTE", "MRPC", "STS-B")  # by LST: those of which dev becomes validation and test
HELD = 1000  # training examples that LST holds out of the others
_ENTAILMENT = {"entailment": "entailment", "not_entailment": "not_entailment"}


@dataclass(frozen=True)
class GlueTask:
    """Where a GLUE task keeps what.

    Attributes:
        folder: Official folder name.
        text: Text columns.
        label: Label column.
        classes: Label as written → class name, in index order; empty for scores.
        metrics: Metric names, the primary one first.
        header: Columns of a train or dev file without a header line.
        kind: What the task makes of a text.
        dev: Evaluation name → file.
        loose: The release has broken rows and empty texts, known and left out (or kept) by all.
    """

    folder: str
    text: tuple[str, ...]
    label: str
    classes: Mapping[str, str]
    metrics: tuple[str, ...] = ("accuracy",)
    header: tuple[str, ...] | None = None
    kind: str = Classify.kind
    dev: tuple[tuple[str, str], ...] = (("validation", "dev.tsv"),)
    loose: bool = False


GLUE = {
    "cola": GlueTask(
        "CoLA",
        ("sentence",),
        "label",
        {"0": "unacceptable", "1": "acceptable"},
        metrics=("matthews", "accuracy"),
        header=("source", "label", "star", "sentence"),
    ),
    "sst2": GlueTask("SST-2", ("sentence",), "label", {"0": "negative", "1": "positive"}),
    "mrpc": GlueTask(
        "MRPC",
        ("#1 String", "#2 String"),
        "Quality",
        {"0": "not_equivalent", "1": "equivalent"},
        metrics=("accuracy_f1", "accuracy", "f1"),
    ),
    "stsb": GlueTask(
        "STS-B",
        ("sentence1", "sentence2"),
        "score",
        {},
        metrics=("pearson_spearman", "pearson", "spearman"),
        kind=Regress.kind,
    ),
    "qqp": GlueTask(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        {"0": "not_duplicate", "1": "duplicate"},
        metrics=("accuracy_f1", "accuracy", "f1"),
        loose=True,
    ),
    "mnli": GlueTask(
        "MNLI",
        ("sentence1", "sentence2"),
        "gold_label",
        {name: name for name in ("entailment", "neutral", "contradiction")},
        dev=(
            ("validation", "dev_matched.tsv"),
            ("validation_mismatched", "dev_mismatched.tsv"),
        ),
    ),
    "qnli": GlueTask("QNLI", ("question", "sentence"), "label", _ENTAILMENT),
    "rte": GlueTask("RTE", ("sentence1", "sentence2"), "label", _ENTAILMENT),
    "wnli": GlueTask(
        "WNLI",
        ("sentence1", "sentence2"),
        "label",
        {"0": "not_entailment", "1": "entailment"},
    ),
}


@TASKS.register(*(f"glue/{name}" for name in GLUE))
def read_glue(task: str, config: DataConfig, *, seed: int) -> TaskData:
    """Read one GLUE task; `data.path` is the folder that holds the official task folders.

    `data.eval_path` is another such folder, or one file with the official columns; it takes the
    place of the dev and test files.

    Raises:
        UserError: If a folder, file or column is missing, or a row is damaged.
    """
    refuse_options(task, config, "text", "image", "label", "encoding")
    glue = GLUE[task.removeprefix("glue/")]
    if config.path is None:
        raise UserError(f"--task {task} needs --data: the folder that holds {glue.folder}/.")
    folder = _task_folder(Path(config.path).expanduser(), glue, task)
    left: list[tuple[str, str]] = []
    splits = {"train": _read(folder / "train.tsv", glue, left)}
    evaluation = Path(config.eval_path).expanduser() if config.eval_path else folder
    if config.splits == "lst":
        splits |= _as_lst(task, config, splits["train"], folder, left)
    elif evaluation.is_file():
        splits["validation"] = _read(evaluation, glue, left)
    else:
        if config.eval_path:
            evaluation = _task_folder(evaluation, glue, task)
        for name, file in glue.dev:
            splits[name] = _read(evaluation / file, glue, left)
        if _has_labels(evaluation / "test.tsv", glue):
            splits["test"] = _read(evaluation / "test.tsv", glue, left)
    source = Source(
        splits,
        texts(len(glue.text)),
        names=tuple(glue.classes.values()) or None,
        columns=glue.text,
        inventory=left_out([*left, *_unused(folder, splits, config)]),
    )
    return assemble(task, glue.kind, source, config, seed=seed, metrics=glue.metrics)


def _as_lst(
    task: str, config: DataConfig, train: Rows, folder: Path, left: list[tuple[str, str]]
) -> dict[str, Rows]:
    """Return the splits as LST's code makes them (`AbstractTask.get` with `split_validation_test`)."""
    glue = GLUE[task.removeprefix("glue/")]
    if config.eval_path or task == "glue/wnli":
        what = "WNLI" if task == "glue/wnli" else "--eval-data"
        raise UserError(f"data.splits=lst has no place for {what}: leave one of them out.")
    dev = [_read(folder / file, glue, left) for _, file in glue.dev]
    if len(dev) > 1:  # MNLI
        return {"validation": dev[1], "test": dev[0]}
    if glue.folder in HALVED:
        order, count = torch_randperm(len(dev[0])), len(dev[0]) // 2
        return {"validation": dev[0].of(order[:count]), "test": dev[0].of(order[count:])}
    order = torch_randperm(len(train))
    if len(train) <= HELD:
        raise UserError(f"{train.source}: data.splits=lst holds out {HELD:,} of its examples.")
    held, kept = order[:HELD], order[HELD:]
    return {"train": train.of(kept), "validation": train.of(held), "test": dev[0]}


def torch_randperm(n: int, seed: int = 42) -> NDArray[np.int64]:
    """Return `torch.randperm(n, generator=torch.Generator().manual_seed(seed))` without torch."""
    raw = np.random.RandomState(seed).randint(0, 1 << 32, size=max(n - 1, 0), dtype=np.uint32)
    order = np.arange(n)
    for i, number in enumerate(raw):
        j = i + int(number) % (n - i)
        order[i], order[j] = order[j], order[i]
    return order


def _unused(folder: Path, splits: Mapping[str, Rows], config: DataConfig) -> list[tuple[str, str]]:
    """Return what lies in the task's folder and is not read, with the reason."""
    read = {Path(rows.source).name for rows in splits.values()}
    test = {} if config.splits else {"test.tsv": "test files without labels"}
    return [
        (why_unread(path) or test.get(path.name, "files that are not read"), path.name)
        for path in sorted(folder.iterdir())
        if path.name not in read
    ]


def _task_folder(root: Path, glue: GlueTask, task: str) -> Path:
    folder = root / glue.folder
    if folder.is_dir():
        return folder
    if root.name == glue.folder and root.is_dir():
        return root
    raise UserError(
        f"--task {task}: {root} holds no folder {glue.folder}: "
        "name the folder that holds the official GLUE folders."
    )


def _read(path: Path, glue: GlueTask, left: list[tuple[str, str]]) -> Rows:
    header, rows, lines = _read_tsv(path, glue)
    wanted = [_column(header, name, path) for name in (*glue.text, glue.label)]
    kept = [i for i, row in enumerate(rows) if len(row) > max(wanted)]
    broken = sorted(set(range(len(rows))) - set(kept))
    if broken and not glue.loose:
        at = broken[0]
        raise UserError(
            f"{path} line {lines[at]} has {len(rows[at])} columns, {len(header)} are expected: "
            "correct the line or remove it."
        )
    left += [("rows without all columns", f"{path.name} line {lines[i]}") for i in broken]
    texts = [_texts(rows[i], wanted[:-1], path, lines[i], loose=glue.loose) for i in kept]
    labels = [rows[i][wanted[-1]].strip() for i in kept]
    places = [lines[i] for i in kept]
    found = Rows(texts, labels, lambda i: f"{path} line {places[i]}", str(path))
    return relabelled(found, dict(glue.classes))


def _texts(row: list[str], columns: list[int], path: Path, line: int, *, loose: bool) -> Raw:
    cells = [row[column] for column in columns]
    if not loose and not all(cell.strip() for cell in cells):
        raise UserError(f"{path} line {line} has an empty text: fill it in or remove the line.")
    return cells[0] if len(cells) == 1 else (cells[0], cells[1])


def _read_tsv(path: Path, glue: GlueTask) -> tuple[list[str], list[list[str]], list[int]]:
    """Return header, rows and their line numbers of an unquoted TSV file."""
    lines = read_lines(path, "name the folder that holds GLUE's official folders and files.")
    cells = [(n, line.split("\t")) for n, line in enumerate(lines, start=1) if line]
    header = list(glue.header) if glue.header else []
    if not header and cells:
        header = [name.strip() for name in cells.pop(0)[1]]
    return header, [row for _, row in cells], [n for n, _ in cells]


def _column(header: list[str], name: str, path: Path) -> int:
    if name in header:
        return header.index(name)
    raise UserError(
        f"{path} has no column {name!r}: expected GLUE's official columns, found "
        f"{', '.join(header) or 'an empty file'}."
    )


def _has_labels(path: Path, glue: GlueTask) -> bool:
    """Tell whether a test file is one of the few that were published with labels."""
    if not path.is_file():
        return False
    header, rows, _ = _read_tsv(path, glue)
    first = rows[0] if glue.header and rows else header
    return len(first) == len(glue.header) if glue.header else glue.label in first
