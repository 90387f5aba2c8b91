"""What lies in a data folder and is not used is counted with a reason, in the plan and after."""

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from mdpd_deploy import fit
from mdpd_deploy.commands.train import plan
from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.check import check_images
from mdpd_deploy.data.inventory import Inventory, left_out
from mdpd_deploy.data.load import load_evaluation, load_task
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Classify


def picture(path: Path, kind: str = "png") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, kind)
    return path


def classes(root: Path, count: int = 3, names: tuple[str, ...] = ("cat", "dog")) -> Path:
    for name in names:
        for index in range(count):
            picture(root / name / f"{index}.png")
    return root


def read(root: Path, **options: Any) -> Any:
    return load_task("classify", DataConfig(path=str(root), **options), seed=0)


def counts(inventory: Inventory) -> dict[str, int]:
    return {entry.reason: entry.count for entry in inventory.left_out}


def test_every_file_of_an_image_folder_is_used_or_counted(tmp_path: Path) -> None:
    classes(tmp_path / "train")
    classes(tmp_path / "val", 2)
    here = tmp_path / "train" / "cat"
    for name, kind in (("a.jfif", "jpeg"), ("b", "jpeg"), ("c.TIF", "tiff"), ("d", "webp")):
        picture(here / name, kind)
    for name in ("e.heic", "f.heic", "LICENSE", ".hidden.png", "Thumbs.db"):
        (here / name).write_bytes(b"x")
    (here / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (here / "more").symlink_to(tmp_path / "val")
    os.mkfifo(here / "pipe")
    picture(tmp_path / "train" / "@eaDir" / "0.png" / "SYNO_THUMB.jpg", "jpeg")
    picture(tmp_path / "train" / "loose.png")
    (tmp_path / "train" / "notes.txt").write_text("x")
    picture(tmp_path / "holdout" / "cat" / "1.png")
    (tmp_path / "labels.csv").write_text("x")
    (tmp_path / "__MACOSX").mkdir()
    data = read(tmp_path)
    assert data.task.labels == ("cat", "dog")
    assert data.inventory.used == {"train": 10, "validation": 4}
    assert counts(data.inventory) == {
        "files .heic, which are not read": 2,
        "files without an ending that are no pictures": 1,
        "hidden or of the system": 4,
        "links that lead nowhere": 1,
        "links to folders": 1,
        "neither files nor folders": 1,
        "pictures outside the class folders": 1,
        "files outside the class folders": 1,
        "beside the split folders": 2,
    }
    assert "2 files .heic, which are not read (train/cat/e.heic, " in data.inventory.line
    assert data.inventory.line.endswith("for 3 more reasons (see summary.json).")


def test_a_class_may_be_a_link_but_not_to_what_holds_it(tmp_path: Path) -> None:
    classes(tmp_path / "elsewhere", names=("dog",))
    root = classes(tmp_path / "data", names=("cat",))
    (root / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (root / "loop").symlink_to(root)
    data = read(root)
    assert data.task.labels == ("cat", "dog")
    assert counts(data.inventory) == {"links to folders": 1}


def test_two_unicode_forms_are_one_class(tmp_path: Path) -> None:
    composed, split = "café", unicodedata.normalize("NFD", "café")
    classes(tmp_path / "train", names=(composed, "tea"))
    classes(tmp_path / "val", names=(split, "tea"))
    data = read(tmp_path)
    assert data.task.labels == (composed, "tea")
    assert data.evaluation["validation"].labels.tolist() == [0] * 3 + [1] * 3
    config = DataConfig(path=str(tmp_path))
    measured = load_evaluation("classify", Classify((split, "tea")), config, seed=0)
    assert measured["validation"].labels.tolist() == [0] * 3 + [1] * 3
    picture(tmp_path / "train" / split / "3.png")
    data = read(tmp_path)
    assert (data.task.labels, len(data.train)) == ((composed, "tea"), 7)
    assert "one class" in data.notes[0]
    table = tmp_path / "t.csv"
    table.write_text("text,label\n" + f"a,{composed}\nb,{split}\nc,x\n" * 2)
    assert read(table, labels=[split, "x"]).task.labels == (composed, "x")


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (("images/train/cat", "images/val/cat"), r"--data .*/images'\.$"),
        (("a/b/train/cat",), r"--data .*/a/b'\.$"),
        (("images/cat", "images/dog"), r"--data .*/images'\.$"),
        (("train", "test"), "test and train in .* hold pictures without class folders"),
        (("cat/train", "cat/test", "dog/train", "dog/test"), "the splits inside the classes"),
        ((".",), "holds 1 pictures without class folders"),
    ],
)
def test_other_layouts_are_told_apart(tmp_path: Path, paths: tuple[str, ...], words: str) -> None:
    root = tmp_path / "my data"
    for path in paths:
        picture(root / path / "1.png")
    with pytest.raises(UserError, match=words):
        read(root)


def test_a_class_folder_of_other_files_says_what_it_holds(tmp_path: Path) -> None:
    classes(tmp_path)
    (tmp_path / "fox").mkdir()
    (tmp_path / "fox" / "1.heic").write_bytes(b"x")
    with pytest.raises(UserError, match=r"fox holds no picture .* but 1 files \(\.heic\): add"):
        read(tmp_path)


def test_names_of_files_are_printable(tmp_path: Path) -> None:
    classes(tmp_path)
    (tmp_path / "cat" / os.fsdecode(b"\x1b[31m\xe9.txt")).write_text("x")
    line = read(tmp_path).inventory.line
    assert line.isprintable()
    assert r"cat/\x1b[31m\udce9.txt" in line


