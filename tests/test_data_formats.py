"""The forms that people have data in: JSON arrays, packed tables, Excel, other encodings, folders
that `datasets` saved."""

import gzip
import json
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from mdpd_deploy.config import DataConfig, load_config
from mdpd_deploy.data.load import load_task
from mdpd_deploy.data.table import read_inputs, read_table
from mdpd_deploy.errors import UserError

ROWS = [{"text": f"café {i}", "label": ("good", "bad")[i % 2]} for i in range(8)]
CSV = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in ROWS)
needs_openpyxl = pytest.mark.skipif(find_spec("openpyxl") is None, reason="the extra xlsx")


def read(path: Path, **options: Any) -> Any:
    return load_task("classify", DataConfig(path=str(path), **options), seed=0)


def same_rows(path: Path, **options: Any) -> None:
    data = read(path, eval_path=str(path), **options)
    assert data.train.inputs == [row["text"] for row in ROWS]
    assert data.train.labels.tolist() == [1, 0] * 4


def lines() -> str:
    return "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps(ROWS, indent=1)),
        ("b.json", lines()),
        ("c.csv.gz", CSV),
        ("d.TSV.GZ", CSV.replace(",", "\t")),
        ("e.jsonl.gz", lines()),
        ("f.json.gz", json.dumps(ROWS)),
        ("g.csv", "\ufeff" + CSV.replace("\n", "\r\n")),
        ("h.jsonl", lines().replace("\n", "\r")),
    ],
)
def test_tables_of_text(tmp_path: Path, name: str, content: str) -> None:
    packed = name.lower().endswith(".gz")
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if packed else data)
    same_rows(tmp_path / name)


