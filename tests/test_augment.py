"""Random changes of training pictures, and how pictures are prepared where an option says so."""

import random
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from mdpd_deploy import export_run, fit
from mdpd_deploy.commands.train import build_config, plan
from mdpd_deploy.config import DataConfig
from mdpd_deploy.data.preprocess import ImagePreprocess
from mdpd_deploy.errors import UserError
from mdpd_deploy.tasks import Classify
from mdpd_deploy.train.augment import build_augment, build_mix, drawn_from
from mdpd_deploy.train.batches import StepDataset
from mdpd_deploy.train.setup import prepare

PLAIN = ImagePreprocess((32, 32), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), "bilinear", 0.875)
POLICIES = ["rand-m9-mstd0.5-inc1", "augmix-m5-w3", "original-mstd0.5"]


def noise(width=40, height=32, seed=0):
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def dataset_of(options, *sets):
    setup = prepare(build_config(None, list(sets), options))
    return StepDataset(
        setup.data.train, setup.backbone.preprocess, setup.task, setup.config, setup.schedule
    )


# --- one picture ---------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_is_timms_and_drawn_from_the_key_alone(policy):
    data = DataConfig(augment="flip", auto_augment=policy)
    augment = build_augment(data, PLAIN)
    assert augment is not None
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    one, again, other = (augment(noise(), (0, 1, key)) for key in (2, 2, 3))
    assert state == (random.getstate(), np.random.get_state()[1].tolist(),
                     torch.get_rng_state().tolist())  # fmt: skip
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    _, changes, _ = create_transform(
        (3, 32, 32), is_training=True, auto_augment=policy, mean=PLAIN.mean, std=PLAIN.std,
        interpolation="bilinear", separate=True,
    )  # fmt: skip
    with drawn_from(0, 1, 2):
        picture = PLAIN.geometry(noise())
        mirrored = torch.rand(1) < 0.5
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture
        wanted = changes(picture)
    np.testing.assert_array_equal(one, PLAIN.to_array(wanted))


@pytest.mark.parametrize(("scale", "area"), [(None, (0.08, 1.0)), ([0.6, 0.9], (0.6, 0.9))])
def test_a_crop_keeps_the_share_that_is_asked(scale, area):
    augment: Any = build_augment(DataConfig(augment="crop", scale=scale), PLAIN)
    with drawn_from(0):
        drawn = [augment.frame.make_params([torch.empty(3, 100, 100)]) for _ in range(300)]
    kept = [params["height"] * params["width"] / 1e4 for params in drawn]
    assert area[0] - 0.02 <= min(kept) < area[0] + 0.15
    assert area[1] - 0.15 < max(kept) <= area[1] + 0.02


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["data.auto_augment=foo"], "'foo' is none of timm's policies"),
        (["data.auto_augment=rand-foo"], "'foo' is no letters with a number"),
        (["data.auto_augment=rand-zz9"], "is none of timm's policies"),
        (["data.scale=[0.5,1]"], r"data\.scale is of random crops"),
        (["data.scale=[1,0.5]", "data.augment=crop"], "from the least share to the most"),
        (["data.crop_pct=0"], r"data\.crop_pct"),
        (["data.mixup=0.2", "loss.logits_form=dkd"], r"data\.mixup leaves no picture one class"),
    ],
)
def test_what_cannot_be_is_refused(sets, words, image_options):
    with pytest.raises(UserError, match=words):
        plan(**image_options, set=sets)


@pytest.mark.parametrize(
    "option", ["auto_augment=rand-m9", "mixup=1", "cutmix=1", "crop_pct=0.9", "normalize=half"]
)
def test_texts_have_no_pictures(option, text_options):
    with pytest.raises(UserError, match=rf"data\.{option.partition('=')[0]} is for images"):
        plan(**{**text_options, "set": [*text_options["set"], f"data.{option}"]})


# --- mixed pictures ------------------------------------------------------------------------------


def test_mixup_blends_pictures_and_labels_by_one_share():
    pictures, labels = torch.eye(4).reshape(4, 1, 2, 2), torch.tensor([0, 1, 2, 2])
    mix: Any = build_mix(DataConfig(mixup=0.8), Classify.numbered(3))
    with drawn_from(0):
        mixed, shares = mix(pictures.clone(), labels)
    share = shares[0, 0].item()
    assert 0 < share < 1
    whole = torch.nn.functional.one_hot(labels, 3)
    torch.testing.assert_close(shares, share * whole + (1 - share) * whole.roll(1, 0))
    torch.testing.assert_close(mixed, share * pictures + (1 - share) * pictures.roll(1, 0))


def test_cutmix_gives_labels_the_share_of_the_box():
    pictures = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 16, 16)
    mix: Any = build_mix(DataConfig(cutmix=1.0), Classify.numbered(4))
    with drawn_from(3):
        mixed, shares = mix(pictures.clone(), torch.arange(4))
    for index in range(4):
        own = (mixed[index] == index).float().mean()
        assert {*mixed[index].unique().tolist()} == {index, (index - 1) % 4}
        torch.testing.assert_close(shares[index, index], own)
        torch.testing.assert_close(shares[index].sum(), torch.tensor(1.0))


