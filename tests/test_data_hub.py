"""Hub data sets through `datasets`, from local folders: no network is used."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.check import check_images
from mdpd_deploy.data.examples import Lazy
from mdpd_deploy.data.hub import _parse
from mdpd_deploy.data.load import load_task
from mdpd_deploy.errors import UserError


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def read(spec: str, task: str = "classify", **options: Any) -> Any:
    return load_task(task, DataConfig(path=spec, **options), seed=0)


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "reviews"
    folder.mkdir()
    for split, count in [("train", 4), ("validation", 2)]:
        rows = "".join(
            f"sentence {split} {i},{['bad', 'good'][i % 2]},{i}.5\n" for i in range(count)
        )
        (folder / f"{split}.csv").write_text("text,label,score\n" + rows)
    return folder


def saved(folder: Path, splits: Any) -> str:
    datasets.DatasetDict(splits).save_to_disk(folder)
    return f"hub:{folder}"


def labelled(labels: list[int], **columns: object) -> datasets.Dataset:
    data = datasets.Dataset.from_dict({"target": labels, **columns})
    return data.cast_column("target", datasets.ClassLabel(names=["no", "maybe", "yes"]))


def test_load_dataset_on_a_folder(text_folder: Path) -> None:
    data = read(f"hub:{text_folder}")
    assert data.train.inputs[1] == "sentence train 1"
    assert data.task.labels == ("bad", "good")
    assert data.train.labels.tolist() == [0, 1, 0, 1]
    assert (len(data.evaluation["validation"]), data.columns) == (2, ("text",))
    scores = read(f"hub:{text_folder}", "regress", label="score", text=["text", "label"])
    assert scores.train.labels.tolist() == [0.5, 1.5, 2.5, 3.5]
    assert scores.train.inputs[0] == ("sentence train 0", "bad")


def test_class_labels_give_names_and_hidden_ones_drop_the_test(tmp_path: Path) -> None:
    spec = saved(
        tmp_path / "saved",
        {
            "train": labelled([2, 0, 1], s=["a", "b", "c"]),
            "validation": labelled([1], s=["d"]),
            "test": labelled([-1, -1], s=["e", "f"]),
            "unsupervised": labelled([-1], s=["g"]),
        },
    )
    data = read(spec, text=["s"], label="target")
    assert data.task.labels == ("maybe", "no", "yes")
    assert data.train.labels.tolist() == [2, 1, 0]
    assert list(data.evaluation) == ["validation"]
    assert "2 test examples without labels" in data.inventory.line
    assert "1 rows of other splits (unsupervised)" in data.inventory.line
    ordered = read(spec, text=["s"], label="target", labels=["no", "maybe", "yes"])
    assert ordered.train.labels.tolist() == [2, 0, 1]


def test_pictures_stay_encoded_until_asked_for(tmp_path: Path) -> None:
    grey = [np.full((4, 6), 40 * i, np.uint8) for i in range(6)]
    pictures = [{"path": None, "bytes": png(tmp_path, array)} for array in grey]
    train = labelled([0, 1, 2, 0, 1, 2], image=pictures).cast_column("image", datasets.Image())
    data = read(saved(tmp_path / "saved", {"train": train}), label="target", limit=2)
    assert isinstance(data.train.inputs, Lazy)
    image: Any = data.train.inputs[0]
    assert (data.fields, image.mode, image.size) == (("image",), "RGB", (6, 4))
    assert check_images(data, DataConfig()) == data
    everything = [*range(6)]
    shown = [int(np.asarray(x)[0, 0, 0]) // 40 for x in data.evaluation["validation"].inputs]
    assert set(shown) <= set(everything)


def png(folder: Path, array: np.ndarray) -> bytes:
    Image.fromarray(array).save(folder / "one.png")
    return (folder / "one.png").read_bytes()


def test_damaged_pictures_are_named_by_row(tmp_path: Path) -> None:
    sound = {"path": None, "bytes": png(tmp_path, np.zeros((4, 4), np.uint8))}
    broken = {"path": None, "bytes": b"no picture"}
    train = labelled([0, 1, 2], image=[sound, broken, sound]).cast_column("image", datasets.Image())
    spec = saved(tmp_path / "saved", {"train": train, "validation": train.select([0])})
    with pytest.raises(UserError, match="train row 2 is not a readable JPEG"):
        check_images(read(spec, label="target"), DataConfig())


def test_missing_columns_and_texts_are_named(text_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no column 'review' for --text\. It has: text, label, score"
    ):
        read(f"hub:{text_folder}", text=["review"])
    with pytest.raises(UserError, match="column 'text' holds no pictures"):
        read(f"hub:{text_folder}", image="text")
    spec = saved(tmp_path / "s", {"train": labelled([0, 1], s=["a", None])})
    with pytest.raises(UserError, match="train row 2: the text in column 's' is empty"):
        read(spec, text=["s"], label="target")
    spec = saved(tmp_path / "o", {"other": labelled([0, 1], s=["a", "b"])})
    with pytest.raises(UserError, match="no train, validation or test split, it has: other"):
        read(spec, text=["s"], label="target")


def test_offline_or_unknown_names_give_one_sentence() -> None:
    with pytest.raises(UserError, match="hub data set 'nobody/nothing' could not be loaded") as err:
        read("hub:nobody/nothing", text=["a"], label="b")
    assert "\n" not in str(err.value)
    assert "download it and give the local files" in str(err.value)
    with pytest.raises(UserError, match="lacks a name"):
        read("hub:")


def test_names_carry_config_and_revision() -> None:
    assert _parse("hub:imdb") == ("imdb", None, None)
    assert _parse("hub:nyu-mll/glue:sst2") == ("nyu-mll/glue", "sst2", None)
    assert _parse("hub:a/b:c@v1") == ("a/b", "c", "v1")
    assert _parse("hub:a/b@v1") == ("a/b", None, "v1")
