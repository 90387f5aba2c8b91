"""What cells mean, the same in every format and at every door: texts, labels, valid Unicode."""

import json
from datetime import date
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from mdpd_deploy import load_bundle
from mdpd_deploy.config import DataConfig, check_config, load_config, read_config
from mdpd_deploy.data.cells import label_cells, text_cells
from mdpd_deploy.data.examples import data_fingerprint
from mdpd_deploy.data.load import load_task
from mdpd_deploy.errors import UserError
from mdpd_deploy.report.page import tag

HALF = "good \ud83d"  # what is left of an emoji that was cut in two


def where(index: int) -> str:
    return f"t.csv line {index + 2}"


def read(path: Path, **options: object):
    return load_task("classify", DataConfig(path=str(path), **options), seed=0)


def write_jsonl(path: Path, labels: list[object], texts: list[object] | None = None) -> Path:
    texts = texts or [f"text {i}" for i in range(len(labels))]
    rows = [json.dumps({"text": t, "label": n}) for t, n in zip(texts, labels, strict=True)]
    path.write_text("\n".join(rows))
    return path


# --- one class, however it is written ----------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "text"),
    [(None, ""), (float("nan"), ""), (1.0, "1"), (0.5, "0.5"), (3, "3"), (" yes ", "yes"),
     (Decimal("2.00"), "2"), (np.float32(4), "4"), (True, "True"), (date(2026, 1, 2), "2026-01-02")],
)  # fmt: skip
def test_label_cells_become_text(cell: object, text: str) -> None:
    assert label_cells([cell], "label", where) == [text]


def write_csv(path: Path, cells: list[str]) -> str:
    path.write_text("text,label\n" + "".join(f"t{i},{c}\n" for i, c in enumerate(cells)))
    return str(path)


def write_parquet(path: Path, labels: object) -> str:
    parquet.write_table(pa.table({"text": [f"t{i}" for i in range(4)], "label": labels}), path)
    return str(path)


def write_hub(path: Path, labels: list[float]) -> str:
    import datasets

    columns = {"text": [f"t{i}" for i in range(len(labels))], "label": labels}
    datasets.DatasetDict(train=datasets.Dataset.from_dict(columns)).save_to_disk(path)
    return f"hub:{path}"


def test_one_and_one_point_nought_are_one_class_in_every_format(tmp_path) -> None:
    paths = [
        write_csv(tmp_path / "whole.csv", ["1", "0", "1", "0"]),
        write_csv(tmp_path / "mixed.csv", ["1.0", "0", "1", "0.0"]),
        str(write_jsonl(tmp_path / "mixed.jsonl", [1, 0.0, "1.0", "0"])),
        write_parquet(tmp_path / "floats.parquet", [1.0, 0.0, 1.0, 0.0]),
        write_parquet(tmp_path / "texts.parquet", ["1.0", "0", "1", "-0.0"]),
        write_parquet(tmp_path / "decimals.parquet", [Decimal(f"{n}.00") for n in (1, 0, 1, 0)]),
        write_hub(tmp_path / "hub", [1.0, 0.0, 1.0, 0.0]),
    ]
    for path in paths:
        data = read(path, eval_path=paths[0])
        assert (path, data.task.labels) == (path, ("0", "1"))
        assert data.train.labels.tolist() == [1, 0, 1, 0]


