"""VTAB-1K list files."""

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.check import check_images
from mdpd_deploy.data.examples import TaskData
from mdpd_deploy.data.load import load_task
from mdpd_deploy.data.vtab import OFFICIAL_CLASSES
from mdpd_deploy.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data set of 3 classes: 6 training, 3 validation, 4 test pictures; one name has a space."""
    folder = tmp_path / "toys"
    (folder / "images").mkdir(parents=True)
    lists: dict[str, list[str]] = {"train800": [], "val200": [], "test": []}
    for name, count in [("train800", 6), ("val200", 3), ("test", 4)]:
        for i in range(count):
            picture = f"images/{name} {i}.jpg"
            Image.new("RGB", (4, 4), (i, i, i)).save(folder / picture)
            lists[name].append(f"{picture} {i % 3}")
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def vtab(root: Path, task: str = "vtab/toys", **options: Any) -> Any:
    return load_task(task, DataConfig(path=str(root), **options), seed=0)


def sizes(data: TaskData) -> dict[str, int]:
    return {"train": len(data.train)} | {name: len(s) for name, s in data.evaluation.items()}


def test_vtab_chooses_on_val200_and_measures_test(root: Path) -> None:
    data = vtab(root)
    assert sizes(data) == {"train": 6, "validation": 3, "test": 4}
    assert data.task.labels == ("0", "1", "2")
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.train.inputs[1] == root / "toys" / "images" / "train800 1.jpg"
    assert (data.task.kind, data.fields, data.metrics[0]) == ("classify", ("image",), "accuracy")
    assert not data.notes
    assert check_images(data, DataConfig()) == data


def test_vtab_full_trains_on_all_and_says_what_that_means(root: Path) -> None:
    data = vtab(root, "vtab-full/toys")
    assert sizes(data) == {"train": 9, "validation": 3, "test": 4}
    assert "train.keep=last" in data.notes[0]
    assert set(data.evaluation["validation"].inputs) <= set(data.train.inputs)
    assert not set(vtab(root).evaluation["validation"].inputs) & set(vtab(root).train.inputs)


def test_classes_txt_names_the_classes(root: Path) -> None:
    (root / "toys" / "classes.txt").write_text("ball\ncube\ndoll\nempty class\n")
    data = vtab(root)
    assert data.task.labels == ("ball", "cube", "doll", "empty class")
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    reordered = vtab(root, labels=["empty class", "doll", "cube", "ball"])
    assert reordered.train.labels.tolist() == [3, 2, 1, 3, 2, 1]


def test_official_names_know_their_class_count(root: Path) -> None:
    (root / "toys").rename(root / "kitti")
    assert len(vtab(root, "vtab/kitti").task.labels) == OFFICIAL_CLASSES["kitti"] == 4
    assert len(OFFICIAL_CLASSES) == 19


def test_test_list_is_optional_and_the_folder_itself_will_do(root: Path) -> None:
    (root / "toys" / "test.txt").unlink()
    assert sizes(vtab(root / "toys")) == {"train": 6, "validation": 3}
    with pytest.raises(UserError, match=r"test\.txt does not exist"):
        vtab(root, "vtab-full/toys")


def test_eval_data_is_another_folder(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (root / "toys").rename(other / "toys")
    (root / "toys").mkdir()
    for file in ("train800.txt", "images"):
        (other / "toys" / file).rename(root / "toys" / file)
    (root / "toys" / "images").rename(other / "toys" / "images")
    (root / "toys" / "images").symlink_to(other / "toys" / "images")
    data = vtab(root, eval_path=str(other))
    assert data.evaluation["test"].inputs[0].is_relative_to(other)
    assert data.train.inputs[0].is_relative_to(root / "toys")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("images/x.jpg", r"train800\.txt line 7 is not `relative/path\.jpg CLASS_INDEX`"),
        ("images/x.jpg -1", "line 7 is not"),
        ("images/x.jpg 1.5", "line 7 is not"),
        ("images/gone.jpg 1", r"line 7: the picture .*images/gone\.jpg does not exist"),
    ],
)
def test_damaged_lines_are_named(root: Path, line: str, words: str) -> None:
    path = root / "toys" / "train800.txt"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=words):
        vtab(root)


def test_index_outside_the_classes_is_named(root: Path) -> None:
    (root / "toys" / "classes.txt").write_text("ball\ncube\n")
    with pytest.raises(
        UserError, match=r"train800\.txt line 3: the class index 2 is outside the 2"
    ):
        vtab(root)


def test_missing_pictures_may_be_skipped(root: Path) -> None:
    (root / "toys" / "images" / "train800 3.jpg").unlink()
    with pytest.raises(UserError, match="line 4: the picture"):
        vtab(root)
    data = vtab(root, bad_images="skip")
    assert len(check_images(data, DataConfig(bad_images="skip")).train) == 5


def test_wrong_names_and_paths(root: Path) -> None:
    with pytest.raises(UserError, match=r"holds no folder 'toy' .* It has: toys"):
        vtab(root, "vtab/toy")
    with pytest.raises(UserError, match="holds no folder 'toys'"):
        vtab(root / "nowhere")
    with pytest.raises(UserError, match="needs --data"):
        load_task("vtab/toys", DataConfig(), seed=0)
    with pytest.raises(UserError, match=r"does not use data\.label"):
        vtab(root, label="x")


REAL = os.environ.get("MDPD_TEST_DATA")


@pytest.mark.skipif(
    REAL is None or not Path(REAL, "vtab-1k").is_dir(), reason="MDPD_TEST_DATA names no data folder"
)
def test_real_lists() -> None:
    folder = min(Path(str(REAL), "vtab-1k").glob("*/train800.txt")).parent
    data = vtab(folder.parent, f"vtab/{folder.name}")
    assert sizes(data)["train"] == 800 and sizes(data)["validation"] == 200
    assert len(vtab(folder.parent, f"vtab-full/{folder.name}").train) == 1000
    assert check_images(data, DataConfig()) == data
