"""`data.resize`: the whole picture, or its middle, from training to the bundle."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from timm.data.transforms_factory import create_transform

from mdpd_deploy import export_run, fit
from mdpd_deploy.commands.train import build_config, plan
from mdpd_deploy.config import Config, DataConfig, check_config, read_config
from mdpd_deploy.data.preprocess import ImagePreprocess
from mdpd_deploy.errors import UserError
from mdpd_deploy.export.triton.preprocess import TritonPreprocess
from mdpd_deploy.train.setup import prepare

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = ImagePreprocess((32, 32), MEAN, STD, "bilinear", 0.875)
KITTI = (93, 28)  # a picture of the data set KITTI is 3.3 times as wide as high


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("shape", [KITTI, (20, 47), (32, 32)])
@pytest.mark.parametrize(
    ("resize", "timm_options"),
    [
        ("squash", {"crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bicubic"}),
        ("pad", {"crop_mode": "border", "crop_pct": 1.0, "interpolation": "bilinear"}),
        ("crop", {"crop_mode": "center", "crop_pct": 0.875, "interpolation": "bilinear"}),
    ],
)
def test_every_way_equals_timms(shape, resize, timm_options) -> None:
    picture = noise(*shape)
    transform: Any = create_transform(
        (3, 32, 32), is_training=False, mean=MEAN, std=STD, **timm_options
    )
    ours = PLAIN.resized(resize)([picture])["pixel_values"][0]
    np.testing.assert_array_equal(ours, transform(picture).numpy())


@pytest.fixture(scope="module")
def road(tmp_path_factory) -> Path:
    """A data set in VTAB's layout whose class is the colour of the pictures' left end."""
    folder = tmp_path_factory.mktemp("vtab") / "road"
    (folder / "images").mkdir(parents=True)
    for split, count in (("train800", 8), ("val200", 4)):
        lines = []
        for index in range(count):
            picture = noise(*KITTI, seed=index)
            picture.paste(((0, 0, 0), (255, 255, 255))[index % 2], (0, 0, 20, KITTI[1]))
            picture.save(folder / "images" / f"{split}{index}.png")
            lines.append(f"images/{split}{index}.png {index % 2}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def road_options(road, tiny_vit) -> dict[str, Any]:
    return dict(task="vtab/road", data=road, backbone=tiny_vit, method="probe", steps=1, batch=4)


@pytest.fixture(scope="module")
def road_run(road_options, tmp_path_factory) -> Any:
    return fit(out=tmp_path_factory.mktemp("runs") / "road", quiet=True, **road_options)


def test_a_vtab_run_keeps_the_whole_picture_to_the_last_door(road, road_run, tmp_path) -> None:
    assert read_config(road_run.path / "config.yaml").data.resize == "squash"
    bundle = export_run(road_run.path, out=tmp_path / "bundle")
    triton = TritonPreprocess()
    triton.initialize({"model_repository": str(tmp_path), "model_version": "bundle"})
    file = road / "images" / "val2000.png"
    transform: Any = create_transform(
        (3, 16, 16), is_training=False, mean=[0.5] * 3, std=[0.5] * 3,
        interpolation="bicubic", crop_pct=1.0, crop_mode="squash",
    )  # fmt: skip
    for preprocess in (road_run.preprocess, bundle.preprocess):
        ours = preprocess([file])["pixel_values"][0]
        np.testing.assert_array_equal(ours, transform(Image.open(file)).numpy())
    raw = triton._decode(np.array([file.read_bytes()], dtype=object))
    ours = triton._preprocess([raw])["pixel_values"][0]
    np.testing.assert_array_equal(ours, transform(Image.open(file)).numpy())


def test_an_older_run_is_resumed_with_its_crop(road_run, tmp_path) -> None:
    plain = yaml.safe_load((road_run.path / "config.yaml").read_text())
    del plain["data"]["resize"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain))
    setup = prepare(read_config(tmp_path / "config.yaml"))
    assert setup.backbone.preprocess.crop_mode == "center"


def test_own_pictures_are_cropped_unless_asked(image_options) -> None:
    setup = prepare(build_config(None, [], image_options))
    assert setup.backbone.preprocess.crop_mode == "center"
    setup = prepare(build_config(None, ["data.resize=pad"], image_options))
    assert setup.backbone.preprocess.crop_mode == "border"


def test_texts_have_no_size(text_options) -> None:
    with pytest.raises(UserError, match=r"data\.resize is for images"):
        plan(**{**text_options, "set": [*text_options["set"], "data.resize=squash"]})


def test_a_config_without_younger_options_is_written_as_before() -> None:
    assert "resize" not in DataConfig().model_dump()
    assert DataConfig(resize="pad").model_dump()["resize"] == "pad"
    assert check_config(yaml.safe_load(Config().to_yaml())) == Config()