def test_packed_tables_by_split(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv.gz").write_bytes(gzip.compress(CSV.encode(), mtime=0))
    (tmp_path / "extra.csv.gz").write_bytes(b"")
    data = read(tmp_path)
    assert (len(data.train), len(data.evaluation["validation"])) == (8, 8)
    assert "1 tables beside the tables of the splits (extra.csv.gz)" in data.inventory.line


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-8"])
def test_other_encodings_are_named(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(CSV.encode(encoding))
    same_rows(path, encoding=encoding)
    assert read_inputs(path, ("text",), "text", encoding)[0] == "café 0"
    if encoding != "utf-8":
        with pytest.raises(UserError, match=r"not UTF-8 text .*--set data\.encoding=latin-1"):
            read(path)


def test_an_encoding_that_is_none_or_does_nothing_is_refused(tmp_path: Path) -> None:
    for name in ("latin-99", "rot13", "hex", "a\0b", ""):
        with pytest.raises(UserError, match=r"data\.encoding.* Python knows no encoding"):
            load_config(None, {"data.encoding": name})
    (tmp_path / "a.csv").write_bytes(CSV.encode("latin-1"))
    with pytest.raises(UserError, match=r"not ascii text .*correct data\.encoding"):
        read(tmp_path / "a.csv", encoding="ascii")
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"data\.encoding is for tables of text"):
        read(tmp_path / "a.parquet", encoding="latin-1")
    for name in ("x", "y"):
        (tmp_path / "pics" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "pics" / name / "a.png")
    with pytest.raises(UserError, match=r"data\.encoding is for tables of text"):
        read(tmp_path / "pics", encoding="latin-1")
    with pytest.raises(UserError, match=r"--task digits does not use data\.encoding"):
        load_task("digits", DataConfig(encoding="latin-1"), seed=0)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b'[{"text": "x"}, 3]', "row 2 is a int: each row must be an object"),
        ("a.json", b'[{"text": "x"},\n{"text": ]', r"a\.json is not JSON \(.*, line 2\)"),
        ("a.json", b'{\n "text": "x"\n}', "line 1 is not JSON"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b'[{"label": ' + b"9" * 5000 + b"}]", "a number of thousands of digits"),
        ("a.csv.gz", b"no gzip", "no sound gzip file"),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)[:-20], "no sound gzip file"),
        ("a.csv.gz", gzip.compress(bytes(10), mtime=0) + b"\x1f\x8b rubbish", "no sound gzip file"),
        ("a.parquet.gz", b"", "not a table that can be read"),
        ("a.gz", b"", "not a table that can be read"),
        ("a.xls", b"", "not a table that can be read"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_table(tmp_path / name)


def test_a_packed_table_that_grows_without_end_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("mdpd_deploy.data.table_file.ALWAYS_BYTES", 1_000_000)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text,label\n" + bytes(5_000_000)))
    with pytest.raises(UserError, match=r"a\.csv\.gz unpacks to more than 100 times its size"):
        read_table(tmp_path / "a.csv.gz")
    zeros = pa.table({"text": pa.nulls(2_000_000), "label": pa.nulls(2_000_000)})
    parquet.write_table(zeros, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet unpacks to more than 100 times its size"):
        read_table(tmp_path / "a.parquet")
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("xl/sharedStrings.xml", bytes(5_000_000))
    if find_spec("openpyxl") is not None:
        with pytest.raises(UserError, match=r"a\.xlsx unpacks to more than 100 times its size"):
            read_table(tmp_path / "a.xlsx")


# --- Excel -------------------------------------------------------------------------------------


def workbook(path: Path, rows: list[list[Any]], *more: str) -> Path:
    from openpyxl import Workbook

    book = Workbook()
    for row in rows:
        book.active.append(row)
    for name in more:
        book.create_sheet(name)
    book.save(path)
    return path


@needs_openpyxl
def test_excel_workbooks(tmp_path: Path) -> None:
    rows: list[list[Any]] = [[row["text"], row["label"]] for row in ROWS]
    path = workbook(tmp_path / "a.xlsx", [["text", "label", None], *rows, []], "old", "notes")
    same_rows(path)
    assert "2 sheets after the first (a.xlsx old, a.xlsx notes)" in read(path).inventory.line
    numbers = [[5, 1], [2.5, 2.0], [None, 3]]
    table = read_table(workbook(tmp_path / "b.xlsx", [["text", "label"], *numbers]))
    assert table.labels("label") == ["1", "2", "3"]
    with pytest.raises(UserError, match=r"b\.xlsx row 4: the text in column 'text' is empty"):
        table.texts("text")


@needs_openpyxl
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([["text", None, "label"], ["a", "b", "c"]], "column 2 has no name"),
        ([["text", "text"], ["a", "b"]], "two columns named 'text'"),
        ([["text", "label"], ["a", "b", "c"]], "row 2 has 3 cells, the header has 2"),
        ([["text", "label"]], "holds no rows"),
        ([], "holds no rows"),
    ],
)
def test_wrong_workbooks_are_named(tmp_path: Path, rows: list[list[Any]], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_table(workbook(tmp_path / "a.xlsx", rows))


@needs_openpyxl
def test_damaged_workbooks_are_named(tmp_path: Path) -> None:
    sound = workbook(tmp_path / "a.xlsx", [["text", "label"], ["a", "b"]]).read_bytes()
    for content in (b"", b"x", sound[:-40], sound[: len(sound) // 2]):
        (tmp_path / "b.xlsx").write_bytes(content)
        with pytest.raises(UserError, match=r"b\.xlsx is not a readable Excel workbook"):
            read_table(tmp_path / "b.xlsx")


@needs_openpyxl
def test_a_row_with_a_number_beyond_excels_ends(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("mdpd_deploy.data.xlsx.MOST_ROWS", 1000)
    path = workbook(tmp_path / "a.xlsx", [["text", "label"], ["a", "b"]])
    far = tmp_path / "far.xlsx"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(far, "w") as target:
        for part in source.namelist():
            content = source.read(part)
            if part.endswith("sheet1.xml"):
                content = content.replace(b'r="2"', b'r="999999999999"').replace(b'r="A2"', b"")
                content = content.replace(b'r="B2"', b"")
            target.writestr(part, content)
    with pytest.raises(UserError, match="more than 1,000 rows"):
        read_table(far)


def test_without_openpyxl_the_extra_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    (tmp_path / "a.xlsx").write_bytes(b"x")
    with pytest.raises(UserError, match=r"pip install \"mdpd-deploy\[xlsx\]\""):
        read_table(tmp_path / "a.xlsx")


# --- folders of save_to_disk -------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "more")
    return tmp_path


def test_a_saved_data_set_is_read_like_a_table(saved: Path) -> None:
    same_rows(saved / "one")
    data = read(saved / "more", eval_path=str(saved / "one"))
    assert len(data.evaluation["validation"]) == 8
    assert len(read(saved / "more").evaluation["test"]) == 8
    assert read(Path(f"hub:{saved / 'one'}")).train.inputs


def test_a_damaged_saved_data_set_is_named(saved: Path) -> None:
    for file in (saved / "one").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="one is no sound saved data set"):
        read(saved / "one")
