"""GLUE folders: toy files in the official layout, and the real ones where they are."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.examples import Split, parts_of
from mdpd_deploy.data.glue import GLUE
from mdpd_deploy.data.load import load_evaluation, load_task
from mdpd_deploy.errors import UserError

MNLI_START = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse"
MNLI_TRAIN = f"{MNLI_START} sentence1_parse sentence2_parse sentence1 sentence2 label1 gold_label"
MNLI_DEV = MNLI_TRAIN.replace("label1", "label1 label2 label3 label4 label5")

# task: folder, {file: header}, row values by column, and what the first row must become
OFFICIAL = {
    "sst2": ("SST-2", "sentence label", ["0", "1"]),
    "mrpc": ("MRPC", "Quality|#1 ID|#2 ID|#1 String|#2 String", ["0", "1"]),
    "qqp": ("QQP", "id qid1 qid2 question1 question2 is_duplicate", ["0", "1"]),
    "qnli": ("QNLI", "index question sentence label", ["entailment", "not_entailment"]),
    "rte": ("RTE", "index sentence1 sentence2 label", ["entailment", "not_entailment"]),
    "wnli": ("WNLI", "index sentence1 sentence2 label", ["0", "1"]),
}


def columns(header: str) -> list[str]:
    return header.split("|") if "|" in header else header.split(" ")


def write(path: Path, header: list[str] | None, rows: list[list[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [*([header] if header else []), *rows]
    path.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")


def write_task(root: Path, task: str, files: tuple[str, ...] = ("train.tsv", "dev.tsv")) -> None:
    folder, header, labels = OFFICIAL[task]
    names = columns(header)
    wanted = GLUE[task]
    for file in files:
        rows = []
        for i in range(4):
            cells = {name: f"{name}{i}" for name in names}
            cells |= {name: f"{file} {name} {i}" for name in wanted.text}
            cells[wanted.label] = labels[i % 2]
            rows.append([cells[name] for name in names])
        write(root / folder / file, names, rows)


def glue(task: str, root: Path, **options: Any) -> Any:
    return load_task(f"glue/{task}", DataConfig(path=str(root), **options), seed=0)


@pytest.mark.parametrize("task", OFFICIAL)
def test_tasks_with_a_header(tmp_path: Path, task: str) -> None:
    write_task(tmp_path, task)
    data = glue(task, tmp_path)
    text = GLUE[task].text
    first = tuple(f"train.tsv {name} 0" for name in text)
    assert data.train.inputs[0] == (first if len(text) == 2 else first[0])
    assert data.train.labels.tolist() == [0, 1, 0, 1]
    assert data.train.labels.dtype == np.int64
    assert (data.task.kind, data.fields) == ("classify", ("text",) * len(text))
    assert data.columns == text
    assert list(data.evaluation) == ["validation"]
    assert str(data.evaluation["validation"].inputs[0]).count("dev.tsv") == len(text)


def test_class_order_and_metrics_are_the_cards() -> None:
    order = {name: tuple(task.classes.values()) for name, task in GLUE.items()}
    assert order["sst2"] == ("negative", "positive")
    assert order["mrpc"][1] == "equivalent" and order["qqp"][1] == "duplicate"
    assert order["rte"] == order["qnli"] == ("entailment", "not_entailment")
    assert order["wnli"] == ("not_entailment", "entailment")
    assert order["mnli"] == ("entailment", "neutral", "contradiction")
    primary = {name: task.metrics[0] for name, task in GLUE.items()}
    assert primary.pop("cola") == "matthews"
    assert primary.pop("stsb") == "pearson_spearman"
    assert (primary.pop("mrpc"), primary.pop("qqp")) == ("accuracy_f1", "accuracy_f1")
    assert set(primary.values()) == {"accuracy"}


def test_cola_has_no_header(tmp_path: Path) -> None:
    rows = [["gj04", "1", "", "They came."], ["gj04", "0", "*", 'He said "go.']]
    write(tmp_path / "CoLA" / "train.tsv", None, rows)
    write(tmp_path / "CoLA" / "dev.tsv", None, rows[:1])
    write(tmp_path / "CoLA" / "test.tsv", ["index", "sentence"], [["0", "No label."]])
    data = glue("cola", tmp_path)
    assert data.train.inputs == ["They came.", 'He said "go.']
    assert data.train.labels.tolist() == [1, 0]
    assert data.task.labels == ("unacceptable", "acceptable")
    assert list(data.evaluation) == ["validation"]  # the official test file has no labels


def test_stsb_is_a_regression(tmp_path: Path) -> None:
    header = columns(
        "index genre filename year old_index source1 source2 sentence1 sentence2 score"
    )
    rows = [[*"0123456", "a plane", "an aircraft", "4.200"], [*"1123456", "a cat", "a car", "0.5"]]
    for file in ("train.tsv", "dev.tsv"):
        write(tmp_path / "STS-B" / file, header, rows)
    data = glue("stsb", tmp_path)
    assert data.train.labels.tolist() == [4.2, 0.5]
    assert (data.task.kind, data.task.labels, data.task.width) == ("regress", (), 1)
    assert data.train.inputs[0] == ("a plane", "an aircraft")
    rows[1][-1] = "nan"
    write(tmp_path / "STS-B" / "train.tsv", header, rows)
    with pytest.raises(UserError, match=r"train\.tsv line 3: the label is 'nan', and regression"):
        glue("stsb", tmp_path)


def test_mnli_reports_both_dev_sets(tmp_path: Path) -> None:
    for file, header in [
        ("train.tsv", MNLI_TRAIN),
        ("dev_matched.tsv", MNLI_DEV),
        ("dev_mismatched.tsv", MNLI_DEV),
    ]:
        names = columns(header)
        rows = []
        for i, label in enumerate(["neutral", "entailment", "contradiction"]):
            cells = dict.fromkeys(names, "x") | {"gold_label": label, "label1": "entailment"}
            cells |= {"sentence1": f"{file} a{i}", "sentence2": f"b{i}"}
            rows.append([cells[name] for name in names])
        write(tmp_path / "MNLI" / file, names, rows)
    data = glue("mnli", tmp_path)
    assert list(data.evaluation) == ["validation", "validation_mismatched"]
    assert data.evaluation["validation"].inputs[0] == ("dev_matched.tsv a0", "b0")
    assert data.evaluation["validation_mismatched"].inputs[0] == ("dev_mismatched.tsv a0", "b0")
    assert data.train.labels.tolist() == [1, 0, 2]


def test_a_labelled_test_file_is_measured_an_unlabelled_one_is_not(tmp_path: Path) -> None:
    write_task(tmp_path, "mrpc", ("train.tsv", "dev.tsv", "test.tsv"))
    assert list(glue("mrpc", tmp_path).evaluation) == ["validation", "test"]
    names = columns("index|#1 ID|#2 ID|#1 String|#2 String")
    write(tmp_path / "MRPC" / "test.tsv", names, [list("01234")])
    assert list(glue("mrpc", tmp_path).evaluation) == ["validation"]


def test_quotes_breaks_and_byte_order_mark_are_plain(tmp_path: Path) -> None:
    text = '\ufeffsentence\tlabel\r\n"half a quote\t1\r\nnext\u2028line\x85here\t0\r\n'
    for file in ("train.tsv", "dev.tsv"):
        (tmp_path / "SST-2").mkdir(exist_ok=True)
        (tmp_path / "SST-2" / file).write_bytes(text.encode())
    data = glue("sst2", tmp_path)
    assert data.train.inputs == ['"half a quote', "next\u2028line\x85here"]
    assert data.train.labels.tolist() == [1, 0]


def test_qqp_leaves_its_known_broken_rows_out_and_says_so(tmp_path: Path) -> None:
    write_task(tmp_path, "qqp")
    train = tmp_path / "QQP" / "train.tsv"
    train.write_text(train.read_text() + "9\t1\t2\tbroken\n9\t1\t2\tasked\t\t1\n")
    data = glue("qqp", tmp_path)
    assert len(data.train) == 5
    assert data.train.inputs[4] == ("asked", "")
    assert "1 rows without all columns (train.tsv line" in data.inventory.line


def test_eval_data_replaces_dev(tmp_path: Path) -> None:
    write_task(tmp_path, "rte", ("train.tsv", "dev.tsv", "test.tsv"))
    one = glue("rte", tmp_path, eval_path=str(tmp_path / "RTE" / "test.tsv"))
    assert list(one.evaluation) == ["validation"]
    assert one.evaluation["validation"].inputs[0][0].startswith("test.tsv")
    write_task(tmp_path / "other", "rte")
    other = glue("rte", tmp_path, eval_path=str(tmp_path / "other"))
    assert list(other.evaluation) == ["validation"]


def test_the_task_folder_itself_will_do_and_labels_fix_the_order(tmp_path: Path) -> None:
    write_task(tmp_path, "sst2")
    data = glue("sst2", tmp_path / "SST-2", labels=["positive", "negative"])
    assert data.task.labels == ("positive", "negative")
    assert data.train.labels.tolist() == [1, 0, 1, 0]
    with pytest.raises(UserError, match="own classes in any order: negative, positive"):
        glue("sst2", tmp_path, labels=["good", "bad"])


def test_limit_shuffles_by_seed(tmp_path: Path) -> None:
    names = ["sentence", "label"]
    rows = [[f"s{i}", str(i % 2)] for i in range(50)]
    for file in ("train.tsv", "dev.tsv"):
        write(tmp_path / "SST-2" / file, names, rows)
    config = DataConfig(path=str(tmp_path), limit=10)
    first: Any = load_task("glue/sst2", config, seed=1)
    assert first.train.inputs == load_task("glue/sst2", config, seed=1).train.inputs
    assert first.train.inputs != load_task("glue/sst2", config, seed=2).train.inputs
    assert first.train.inputs != [f"s{i}" for i in range(10)]
    assert [int(s[1:]) % 2 for s in first.train.inputs] == first.train.labels.tolist()
    assert len(first.evaluation["validation"]) == 50
    assert "40 training examples beyond data.limit" in first.inventory.line


def broken(root: Path, change: str) -> str:
    """Damage a sound SST-2 and return the words that its message must hold."""
    train = root / "SST-2" / "train.tsv"
    text = train.read_text()
    if change == "no folder":
        train.parent.rename(root / "sst2")
        return "holds no folder SST-2"
    if change == "no dev":
        (train.parent / "dev.tsv").unlink()
        return r"dev\.tsv does not exist"
    if change == "column":
        train.write_text(text.replace("sentence\t", "text\t", 1))
        return "has no column 'sentence': .* found text, label"
    if change == "short row":
        train.write_text(text + "no label here\n")
        return r"train\.tsv line 6 has 1 columns, 2 are expected"
    if change == "label":
        train.write_text(text + "some text\t2\n")
        return r"train\.tsv line 6: the label '2' is not one of the classes negative, positive"
    if change == "no label":
        train.write_text(text + "some text\t\n")
        return r"train\.tsv line 6 has no label"
    if change == "empty text":
        train.write_text(text + "  \t1\n")
        return r"train\.tsv line 6 has an empty text"
    if change == "encoding":
        train.write_bytes(text.encode() + b"caf\xe9\t1\n")
        return "is not UTF-8 text"
    if change == "one class":
        train.write_text("sentence\tlabel\na\t1\nb\t1\n")
        return "the class 'negative' has no training example"
    train.write_text("")
    return "an empty file"


@pytest.mark.parametrize(
    "change",
    [
        "no folder",
        "no dev",
        "column",
        "short row",
        "label",
        "no label",
        "empty text",
        "encoding",
        "one class",
        "empty",
    ],
)
def test_damage_is_named(tmp_path: Path, change: str) -> None:
    write_task(tmp_path, "sst2")
    words = broken(tmp_path, change)
    with pytest.raises(UserError, match=words):
        glue("sst2", tmp_path)


@pytest.mark.parametrize("name", ["text", "image", "label"])
def test_options_without_a_use_are_refused(tmp_path: Path, name: str) -> None:
    value: Any = ["a"] if name == "text" else "a"
    with pytest.raises(UserError, match=rf"does not use data\.{name}: leave it out"):
        glue("sst2", tmp_path, **{name: value})


def test_data_is_required() -> None:
    with pytest.raises(UserError, match="needs --data: the folder that holds SST-2/"):
        load_task("glue/sst2", DataConfig(), seed=0)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("glue/sst3", "Did you mean 'glue/sst2'"),
        ("clasify", "Did you mean 'classify'"),
        ("vtab", "Did you mean 'vtab/NAME'"),
        ("vtab/", "write vtab/NAME"),
        ("glue/", "unknown 'glue/'"),
    ],
)
def test_unknown_tasks_name_the_nearest(task: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_task(task, DataConfig(), seed=0)


# --- real data ---------------------------------------------------------------------------------

REAL = os.environ.get("MDPD_TEST_DATA")
needs_data = pytest.mark.skipif(
    REAL is None or not Path(REAL, "glue").is_dir(), reason="MDPD_TEST_DATA names no data folder"
)


@needs_data
@pytest.mark.parametrize("task", GLUE)
def test_real_folders_read_every_line(task: str) -> None:
    root = Path(str(REAL), "glue")
    folder = root / GLUE[task].folder
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    data = glue(task, root)
    for split, file in [(data.train, "train.tsv"), (data.evaluation["validation"], "dev.tsv")]:
        lines = folder.joinpath(file).read_bytes().count(b"\n")
        assert len(split) == lines - (0 if task == "cola" else 1)
    assert not data.notes


# --- LST's splits ---------------------------------------------------------------------------------


def write_rows(folder: Path, file: str, count: int, task: str) -> None:
    _, header, labels = OFFICIAL[task]
    names, wanted = columns(header), GLUE[task]
    rows = []
    for i in range(count):
        cells = dict.fromkeys(names, "x") | {name: f"{file} {i}" for name in wanted.text}
        rows.append([(cells | {wanted.label: labels[i % 2]})[name] for name in names])
    write(folder / file, names, rows)


def numbers(split: Split) -> list[int]:
    return [int(parts_of(raw)[0].split()[1]) for raw in split.inputs]


def test_lst_halves_the_dev_file_of_a_small_task_in_torchs_order(tmp_path: Path) -> None:
    write_rows(tmp_path / "RTE", "train.tsv", 6, "rte")
    write_rows(tmp_path / "RTE", "dev.tsv", 9, "rte")
    data = glue("rte", tmp_path, splits="lst")
    generator = torch.Generator().manual_seed(42)
    order = torch.randperm(9, generator=generator).tolist()
    assert numbers(data.evaluation["validation"]) == order[:4]
    assert numbers(data.evaluation["test"]) == order[4:]
    assert data.evaluation["test"].labels.tolist() == [i % 2 for i in order[4:]]
    assert numbers(data.train) == list(range(6))


def test_lst_takes_a_thousand_examples_out_of_a_large_train_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "SST-2", "train.tsv", 1010, "sst2")
    write_rows(tmp_path / "SST-2", "dev.tsv", 5, "sst2")
    data = glue("sst2", tmp_path, splits="lst")
    order = torch.randperm(1010, generator=torch.Generator().manual_seed(42)).tolist()
    assert numbers(data.evaluation["validation"]) == order[:1000]
    assert numbers(data.train) == order[1000:]
    assert numbers(data.evaluation["test"]) == list(range(5))
    write_rows(tmp_path / "SST-2", "train.tsv", 999, "sst2")
    with pytest.raises(UserError, match=r"train\.tsv: data\.splits=lst holds out 1,000"):
        glue("sst2", tmp_path, splits="lst")


def test_lst_chooses_on_the_mismatched_and_measures_the_matched(tmp_path: Path) -> None:
    for file, header in (
        ("train.tsv", MNLI_TRAIN), ("dev_matched.tsv", MNLI_DEV), ("dev_mismatched.tsv", MNLI_DEV),
    ):  # fmt: skip
        names = header.split()
        rows = [
            [file if "sentence" in name else label for name in names]
            for label in ("entailment", "neutral", "contradiction")
        ]
        write(tmp_path / "MNLI" / file, names, rows)
    found = glue("mnli", tmp_path, splits="lst").evaluation
    said = {name: parts_of(split.inputs[0])[0] for name, split in found.items()}
    assert said == {"validation": "dev_mismatched.tsv", "test": "dev_matched.tsv"}


def test_lst_has_no_splits_for_wnli_nor_for_other_tasks(tmp_path: Path) -> None:
    write_task(tmp_path, "wnli")
    with pytest.raises(UserError, match=r"data\.splits=lst has no place for WNLI"):
        glue("wnli", tmp_path, splits="lst")
    write_rows(tmp_path / "RTE", "train.tsv", 6, "rte")
    write_rows(tmp_path / "RTE", "dev.tsv", 6, "rte")
    with pytest.raises(UserError, match=r"data\.splits=lst has no place for --eval-data"):
        glue("rte", tmp_path, splits="lst", eval_path=str(tmp_path))
    with pytest.raises(UserError, match=r"--task digits does not use data\.splits"):
        load_task("digits", DataConfig(splits="lst"), seed=0)
    dev = str(tmp_path / "RTE" / "dev.tsv")
    fixed = DataConfig(path=str(tmp_path), eval_path=dev, splits="lst")
    task = glue("rte", tmp_path).task
    assert len(load_evaluation("glue/rte", task, fixed, seed=0)["validation"]) == 6
