"""Optimiser steps: the examples in them, the parts and processes that share them, the losses."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from mdpd_deploy import fit
from mdpd_deploy.backbones import load_backbone
from mdpd_deploy.config import load_config
from mdpd_deploy.errors import UserError, WorkFailed
from mdpd_deploy.train.batches import Schedule, StepDataset
from mdpd_deploy.train.loop import one_step
from mdpd_deploy.train.methods import METHODS
from mdpd_deploy.train.optim import build_optimizer
from mdpd_deploy.train.setup import prepare


def test_two_processes_equal_one_with_the_doubled_batch(tmp_path, image_options):
    words = {name: image_options[name] for name in ("task", "data", "backbone")}
    words |= {"steps": 4, "device": "cpu"}
    # of 17 examples the third step has one, and a process none
    sets = ["backbone.dropout_active=false", "train.keep=last", "data.limit=17"]
    alone = fit(out=tmp_path / "one", batch=8, set=sets, quiet=True, **words)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29611"]
    flags = [word for name, value in words.items() for word in (f"--{name}", value)]
    flags += [word for line in sets for word in ("--set", line)]
    both = subprocess.run(
        [sys.executable, *launch, "-m", "mdpd_deploy", "train", *map(str, flags), "--batch", "4"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300, cwd=tmp_path,
        check=False,
    )  # fmt: skip
    assert both.returncode == 0, both.stderr.decode()[-3000:]
    (two,) = (tmp_path / "runs").iterdir()  # both processes chose the same folder
    assert json.loads((two / "summary.json").read_text())["processes"] == 2
    for file in ("delta.safetensors", "side.safetensors"):
        one = load_file(alone.path / "model" / file)
        other = load_file(two / "model" / file)
        assert set(one) == set(other)
        for name in set(one) - {"side.gate.bias"}:  # shifts a softmax: its gradient is rounding
            torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-5, msg=name)


def test_accumulation_equals_the_larger_batch(tmp_path, image_options, fit_in):
    still = ["backbone.dropout_active=false", "train.keep=last"]
    one = fit_in(tmp_path / "one", image_options, batch=8, steps=3, set=still)
    many = fit_in(
        tmp_path / "many", image_options, batch=2, steps=3, set=[*still, "train.accumulate=4"]
    )
    a = load_file(one.path / "model" / "delta.safetensors")
    b = load_file(many.path / "model" / "delta.safetensors")
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-5, msg=name)


def test_every_step_of_an_epoch_sees_every_example_once():
    schedule = Schedule(examples=23, batch=2, accumulate=2, seed=0, world=2)
    seen = [i for step in range(schedule.steps_per_epoch) for i in schedule.members(step)]
    assert sorted(seen) == list(range(23))
    assert schedule.steps_per_epoch == 3
    for step in range(6):
        shares = [i for rank in (0, 1) for part in schedule.parts(step, rank) for i in part]
        assert sorted(shares) == sorted(schedule.members(step))
    assert list(schedule.members(0)) != list(schedule.members(3))


def test_norms_keep_still_while_the_head_learns_first(tmp_path, image_options, fit_in):
    still = ["backbone.dropout_active=false", "train.keep=last", "optim.warmup=0"]
    words = dict(method="norms", steps=2)
    free = fit_in(tmp_path / "free", image_options, set=still, **words)
    late = [*still, "optim.norms_after=0.5"]  # the second of two steps moves them
    half = fit_in(tmp_path / "half", image_options, set=late, **words)
    held = fit_in(tmp_path / "held", image_options, set=[*still, "optim.norms_after=0.9"], **words)
    one, two, none = (load_file(r.path / "model" / "delta.safetensors") for r in (free, half, held))
    start = load_backbone(held.config.backbone).state_dict()
    norms = [name for name in none if not name.startswith("head.")]
    assert norms and all(torch.equal(none[n], start[n.removeprefix("backbone.")]) for n in norms)
    assert not any(torch.equal(one[name], none[name]) for name in norms)
    assert any(not torch.equal(two[name], none[name]) for name in norms)
    torch.testing.assert_close(none["head.linear.weight"], two["head.linear.weight"])
    with pytest.raises(UserError, match=r"optim\.norms_after"):
        fit_in(tmp_path / "no", image_options, method="probe", set=["optim.norms_after=0.5"])


def test_class_weights_move_the_predictions(tmp_path, image_options, fit_in):
    run = fit_in(
        tmp_path / "run", image_options, method="probe", steps=30, lr=1e-2,
        set=["train.class_weights=[0,0,1]", "train.keep=last"],
    )  # fmt: skip
    split = run.load_evaluation()["validation"]
    assert run.summary["metrics"]["deployed"]["accuracy"] == pytest.approx(
        (split.labels == 2).mean()
    )
    with pytest.raises(UserError, match="has 2 values, but there are 3 classes"):
        fit_in(tmp_path / "bad", image_options, set=["train.class_weights=[1,1]"])


@pytest.mark.parametrize("augment", ["flip", "crop"])
def test_augmentation_changes_the_pictures_and_is_repeatable(augment, tiny_vit, digit_folder):
    def pictures(kind):
        flags = {"task": "classify", "data.path": str(digit_folder), "data.augment": kind}
        setup = prepare(load_config(None, {**flags, "backbone.name": str(tiny_vit)}))
        dataset = StepDataset(
            setup.data.train, setup.backbone.preprocess, setup.task, setup.config, setup.schedule
        )
        return dataset[0][0].inputs["pixel_values"]

    assert torch.equal(pictures(augment), pictures(augment))
    assert not torch.equal(pictures(augment), pictures("none"))


def test_loader_processes_change_nothing(tmp_path, image_options, fit_in):
    sets = ["data.augment=crop"]
    runs = [
        fit_in(tmp_path / str(n), image_options, steps=2, set=[*sets, f"data.workers={n}"])
        for n in range(2)
    ]
    alone, beside = ((run.path / "model" / "delta.safetensors").read_bytes() for run in runs)
    assert alone == beside


def test_divergence_stops_the_run_with_the_mend(tmp_path, text_options, fit_in):
    with pytest.raises(WorkFailed, match=r"diverged. Lower optim.lr"):
        fit_in(
            tmp_path / "run", text_options, steps=60, lr=1e30,
            set=["optim.clip=null", "optim.warmup=0", "train.eval_every=60"],
        )  # fmt: skip
    assert not (tmp_path / "run" / "summary.json").exists()


def test_balanced_weights_train_and_a_class_without_examples_has_a_finite_one(
    tmp_path, text_options, fit_in
):
    options = {**text_options, "steps": 2}
    run = fit_in(tmp_path / "run", options, set=["train.class_weights=balanced"])
    assert run.summary["status"] == "completed"
    with pytest.raises(UserError, match=r"train\.class_weights"):
        fit_in(tmp_path / "bad", options, set=["train.class_weights=[-1,1]"])


def test_a_process_without_a_share_of_the_last_step_adds_zeros(tiny_vit, digit_folder):
    config = load_config(
        None,
        {
            "task": "classify", "data.path": str(digit_folder), "backbone.name": str(tiny_vit),
            "train.batch": 35,
        },
    )  # fmt: skip
    setup = prepare(config)
    schedule = Schedule(36, 35, 1, 0, world=2)
    assert [len(schedule.parts(0, rank)) for rank in (0, 1)] == [1, 1]
    optimizer = build_optimizer(setup.method)
    losses, _ = one_step(setup, optimizer, [], 0)
    assert set(losses) == set(setup.method.loss_names)
    assert all(float(value) == 0 for value in losses.values())


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"prefix"}))
def test_a_step_returns_the_losses_it_names(method, tiny_vit, digit_folder):
    flags = {"task": "classify", "data.path": str(digit_folder), "backbone.name": str(tiny_vit)}
    setup = prepare(load_config(None, {**flags, "method": method}))
    dataset = StepDataset(
        setup.data.train, setup.backbone.preprocess, setup.task, setup.config, setup.schedule
    )
    assert set(setup.method.step(dataset[0][0])) == set(setup.method.loss_names)


def test_a_batch_knows_how_far_the_run_is(tiny_vit, digit_folder, monkeypatch):
    flags = {"task": "classify", "data.path": str(digit_folder), "backbone.name": str(tiny_vit)}
    setup = prepare(load_config(None, {**flags, "train.steps": 4}))
    dataset = StepDataset(
        setup.data.train, setup.backbone.preprocess, setup.task, setup.config, setup.schedule
    )
    optimizer, learn, seen = build_optimizer(setup.method), setup.method.step, []
    monkeypatch.setattr(setup.method, "step", lambda b: seen.append(b.progress) or learn(b))
    for step in (0, 3):
        one_step(setup, optimizer, dataset[step], step)
    assert set(seen) == {0.0, 0.75}


def test_training_time_counts_the_wait_for_data(tmp_path, text_options, monkeypatch, fit_in):
    from mdpd_deploy.train import batches

    plain = batches.to_tensors

    def slow(*arguments):
        time.sleep(0.1)
        return plain(*arguments)

    monkeypatch.setattr(batches, "to_tensors", slow)
    run = fit_in(tmp_path / "run", text_options, steps=6)
    assert run.summary["time"]["train_s"] > 4 * 0.1
