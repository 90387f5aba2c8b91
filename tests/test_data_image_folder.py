"""Image folders with and without splits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.load import load_evaluation, load_task
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Classify


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, "png")


def classes(root: Path, count: int, names: tuple[str, ...] = ("cat", "dog")) -> Path:
    for name in names:
        for i in range(count):
            picture(root / name / f"{i:02}.png")
    return root


def read(root: Path, task: str = "classify", seed: int = 0, **options: Any) -> Any:
    return load_task(task, DataConfig(path=str(root), **options), seed=seed)


def test_splits_by_folder(tmp_path: Path) -> None:
    classes(tmp_path / "train", 3)
    classes(tmp_path / "test", 1)
    classes(tmp_path / "valid", 2)
    data = read(tmp_path)
    assert data.task.labels == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train.inputs[3] == tmp_path / "train" / "dog" / "00.png"
    assert {name: len(s) for name, s in data.evaluation.items()} == {"validation": 4, "test": 2}
    assert (data.fields, data.task.kind, data.columns, data.notes) == (
        ("image",),
        "classify",
        (),
        (),
    )


@pytest.mark.parametrize("name", ["val", "valid", "dev", "validation", "Val"])
def test_names_of_the_validation_folder(tmp_path: Path, name: str) -> None:
    classes(tmp_path / "train", 2)
    classes(tmp_path / name, 1)
    assert len(read(tmp_path).evaluation["validation"]) == 2


def test_without_splits_a_share_of_each_class_is_held_out(tmp_path: Path) -> None:
    classes(tmp_path, 20)
    data = read(tmp_path, validation_fraction=0.2)
    held = data.evaluation["validation"]
    assert np.bincount(held.labels).tolist() == [4, 4]
    assert len(data.train) == 32
    assert not set(held.inputs) & set(data.train.inputs)
    assert "8 of 40 training examples were held out" in data.notes[0]
    assert read(tmp_path, validation_fraction=0.2).evaluation["validation"].inputs == held.inputs
    other = read(tmp_path, seed=1, validation_fraction=0.2).evaluation["validation"]
    assert other.inputs != held.inputs


def test_endings_in_any_case_deep_and_hidden_files(tmp_path: Path) -> None:
    for name in ("a.JPG", "b.Jpeg", "c.WEBP", "sub/d.png", ".hidden.png", ".cache/e.png"):
        picture(tmp_path / "train" / "cat" / name)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("x")
    picture(tmp_path / "train" / ".ipynb_checkpoints" / "f.png")
    picture(tmp_path / "train" / "dog" / "g.png")
    classes(tmp_path / "val", 1)
    names = [path.name for path in read(tmp_path).train.inputs]
    assert names == ["a.JPG", "b.Jpeg", "c.WEBP", "d.png", "g.png"]


def test_labels_fix_the_order(tmp_path: Path) -> None:
    classes(tmp_path, 4)
    data = read(tmp_path, labels=["dog", "cat"])
    assert data.task.labels == ("dog", "cat")
    by_name = {
        path.parent.name: label
        for path, label in zip(data.train.inputs, data.train.labels, strict=True)
    }
    assert by_name == {"dog": 0, "cat": 1}


def test_eval_data_folder_replaces_the_splits(tmp_path: Path) -> None:
    train = classes(tmp_path / "a", 3)
    other = classes(tmp_path / "b", 2)
    data = read(train, eval_path=str(other))
    assert (len(data.train), len(data.evaluation["validation"]), data.notes) == (6, 4, ())
    only_test = tmp_path / "c"
    classes(only_test / "test", 1)
    assert len(read(train, eval_path=str(only_test)).evaluation["validation"]) == 2


def test_load_evaluation_needs_no_training_data(tmp_path: Path) -> None:
    classes(tmp_path / "test", 2, ("dog",))
    config = DataConfig(path=str(tmp_path))
    splits = load_evaluation("classify", Classify(("cat", "dog")), config, seed=0)
    assert {name: s.labels.tolist() for name, s in splits.items()} == {"test": [1, 1]}
    whole = DataConfig(path="unused", eval_path=str(tmp_path / "test"))
    splits = load_evaluation("classify", Classify(("cat", "dog")), whole, seed=0)
    assert {name: s.labels.tolist() for name, s in splits.items()} == {"validation": [1, 1]}


def test_empty_class_folder(tmp_path: Path) -> None:
    classes(tmp_path / "train", 2)
    (tmp_path / "train" / "fox").mkdir()
    with pytest.raises(UserError, match=r"the class folder .*fox holds no picture .* add some"):
        read(tmp_path)


def test_class_that_only_validation_has(tmp_path: Path) -> None:
    classes(tmp_path / "train", 2)
    classes(tmp_path / "val", 2, ("cat", "fox"))
    with pytest.raises(UserError, match=r"fox/00\.png: the label 'fox' is not one of .* cat, dog"):
        read(tmp_path)


def test_a_class_of_labels_without_a_folder(tmp_path: Path) -> None:
    classes(tmp_path, 3)
    with pytest.raises(UserError, match="the class 'fox' has no training example"):
        read(tmp_path, labels=["cat", "dog", "fox"])
    with pytest.raises(UserError, match="'dog' is not one of the classes cat, fox"):
        read(tmp_path, labels=["cat", "fox"])


def test_folders_that_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"neither a table .* nor class folders"):
        read(tmp_path)
    classes(tmp_path, 2, ("cat",))
    with pytest.raises(UserError, match="needs two classes or more, found only cat"):
        read(tmp_path)
    classes(tmp_path, 1, ("dog",))
    with pytest.raises(UserError, match="needs numbers as labels"):
        read(tmp_path, "regress")
    with pytest.raises(UserError, match=r"holds no table .* data\.text names no column"):
        read(tmp_path, text=["a"])


def test_splits_that_clash_or_lack(tmp_path: Path) -> None:
    classes(tmp_path / "val", 1)
    with pytest.raises(UserError, match="has no train split, only validation"):
        read(tmp_path)
    classes(tmp_path / "train", 2)
    classes(tmp_path / "dev", 1)
    with pytest.raises(UserError, match="two folders for validation, dev and val"):
        read(tmp_path)


def test_one_picture_per_class_cannot_be_split(tmp_path: Path) -> None:
    classes(tmp_path, 1)
    with pytest.raises(UserError, match="none can be held out"):
        read(tmp_path)