def test_named_classes_may_be_written_as_floats(tmp_path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", [1, 0, 1.0, "0"])
    assert read(path, labels=["1.0", "0"], eval_path=str(path)).train.labels.tolist() == [
        0,
        1,
        0,
        1,
    ]


def test_what_is_no_whole_number_stays_as_it_is_written(tmp_path) -> None:
    cells = ["01", "1.50", "v1.0", "1.0.0", "1e0", "١.٠"]
    path = write_csv(tmp_path / "t.csv", cells * 2)
    assert set(read(path).task.labels) == set(cells)


def test_class_folders_are_read_by_the_same_rule(tmp_path) -> None:
    from PIL import Image

    for split, names in (("train", ("1.0", "2.0")), ("validation", ("1", "2"))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / split / name / "a.png")
    data = read(tmp_path)
    assert data.task.labels == ("1", "2")
    assert data.evaluation["validation"].labels.tolist() == [0, 1]


# --- cells of the wrong kind -------------------------------------------------------------------


@pytest.mark.parametrize("cell", [["x"], {"x": 1}, b"x", ("x",), object()])
@pytest.mark.parametrize("read_cells", [text_cells, label_cells])
def test_what_is_neither_text_nor_number_is_refused(read_cells, cell: object) -> None:
    with pytest.raises(UserError, match=r"^t.csv line 3: column 'c' holds a \w+, no (text|label)"):
        read_cells(["a", cell], "c", where)


@pytest.mark.parametrize("label", [["a"], {"a": 1}, [[["a"]]]])
def test_a_label_of_several_values_names_its_line(tmp_path, label: object) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", ["a", "b", label])
    with pytest.raises(UserError, match=r"t.jsonl line 3: column 'label' holds a .*, no label"):
        read(path)


def test_a_hub_label_of_several_values_names_its_row(tmp_path) -> None:
    import datasets

    columns = {"text": ["a", "b"], "label": [[1, 2], [3]]}
    datasets.DatasetDict(train=datasets.Dataset.from_dict(columns)).save_to_disk(tmp_path / "d")
    with pytest.raises(UserError, match=r"train row 1: column 'label' holds a list, no label"):
        read(f"hub:{tmp_path / 'd'}")


def test_bytes_in_a_parquet_file_are_no_text(tmp_path) -> None:
    table = pa.table({"text": [b"a", b"b"], "label": ["x", "y"]})
    parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(UserError, match="row 1: column 'text' holds a bytes, no text"):
        read(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("cell", "reason"),
    [("[" * 100_000, "nested too deeply"), ("9" * 5000, "number of thousands of digits")],
)
def test_deep_and_huge_json_names_its_line(tmp_path, cell: str, reason: str) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": ' + cell)
    with pytest.raises(UserError, match=f"t.jsonl line 2 .*{reason}"):
        read(tmp_path / "t.jsonl")


@pytest.mark.parametrize("task", ["classify", "regress"])
def test_a_label_of_thousands_of_digits_is_short_to_read(tmp_path, task: str) -> None:
    path = write_csv(tmp_path / "t.csv", ["1", "2", "9" * 5000, "8" * 5000])
    with pytest.raises(UserError, match=r"line 4: the label .* 5,000 characters") as caught:
        load_task(task, DataConfig(path=path), seed=0)
    assert len(str(caught.value)) < 300


def test_a_class_index_of_thousands_of_digits(tmp_path) -> None:
    folder = tmp_path / "vtab" / "cifar"
    folder.mkdir(parents=True)
    (folder / "train800.txt").write_text("a.png 0\nb.png " + "9" * 5000)
    with pytest.raises(UserError, match=r"train800.txt line 2 is not"):
        load_task("vtab/cifar", DataConfig(path=str(tmp_path / "vtab"), bad_images="skip"), seed=0)


@pytest.mark.parametrize(
    "text", ["data:\n  labels: " + "[" * 3000 + "]" * 3000, "data:\n  limit: " + "9" * 5000]
)
def test_a_config_that_no_reader_can_take(tmp_path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    for reader in (load_config, read_config):
        with pytest.raises(UserError, match=r"c.yaml"):
            reader(path)
    with pytest.raises(UserError, match="--set"):
        load_config(sets=[text.replace(":\n  ", ".").replace(": ", "=")])


def test_a_config_with_a_mistake_names_its_line(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("task: digits\ndata:\n  labels: [a, b\n")
    with pytest.raises(UserError, match=r"line 4: .*expected"):
        load_config(path)


def test_a_date_that_is_none_in_a_run_config(tmp_path) -> None:
    (tmp_path / "config.yaml").write_text("task: 2001-99-99")
    with pytest.raises(UserError, match="month must be in"):
        read_config(tmp_path / "config.yaml")


# --- valid Unicode -----------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["text", "label"])
def test_half_an_emoji_in_a_table_names_its_line(tmp_path, field: str) -> None:
    cells = ["a", "b", HALF, HALF]
    words = [f"t{i}" for i in range(4)]
    texts, labels = (cells, words) if field == "text" else (words, cells)
    path = write_jsonl(tmp_path / "t.jsonl", labels, texts)
    with pytest.raises(UserError, match=rf"line 3: the {field} 'good \\ud83d' is no valid Unicode"):
        read(path)


def test_a_whole_emoji_is_valid(tmp_path) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", ["👍", "👎", "👍", "👎"])  # escaped as pairs of halves
    assert set(read(path).task.labels) == {"👍", "👎"}


def test_half_an_emoji_is_refused_by_predict_in_python(tiny_text_bundle) -> None:
    bundle = load_bundle(tiny_text_bundle.path)
    for mixed in ([HALF], ["good film", HALF]):
        with pytest.raises(UserError, match=r"the text 'good \\ud83d' is no valid Unicode"):
            bundle.predict(mixed)


@pytest.mark.parametrize("raw", [None, 3, ("a", 3), ("a", "b", "c"), ["a", "b"]])
def test_predict_refuses_what_is_no_text(tiny_text_bundle, raw) -> None:
    with pytest.raises(UserError, match="this model takes"):
        load_bundle(tiny_text_bundle.path).predict([raw])


def test_bytes_that_are_no_utf8_on_the_command_line(tiny_text_bundle, run_python) -> None:
    words = ["-m", "mdpd_deploy", "predict", str(tiny_text_bundle.path), "caf\udce9"]
    done = run_python(*words)
    assert done.returncode == 2, done.stderr
    assert "is no valid Unicode" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["out", "data.path", "data.labels", "data.text"])
def test_an_option_that_no_file_could_hold(option: str) -> None:
    section, _, name = option.rpartition(".")
    value = [HALF, "b"] if name in ("labels", "text") else HALF
    plain = {section: {name: value}} if section else {name: value}
    with pytest.raises(UserError, match=rf"option {option}: .* is no valid Unicode"):
        check_config(plain)


def test_a_class_folder_whose_name_is_no_utf8(tmp_path) -> None:
    from PIL import Image

    for name in ("a", "caf\udce9"):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"{index}.png")
    with pytest.raises(UserError, match=r"the class 'caf\\udce9' is no valid Unicode"):
        read(tmp_path)


def test_a_picture_whose_name_is_no_utf8_is_a_picture(tmp_path) -> None:
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"\udce9{index}.png")
    assert len(data_fingerprint(read(tmp_path))) == 64
    assert tag("p", "\udce9.png", title="\udce9") == r'<p title="\udce9">\udce9.png</p>'