def test_either_is_taken_batch_by_batch():
    mix: Any = build_mix(DataConfig(cutmix=1.0, mixup=1.0), Classify.numbered(4))
    pictures = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 16, 16)
    values = []
    for key in range(12):
        with drawn_from(key):
            mixed, _ = mix(pictures.clone(), torch.arange(4))
        values.append(len(mixed[1].unique()))
    assert {1, 2} <= {*values}  # blended evenly, or a box of another


@pytest.mark.parametrize("weights", ["none", "[1,2,5]"])
def test_the_loss_of_mixed_labels_is_the_mixture_of_the_losses(weights, image_options):
    sets = ("data.mixup=1", "loss.label_smoothing=0.1", f"train.class_weights={weights}")
    setup = prepare(build_config(None, list(sets), image_options))
    raw, one, two = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1]), torch.tensor([2, 2, 1, 0, 0])
    hot = [torch.nn.functional.one_hot(labels, 3) for labels in (one, two)]
    mixed = setup.task.loss(raw, 0.3 * hot[0] + 0.7 * hot[1])
    wanted = 0.3 * setup.task.loss(raw, one) + 0.7 * setup.task.loss(raw, two)
    torch.testing.assert_close(mixed, wanted)


def test_a_step_is_mixed_as_often_as_it_is_asked_for(image_options):
    data = dataset_of(image_options, "data.mixup=1", "data.cutmix=1")
    (one,), (again,), (next_one,) = data[3], data[3], data[4]
    assert torch.equal(one.inputs["pixel_values"], again.inputs["pixel_values"])
    assert torch.equal(one.labels, again.labels) and one.labels.shape == (8, 3)
    assert not torch.equal(one.labels, next_one.labels)


@pytest.mark.parametrize("where", ["loss.logits_form=kl", "loss.logits_where=better"])
def test_a_run_with_everything_resumes_bit_for_bit(tmp_path, image_options, fit_in, where):
    sets = [
        "data.augment=crop", "data.auto_augment=rand-m9-mstd0.5-inc1", "data.mixup=0.8",
        "data.cutmix=1", "checkpoint.every=2", "train.keep=last", "loss.logits=1", where,
    ]  # fmt: skip
    run = fit_in(tmp_path / "run", image_options, set=sets)
    whole = (run.path / "model" / "delta.safetensors").read_bytes()
    (run.path / "summary.json").unlink()
    shutil.rmtree(run.path / "model")
    shutil.rmtree(max(run.path.glob("checkpoints/step-*")))
    again = fit(resume=run.path, quiet=True)
    assert (again.path / "model" / "delta.safetensors").read_bytes() == whole


def test_numbers_are_not_mixed(tmp_path, tiny_vit):
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index in range(8):
        picture = Image.fromarray((digits.images[index] * 15).astype("uint8"))
        picture.save(tmp_path / f"{index}.png")
    table = tmp_path / "scores.csv"
    table.write_text("file,score\n" + "".join(f"{i}.png,{i}\n" for i in range(8)))
    words = dict(task="regress", data=table, image="file", label="score", backbone=tiny_vit)
    with pytest.raises(UserError, match=r"data\.mixup mixes the labels of two pictures"):
        plan(**words, set=["data.mixup=0.2"])


# --- how a picture is prepared -------------------------------------------------------------------


def test_resize_256_crop_224_travels_with_the_model(tmp_path, image_options, fit_in, digit_folder):
    sets = ["data.resize=squash", "data.crop_pct=0.5", "data.normalize=imagenet"]
    run = fit_in(tmp_path / "run", image_options, method="probe", steps=1, set=sets)
    bundle = export_run(run.path, out=tmp_path / "bundle")
    transform = create_transform(
        (3, 16, 16), is_training=False, crop_mode="squash", crop_pct=0.5, interpolation="bicubic"
    )  # ImageNet's mean and deviation are timm's default
    file = min(digit_folder.glob("validation/*/*.png"))
    for preprocess in (run.preprocess, bundle.preprocess):
        ours = preprocess([file])["pixel_values"][0]
        np.testing.assert_array_equal(ours, transform(Image.open(file).convert("RGB")).numpy())


def test_the_backbones_own_preprocessing_stays_where_nothing_is_asked():
    assert PLAIN.asked(DataConfig()) == PLAIN.asked(DataConfig(normalize="model")) == PLAIN
    half = PLAIN.asked(DataConfig(normalize="half", crop_pct=0.9))
    assert (half.mean, half.std, half.crop_pct) == ((0.5,) * 3, (0.5,) * 3, 0.9)
    papers = ImagePreprocess((224, 224), PLAIN.mean, PLAIN.std).asked(
        DataConfig(resize="squash", crop_pct=0.875)
    )
    assert [int(edge / papers.crop_pct) for edge in papers.size] == [256, 256]
