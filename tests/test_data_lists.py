"""Few-shot lists, domain generalisation and the fine-grained sets, each as it is published."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from mdpd_deploy import fit
from mdpd_deploy.cli import main
from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.fgvc import SETS
from mdpd_deploy.data.load import load_task
from mdpd_deploy.errors import UserError
from mdpd_deploy.study.suites import group_of, suite_members


def read(task, root, *, seed=0, **options):
    return load_task(task, DataConfig(path=str(root), **options), seed=seed)


def sizes(data):
    return {"train": len(data.train)} | {name: len(s) for name, s in data.evaluation.items()}


def picture(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (shade, 0, 0)).save(path)
    return path


def write_list(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name} {label}\n" for name, label in lines))


# --- few shots ------------------------------------------------------------------------------------


@pytest.fixture
def shots(tmp_path):
    """A set of 3 classes with lists of 2 shots for two seeds; one name has a space."""
    lists = tmp_path / "few-shot_split" / "toys" / "annotations"
    for number in range(18):
        picture(tmp_path / "toys" / "a b" / f"{number}.jpg", number)
    names = [(f"a b/{number}.jpg", number % 3) for number in range(18)]
    write_list(lists / "train_meta.list.num_shot_2.seed_0", names[:6])
    write_list(lists / "train_meta.list.num_shot_2.seed_1", names[6:12])
    write_list(lists / "val_meta.list", names[12:15])
    write_list(lists / "test_meta.list", names[15:])
    return tmp_path


def test_few_shots_have_the_list_of_their_seed(shots):
    data = read("few-shot/toys:2", shots)
    assert sizes(data) == {"train": 6, "validation": 3, "test": 3}
    assert data.train.inputs[1] == shots / "toys" / "a b" / "1.jpg"
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2] and not data.notes
    assert read("few-shot/toys:2", shots, seed=1).train.inputs[0].name == "6.jpg"
    assert read("few-shot/toys:2", shots, seed=9, split_seed=1).train.inputs[0].name == "6.jpg"


def test_few_shots_that_are_not_there_are_told_with_those_that_are(shots):
    with pytest.raises(UserError, match=r"seed_7 does not exist.* has 2 shots seed 0, 2 shots s"):
        read("few-shot/toys:2", shots, seed=7)
    with pytest.raises(UserError, match=r"num_shot_4\.seed_0 does not exist"):
        read("few-shot/toys:4", shots)
    with pytest.raises(UserError, match="lacks the number of shots: write few-shot/toys:4"):
        read("few-shot/toys", shots)
    with pytest.raises(UserError, match=r"data set: unknown 'toy'\. Did you mean 'toys'"):
        read("few-shot/toy:2", shots)
    with pytest.raises(UserError, match="holds no few-shot_split/NAME/annotations"):
        read("few-shot/toys:2", shots / "toys")
    with pytest.raises(UserError, match=r"does not use data\.eval_path"):
        read("few-shot/toys:2", shots, eval_path=str(shots))


def test_a_class_without_a_shot_stops_and_fewer_shots_are_noted(shots):
    path = shots / "few-shot_split" / "toys" / "annotations" / "train_meta.list.num_shot_2.seed_0"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    assert (
        "has not 2 pictures of every class, but of 2 others"
        in read("few-shot/toys:2", shots).notes[0]
    )
    path.write_text("".join(line for line in lines if not line.endswith(" 1\n")))
    with pytest.raises(UserError, match=r"the class '1' has no training example in .*seed_0"):
        read("few-shot/toys:2", shots)


def test_a_missing_picture_and_a_class_too_many_are_named(shots):
    (shots / "toys" / "a b" / "4.jpg").unlink()
    with pytest.raises(UserError, match=r"seed_0 line 5: the picture .*4\.jpg does not exist"):
        read("few-shot/toys:2", shots)
    (shots / "toys").rename(shots / "oxford-pets")
    (shots / "few-shot_split" / "toys").rename(shots / "few-shot_split" / "oxford-pets")
    lists = shots / "few-shot_split" / "oxford-pets" / "annotations"
    write_list(lists / "val_meta.list", [("a b/12.jpg", 37)])
    with pytest.raises(UserError, match=r"line 1: the class index 37 is outside the 37 classes"):
        read("few-shot/oxford-pets:2", shots, seed=1)


# --- domains --------------------------------------------------------------------------------------


@pytest.fixture
def domains(tmp_path):
    """A set of 2 classes, and two others that are only measured."""
    for number in range(12):
        picture(
            tmp_path / "toys" / "images" / "train" / f"{number}.jpg", 200 * (number % 2) + number
        )
    for number in range(4):
        picture(tmp_path / "toys" / "images" / "val" / f"{number}.jpg", 200 * (number % 2))
        picture(tmp_path / "sketch" / "drawn" / f"{number}.jpg", 190 * (number % 2))
    picture(tmp_path / "v2" / "0.jpg")
    lists = tmp_path / "toys" / "annotations"
    train = "train_meta.list.num_shot_16.seed_0"
    write_list(lists / train, [(f"{number}.jpg", number % 2) for number in range(12)])
    write_list(lists / "val_meta.list", [(f"{number}.jpg", number % 2) for number in range(4)])
    drawn = [(f"drawn/{number}.jpg", number % 2) for number in range(4)]
    write_list(tmp_path / "sketch" / "annotations" / "val_meta.list", drawn)
    write_list(tmp_path / "v2" / "annotations" / "val_meta.list", [("0.jpg", 0)])
    return tmp_path


def test_further_sets_are_measured_under_their_names(domains):
    data = read("domains/toys", domains)
    assert sizes(data) == {"train": 12, "validation": 4, "sketch": 4, "v2": 1}
    assert data.evaluation["sketch"].inputs[0] == domains / "sketch" / "drawn" / "0.jpg"
    assert data.task.labels == ("0", "1") and not data.notes
    with pytest.raises(UserError, match=r"seed_3 does not exist: --task domains/toys reads it"):
        read("domains/toys", domains, seed=3)
    (domains / "v2").rename(domains / "validation")
    with pytest.raises(UserError, match="validation has the name of a split: call it otherwise"):
        read("domains/toys", domains)


def test_imagenet_has_its_thousand_classes_and_says_which_sets_are_missing(domains):
    (domains / "toys").rename(domains / "imagenet")
    train = domains / "imagenet" / "annotations" / "train_meta.list.num_shot_16.seed_0"
    write_list(train, [("0.jpg", number) for number in range(1000)])
    data = read("domains/imagenet", domains)
    assert len(data.task.labels) == 1000
    assert "imagenetv2, imagenet-sketch, imagenet-adversarial, imagenet-rendition" in data.notes[0]
    write_list(domains / "v2" / "annotations" / "val_meta.list", [("0.jpg", 1000)])
    with pytest.raises(UserError, match=r"v2.*the class index 1000 is outside the 1000 classes"):
        read("domains/imagenet", domains)


def test_one_model_has_a_score_on_every_further_set(domains, tiny_vit, tmp_path, capsys):
    words = dict(task="domains/toys", data=domains, backbone=tiny_vit, steps=2, batch=4)
    run = fit(method="norms", out=tmp_path / "run", quiet=True, **words)
    for name in ("metrics", "metrics_sketch", "metrics_v2"):
        assert 0 <= run.summary[name]["deployed"]["accuracy"] <= 1
    report = (run.path / "report.html").read_text()
    assert "sketch, 4 examples" in report and "v2, 1 example" in report
    assert main(["eval", str(run.path), "--json"]) == 0
    assert "sketch" in json.dumps(json.loads(capsys.readouterr().out))


# --- fine-grained sets ----------------------------------------------------------------------------

COPIES = {"train": 2, "test": 1}  # pictures of each class


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def as_birds(folder, classes, first, step):
    """The tables of CUB and NABirds: classes from `first` on, `step` apart."""
    tables = {"images": [], "image_class_labels": [], "train_test_split": []}
    for label in range(first, first + step * classes, step):
        for split, copies in COPIES.items():
            for copy in range(copies):
                key, name = f"{label}-{split}{copy}", f"{label:03d}.bird/{split} {copy}.jpg"
                touch(folder / "images" / name)
                tables["images"].append(f"{key} {name}\n")
                tables["image_class_labels"].append(f"{key} {label}\n")
                tables["train_test_split"].append(f"{key} {int(split == 'train')}\n")
    for name, lines in tables.items():
        (folder / f"{name}.txt").write_text("".join(lines))


def as_flowers(folder):
    numbers = np.arange(1, 307)
    for number in numbers:
        touch(folder / "jpg" / f"image_{number:05d}.jpg")
    labels = ((numbers - 1) % 102 + 1).astype(np.uint8)
    savemat(folder / "imagelabels.mat", {"labels": labels[None]})
    thirds = {"trnid": numbers[:102], "valid": numbers[102:204], "tstid": numbers[204:]}
    savemat(folder / "setid.mat", {name: part[None] for name, part in thirds.items()})


def as_dogs(folder):
    for split, copies in COPIES.items():
        rows = [(f"n{i:03d}-Dog/{split}{c}.jpg", i + 1) for i in range(120) for c in range(copies)]
        for name, _ in rows:
            touch(folder / "Images" / name)
        cells = np.array([name for name, _ in rows], dtype=object)[:, None]
        labels = np.array([label for _, label in rows], dtype=np.uint8)[:, None]
        savemat(folder / f"{split}_list.mat", {"file_list": cells, "labels": labels})


def as_cars(folder):
    (folder / "devkit").mkdir()
    for split, file in (("train", "cars_train_annos"), ("test", "cars_test_annos_withlabels")):
        count = 196 * COPIES[split]
        rows = np.empty(
            (1, count), dtype=[(name, object) for name in ("bbox_x1", "class", "fname")]
        )
        for index in range(count):
            rows[0, index] = (1, index % 196 + 1, f"{index + 1:05d}.jpg")
            touch(folder / f"cars_{split}" / f"{index + 1:05d}.jpg")
        savemat(folder / "devkit" / f"{file}.mat", {"annotations": rows})


PUBLISHED = {
    "cub": (lambda folder: as_birds(folder, 200, 1, 1), "images/002.bird/train 1.jpg"),
    "nabirds": (lambda folder: as_birds(folder, 555, 295, 2), "images/297.bird/train 1.jpg"),
    "flowers": (as_flowers, "jpg/image_00002.jpg"),
    "dogs": (as_dogs, "Images/n001-Dog/train0.jpg"),
    "cars": (as_cars, "cars_train/00198.jpg"),
}  # what writes a set, and a training picture of its second class


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_read_as_published(name, tmp_path):
    write, second = PUBLISHED[name]
    folder, classes = tmp_path / SETS[name].folders[0], SETS[name].classes
    folder.mkdir()
    write(folder)
    (folder / "notes.md").touch()
    data = read(f"fgvc/{name}", tmp_path)
    assert len(data.task.labels) == classes == sizes(data)["test"]
    seen = [data.train, data.evaluation["validation"]]
    assert sum(map(len, seen)) == 2 * classes  # a list of its own, or held out of train
    labels = {
        path: label
        for split in seen
        for path, label in zip(split.inputs, split.labels, strict=True)
    }
    assert labels[folder / second] == 1
    assert any("notes.md" in left.examples for left in data.inventory.left_out)
    assert sizes(read(f"fgvc/{name}", folder)) == sizes(data)


@pytest.fixture
def cub(tmp_path):
    """CUB as lists with a validation list."""
    for split in ("train", "val", "test"):
        names = [(f"{split}/{index} x.jpg", index) for index in range(200)]
        for name, _ in names:
            touch(tmp_path / "cub" / name)
        write_list(tmp_path / "cub" / f"{split}.txt", names)
    return tmp_path / "cub"


def test_lists_stand_in_place_of_what_was_published(cub):
    data = read("fgvc/cub", cub.parent)
    assert sizes(data) == {"train": 200, "validation": 200, "test": 200}
    assert data.evaluation["test"].inputs[3] == cub / "test" / "3 x.jpg"
    assert not data.inventory.left_out


def test_what_is_wrong_with_a_set_is_named(cub, tmp_path):
    with pytest.raises(
        UserError, match="has 200 classes, and Stanford Dogs has 120: give the whole"
    ):
        read("fgvc/dogs", cub)
    with pytest.raises(UserError, match=r"unknown 'fgvc/cup'\. Did you mean 'fgvc/cub'"):
        read("fgvc/cup", cub)
    with pytest.raises(UserError, match=r"holds none of these: train\.txt, test\.txt; images\.txt"):
        read("fgvc/cub", cub / "train")
    (cub / "val" / "7 x.jpg").unlink()
    with pytest.raises(UserError, match=r"val\.txt line 8: the picture .*7 x\.jpg does not exist"):
        read("fgvc/cub", cub)
    birds = tmp_path / "birds"
    as_birds(birds, 200, 1, 1)
    (birds / "train_test_split.txt").write_text("1-train0 1\n")
    with pytest.raises(
        UserError, match=r"images\.txt 1-train1 is not in image_class_labels\.txt or"
    ):
        read("fgvc/cub", birds)
    (birds / "images.txt").write_text("alone\n")
    with pytest.raises(UserError, match=r"images\.txt has a line that is not `NUMBER VALUE`"):
        read("fgvc/cub", birds)
    flowers = tmp_path / "flowers"
    as_flowers(flowers)
    (flowers / "setid.mat").write_bytes(b"MATLAB no more")
    with pytest.raises(UserError, match=r"setid\.mat is no sound MATLAB file"):
        read("fgvc/flowers", flowers)


def test_the_suites_know_their_tasks():
    assert suite_members("fgvc", None) == [f"fgvc/{name}" for name in SETS]
    assert len(suite_members("few-shot", None)) == 25
    assert group_of("few-shot/oxford-pets:4") == "few-shot" and group_of("fgvc/cub") == "fgvc"