def test_what_lies_beside_tables_is_counted(tmp_path: Path) -> None:
    rows = "text,label\n" + "a,x\nb,y\n" * 4
    for name in ("train.csv", "val.csv", "train_old.csv", "extra.jsonl", "README.md", ".DS_Store"):
        (tmp_path / name).write_text(rows)
    (tmp_path / "scripts").mkdir()
    data = read(tmp_path)
    assert data.inventory.used == {"train": 8, "validation": 8}
    assert counts(data.inventory) == {
        "tables beside the tables of the splits": 2,
        "files beside the tables of the splits": 1,
        "folders beside the tables of the splits": 1,
        "hidden or of the system": 1,
    }
    other = tmp_path / "other.csv"
    other.write_text(rows)
    replaced = read(tmp_path, eval_path=str(other)).inventory
    assert counts(replaced)["splits that --eval-data replaces"] == 1
    assert read(tmp_path / "train.csv").inventory.line is None


def test_a_lone_table_with_another_name_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "my reviews.csv").write_text("text,label\na,x\n")
    with pytest.raises(UserError, match=r"--data '.*/my reviews\.csv', or call it train\.csv"):
        read(tmp_path)


def test_pictures_that_no_row_names_are_counted(tmp_path: Path) -> None:
    for index in range(6):
        picture(tmp_path / "pics" / f"{index}.png")
    rows = "".join(f"pics/{index}.png,{'xy'[index % 2]}\n" for index in range(4))
    (tmp_path / "train.csv").write_text("image,label\n" + rows)
    data = read(tmp_path)
    assert counts(data.inventory) == {"pictures that no row names": 2}
    assert counts(read(tmp_path / "train.csv").inventory) == {"pictures that no row names": 2}


def test_vtab_counts_what_no_list_names(tmp_path: Path) -> None:
    folder = tmp_path / "toys"
    for name in ("train800", "val200"):
        lines = [f"images/{name}{i}.png {i % 2}\n" for i in range(4)]
        for index in range(4):
            picture(folder / "images" / f"{name}{index}.png")
        (folder / f"{name}.txt").write_text("".join(lines))
    picture(folder / "images" / "more.png")
    (folder / "README").write_text("x")
    data = load_task("vtab/toys", DataConfig(path=str(tmp_path)), seed=0)
    assert data.inventory.used == {"train": 4, "validation": 4}
    assert counts(data.inventory) == {
        "pictures that no list names": 1,
        "files that no list names": 1,
    }


def test_glue_counts_what_it_does_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "SST-2"
    folder.mkdir()
    rows = "sentence\tlabel\n" + "good\t1\nbad\t0\n" * 3
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text(rows)
    (folder / "test.tsv").write_text("index\tsentence\n0\twho knows\n")
    (folder / "original").mkdir()
    data = load_task("glue/sst2", DataConfig(path=str(tmp_path)), seed=0)
    assert counts(data.inventory) == {
        "test files without labels": 1,
        "files that are not read": 1,
    }


def test_pictures_that_are_skipped_and_a_limit_are_counted(tmp_path: Path) -> None:
    classes(tmp_path / "train", 4)
    classes(tmp_path / "val", 2)
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"x")
    config = DataConfig(path=str(tmp_path), bad_images="skip", limit=7)
    data = check_images(load_task("classify", config, seed=1), config)
    found = counts(data.inventory)
    assert found["training examples beyond data.limit"] == 1
    assert sum(data.inventory.used.values()) + found.get("pictures that cannot be read", 0) == 11


def test_splits_of_a_data_set_that_are_not_used_are_counted(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    part = datasets.Dataset.from_dict({"text": ["a", "b"] * 4, "label": ["x", "y"] * 4})
    splits = {"train": part, "dev": part, "validation": part, "unsupervised": part}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    data = read(Path(f"hub:{tmp_path / 'saved'}"))
    assert counts(data.inventory) == {"rows of other splits": 16}


def test_accounts_add_up() -> None:
    first, second = left_out([("a", "x"), ("b", "y")]), left_out([("a", f"{i}") for i in range(5)])
    both = first + second + Inventory({"train": 3})
    assert both.line == "found and left out: 6 a (x, 0, 1, …); 1 b (y)."
    assert both.to_dict() == {
        "used": {"train": 3},
        "left_out": [
            {"reason": "a", "count": 6, "examples": ["x", "0", "1"]},
            {"reason": "b", "count": 1, "examples": ["y"]},
        ],
    }
    assert Inventory({"train": 3}).line is None


def test_plan_summary_and_report_show_it(tmp_path: Path, tiny_vit: Path, capfd) -> None:
    from mdpd_deploy.cli import main

    root = classes(tmp_path / "pics")
    (root / "cat" / "a<b>.heic").write_bytes(b"x")
    words = dict(task="classify", data=root, backbone=tiny_vit, method="probe", steps=1)
    planned = plan(**words).to_dict()
    json.dumps(planned)
    assert planned["inventory"]["left_out"][0]["count"] == 1
    run = fit(out=tmp_path / "run", quiet=True, **words)
    assert run.summary["inventory"] == planned["inventory"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "left out: files .heic, which are not read" in page and "a&lt;b&gt;.heic" in page
    options = [f"--{name}={value}" for name, value in words.items()]
    assert main(["train", *options, f"--out={tmp_path / 'again'}"]) == 0
    assert "found and left out: 1 files .heic" in capfd.readouterr().err
