"""Own tables: CSV, TSV, JSONL and Parquet, text and pictures, and all that can be wrong in them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from mdpd_deploy.config import DataConfig, load_config
from mdpd_deploy.data.load import load_evaluation, load_task
from mdpd_deploy.data.table import read_inputs, read_table
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Classify, Regress

ROWS = [
    {"review": "good, really", "second": "a", "stars": 5, "mood": "happy"},
    {"review": 'she said "no"', "second": "b", "stars": 1, "mood": "sad"},
    {"review": "two\nlines", "second": "c", "stars": 4, "mood": "happy"},
    {"review": "café ☕", "second": "d", "stars": 2, "mood": "sad"},
]


def quoted(value: object, separator: str) -> str:
    text = str(value)
    if any(c in text for c in (separator, '"', "\n")):
        return '"' + text.replace('"', '""') + '"'
    return text


def write_rows(path: Path, rows: Any = ROWS) -> Path:
    """Write a table by hand in the format of its ending."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    elif path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        text = "".join(separator.join(quoted(c, separator) for c in line) + "\n" for line in lines)
        path.write_text(text, encoding="utf-8")
    return path


def read(path: Path, task: str = "classify", seed: int = 0, **options: Any) -> Any:
    options = {"text": ["review"], "label": "mood"} | options
    return load_task(task, DataConfig(path=str(path), **options), seed=seed)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_reads_the_same(tmp_path: Path, suffix: str) -> None:
    for split in ("train", "dev", "test"):
        write_rows(tmp_path / f"{split}.{suffix}")
    data = read(tmp_path)
    assert data.train.inputs == [row["review"] for row in ROWS]
    assert data.train.labels.tolist() == [0, 1, 0, 1]
    assert data.task.labels == ("happy", "sad")
    assert list(data.evaluation) == ["validation", "test"]
    assert (data.columns, data.fields) == (("review",), ("text",))
    pairs = read(tmp_path, text=["review", "second"])
    assert pairs.train.inputs[1] == ('she said "no"', "b")
    assert (pairs.columns, pairs.fields) == (("review", "second"), ("text", "text"))
    scores = read(tmp_path, "regress", label="stars")
    assert scores.train.labels.tolist() == [5.0, 1.0, 4.0, 2.0]
    assert scores.train.labels.dtype == np.float64
    assert (scores.task.labels, scores.metrics[0]) == ((), "pearson_spearman")


def test_one_file_is_split_by_class_with_the_seed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "all.csv", ROWS * 10)
    data = read(path)
    assert np.bincount(data.evaluation["validation"].labels).tolist() == [2, 2]
    assert len(data.train) == 36
    assert "held out at random" in data.notes[0] and "seed 0" in data.notes[0]
    again, other = read(path), read(path, seed=1)
    assert again.train.inputs == data.train.inputs != other.train.inputs
    assert len(read(path, "regress", label="stars").evaluation["validation"]) == 4


def test_eval_data_is_a_file_a_folder_or_absent(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.csv", ROWS * 2)
    write_rows(tmp_path / "val.csv")
    other = write_rows(tmp_path / "other.jsonl", ROWS[:2])
    assert len(read(tmp_path).evaluation["validation"]) == 4
    assert len(read(tmp_path, eval_path=str(other)).evaluation["validation"]) == 2
    assert len(read(train, eval_path=str(tmp_path)).evaluation["validation"]) == 4
    with pytest.raises(UserError, match=r"--eval-data .*gone\.csv does not exist"):
        read(train, eval_path=str(tmp_path / "gone.csv"))


def test_eval_data_of_another_kind_is_refused(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.csv")
    for name in ("happy", "sad"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / name / "a.png")
    config = DataConfig(path=str(tmp_path / "pictures"), eval_path=str(write_text_label(tmp_path)))
    with pytest.raises(UserError, match="holds single texts, the training data holds pictures"):
        load_task("classify", config, seed=0)
    with pytest.raises(UserError, match=r"data\.text names no column"):
        read(train, eval_path=str(tmp_path / "pictures"))


def write_text_label(folder: Path) -> Path:
    return write_rows(
        folder / "plain.csv", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}] * 4
    )


def test_columns_called_text_and_label_need_no_option(tmp_path: Path) -> None:
    data = load_task("classify", DataConfig(path=str(write_text_label(tmp_path))), seed=0)
    assert (data.columns, data.task.labels) == (("text",), ("x", "y"))


def test_load_evaluation_reads_one_file_whole(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "new.csv", ROWS[:1])
    config = DataConfig(path=str(path), text=["review"], label="mood")
    splits = load_evaluation("classify", Classify(("sad", "happy")), config, seed=0)
    assert {name: s.labels.tolist() for name, s in splits.items()} == {"validation": [1]}
    with pytest.raises(UserError, match="'happy' is not one of the classes sad, glad"):
        load_evaluation("classify", Classify(("sad", "glad")), config, seed=0)
    regress = DataConfig(path=str(path), text=["review"], label="stars")
    splits = load_evaluation("regress", Regress(), regress, seed=0)
    assert splits["validation"].labels.tolist() == [5.0]
    write_rows(tmp_path / "train.csv")
    folder = DataConfig(path=str(tmp_path), text=["review"], label="mood")
    with pytest.raises(UserError, match="neither a validation nor a test split"):
        load_evaluation("classify", Classify(("sad", "happy")), folder, seed=0)


def test_competition_test_files_without_labels_are_left_out(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.csv", ROWS * 3)
    write_rows(tmp_path / "valid.csv")
    write_rows(tmp_path / "test.csv", [{"review": "who knows"}])
    data = read(tmp_path)
    assert list(data.evaluation) == ["validation"]
    assert "1 test examples without labels" in data.inventory.line
    assert "test.csv" in data.inventory.line


def test_numbers_as_class_names_sort_by_value(tmp_path: Path) -> None:
    rows = [{"review": f"r{i}", "mood": i % 11} for i in range(33)]
    for suffix in ("csv", "parquet"):
        data = read(write_rows(tmp_path / f"a.{suffix}", rows))
        assert data.task.labels == tuple(str(i) for i in range(11))


def test_cells_stay_as_written(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("review,mood\nNA,no\nnull,yes\n1e3,no\n007,yes\n" * 1)
    data = read(tmp_path / "a.csv", eval_path=str(tmp_path / "a.csv"))
    assert data.train.inputs == ["NA", "null", "1e3", "007"]
    assert data.task.labels == ("no", "yes")


def test_semicolon_tables_and_byte_order_marks(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("\ufeffreview;mood\r\ngood, so;x\r\nbad;y\r\n".encode())
    data = read(tmp_path / "a.csv", eval_path=str(tmp_path / "a.csv"))
    assert data.train.inputs == ["good, so", "bad"]


def test_unquoted_tsv_keeps_its_quotes(tmp_path: Path) -> None:
    text = 'review\tmood\n"half\tx\nit is "fine"\ty\n"whole"\tx\nend"\ty\n'
    (tmp_path / "a.tsv").write_text(text)
    data = read(tmp_path / "a.tsv", eval_path=str(tmp_path / "a.tsv"))
    assert data.train.inputs == ['"half', 'it is "fine"', '"whole"', 'end"']


def test_long_documents_fit(tmp_path: Path) -> None:
    rows = [{"review": "word " * 60_000, "mood": "a"}, {"review": "x", "mood": "b"}]
    data = read(write_rows(tmp_path / "a.csv", rows), eval_path=str(tmp_path / "a.csv"))
    assert len(data.train.inputs[0]) == 300_000


# --- pictures in tables ------------------------------------------------------------------------


def picture_table(folder: Path) -> Path:
    (folder / "pics").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(folder / "pics" / name)
    rows = [{"file": "pics/a.png", "mood": "x"}, {"file": str(folder / "pics/b.png"), "mood": "y"}]
    return write_rows(folder / "t.csv", rows)


def test_image_paths_start_at_the_table(tmp_path: Path) -> None:
    path = picture_table(tmp_path)
    data = read(path, text=None, image="file", eval_path=str(path))
    assert data.train.inputs == [tmp_path / "pics" / "a.png", tmp_path / "pics" / "b.png"]
    assert (data.fields, data.columns) == (("image",), ("file",))
    assert read_inputs(path, ("file",), "image") == data.train.inputs


def test_missing_pictures_are_named_with_their_row(tmp_path: Path) -> None:
    path = picture_table(tmp_path)
    path.write_text(path.read_text() + "pics/c.png,x\n")
    with pytest.raises(UserError, match=r"t\.csv line 4: the picture .*c\.png does not exist"):
        read(path, text=None, image="file", eval_path=str(path))
    path.write_text(path.read_text().replace("pics/c.png", ""))
    with pytest.raises(UserError, match="line 4: column 'file' must hold the path of a picture"):
        read(path, text=None, image="file")


# --- predict -----------------------------------------------------------------------------------


def test_read_inputs_needs_no_labels(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "new.csv", [{"review": "a b", "second": "c"}])
    assert read_inputs(path, ("review",), "text") == ["a b"]
    assert read_inputs(path, ("review", "second"), "text") == [("a b", "c")]
    with pytest.raises(UserError, match="no column 'title'"):
        read_inputs(path, ("title",), "text")


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text": ["reviews"]}, r"no column 'reviews' for --text. Did you mean 'review'\? It has"),
        ({"label": "class"}, "no column 'class' for --label.* It has: review, second, stars, mood"),
        ({"text": None}, "name the input column with --text A.*has the columns: review"),
        ({"label": None}, "name the label column with --label COL.*has the columns: review"),
        ({"image": "review"}, "--text and --image exclude each other"),
        ({"text": ["review", "second", "mood"]}, "one column or two"),
        ({"text": []}, "one column or two"),
        ({"label": "review"}, "'review' cannot be both input and label"),
        ({"labels": ["happy"]}, "needs two classes or more"),
        ({"labels": ["happy", "happy"]}, "names 'happy' twice"),
        ({"labels": ["happy", "glad"]}, r"line 3: the label 'sad' is not one of .* happy, glad"),
        ({"labels": ["happy", "sad", "angry"]}, "the class 'angry' has no training example"),
        ({"path": None}, "needs --data"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    path = write_rows(tmp_path / "a.csv")
    config = {"path": str(path), "text": ["review"], "label": "mood"} | options
    with pytest.raises(UserError, match=words):
        load_task("classify", DataConfig(**config), seed=0)


def test_regression_has_no_classes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no classes: leave out data\.labels"):
        read(write_rows(tmp_path / "a.csv"), "regress", label="stars", labels=["a", "b"])


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("cell", "shown"), [(float("nan"), "missing|'nan'"), (None, "missing|'None'"), ("?", "'\\?'")]
)
def test_bad_scores_are_named(tmp_path: Path, suffix: str, cell: object, shown: str) -> None:
    rows: Any = [dict(row, stars=str(row["stars"])) for row in ROWS]
    rows[2]["stars"] = cell
    if suffix == "parquet" and cell != "?":
        rows = [dict(row, stars=float(str(row["stars"] or "nan"))) for row in rows]
    place = {"csv": "line 4", "jsonl": "line 5", "parquet": "row 3"}[suffix]
    with pytest.raises(UserError, match=rf"a\.{suffix} {place}: the label is ({shown})"):
        read(write_rows(tmp_path / f"a.{suffix}", rows), "regress", label="stars")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("cell", ["", "  ", None])
def test_empty_texts_are_named(tmp_path: Path, suffix: str, cell: str | None) -> None:
    if suffix == "csv" and cell is None:
        pytest.skip("CSV knows no null")
    rows = [*ROWS, dict(ROWS[0], review=cell)]
    place = {"csv": "line 7", "jsonl": "line 9", "parquet": "row 5"}[suffix]  # two\nlines is two
    with pytest.raises(UserError, match=rf"a\.{suffix} {place}: the text in column 'review' is em"):
        read(write_rows(tmp_path / f"a.{suffix}", rows))


def test_missing_labels_are_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [*ROWS, {"review": "x"}])
    with pytest.raises(UserError, match=r"a\.jsonl line 9 has no label: fill it in"):
        read(path)


def test_equal_scores_teach_nothing(tmp_path: Path) -> None:
    rows = [dict(row, stars=3) for row in ROWS]
    with pytest.raises(UserError, match=r"every label in .* is 3: there is nothing to learn"):
        read(write_rows(tmp_path / "a.csv", rows), "regress", label="stars")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"review,mood\nx,y,z\n", "line 2 has 3 fields, the header has 2"),
        ("a.csv", b'review,mood\n"x,y\n', r"line \d is not well-formed"),
        ("a.csv", b"review,mood,mood\nx,y,z\n", "two columns named 'mood'"),
        ("a.csv", b"review,mood\n", "holds no rows"),
        ("a.csv", b"", "holds no rows"),
        ("a.tsv", b"", "holds no rows"),
        ("a.csv", b"review,mood\ncaf\xe9,x\n", "is not UTF-8"),
        ("a.jsonl", b'{"review": "x"}\n{"review": \n', "line 2 is not JSON"),
        ("a.jsonl", b"[1, 2]\n", "line 1 is a list: each line must be an object"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.parquet", b"PAR1 no", "not a readable Parquet file"),
        ("a.xls", b"x", r"not a table that can be read: expected one of \.csv, \.tsv, \.jsonl"),
    ],
)
def test_damaged_tables_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_table(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data .*gone\.csv does not exist"):
        read(tmp_path / "gone.csv")
    write_rows(tmp_path / "val.csv")
    with pytest.raises(UserError, match="has no train split, only validation"):
        read(tmp_path)
    write_rows(tmp_path / "dev.jsonl")
    with pytest.raises(UserError, match=r"two files for validation, dev\.jsonl and val\.csv"):
        read(tmp_path)


def test_a_validation_table_with_other_columns(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.csv")
    write_rows(tmp_path / "val.csv", [{"review": "x", "feeling": "sad"}])
    with pytest.raises(UserError, match=r"val\.csv has no column 'mood' for --label"):
        read(tmp_path)


def test_objects_are_no_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"review": {"a": 1}, "label": "x"}, {"review": "b", "label": "y"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"line 1: column 'review' holds a dict, no text"):
        read(path)


def test_numbers_may_name_classes_in_a_config() -> None:
    assert load_config(None, None, ["data.labels=[0,1]"]).data.labels == ["0", "1"]
    with pytest.raises(UserError, match=r"data\.labels"):
        load_config(None, None, ["data.labels=[true,false]"])


def test_a_limit_that_loses_a_class_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("review,mood\n" + "".join(f"t{i},{'abc'[i % 3]}\n" for i in range(30)))
    data = read(path, limit=1)
    assert any("leaves no training example of: " in note for note in data.notes)
