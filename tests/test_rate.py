"""The course of the learning rate: the papers' protocols, and what does not fit is refused."""

import json
import math

import pytest
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler

from mdpd_deploy.commands.train import plan
from mdpd_deploy.config import OptimConfig, check_config
from mdpd_deploy.errors import UserError
from mdpd_deploy.train.rate import build_rate

AN_EPOCH = 32
DTL = OptimConfig(
    warmup_epochs=10, warmup_lr=1e-7, warmup_prefix=False, min_lr=1e-8, cooldown_epochs=10,
    per_epoch=True,
)  # fmt: skip


def rates(lr, steps, options, steps_per_epoch=AN_EPOCH):
    rate = build_rate(lr, steps, steps_per_epoch, options)
    return [lr * rate.share(step) for step in range(steps)]


@pytest.mark.parametrize("lr", [1e-4, 8e-3])
def test_dtls_110_epochs_are_its_formula_epoch_for_epoch(lr):
    ours = rates(lr, 110 * AN_EPOCH, DTL)
    for epoch in range(110):  # DTL's own epochs count from 1, and its scheduler's index from 0
        (found,) = {*ours[epoch * AN_EPOCH : (epoch + 1) * AN_EPOCH]}
        if epoch < 10:
            wanted = 1e-7 + epoch * (lr - 1e-7) / 10
        elif epoch < 100:
            wanted = 1e-8 + (lr - 1e-8) * (1 + math.cos(math.pi * epoch / 100)) / 2
        else:
            wanted = 1e-8
        assert found == pytest.approx(wanted, rel=1e-12), epoch
        if epoch < 100:  # without the floor, as it is written in short
            short = lr * 0.5 * (1 + math.cos(math.pi * epoch / 100))
            assert epoch < 10 or abs(found - short) <= 1e-8


def timms(lr, epochs, **options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = CosineLRScheduler(optimizer, **options)
    found = []
    for epoch in range(epochs):
        scheduler.step(epoch)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("prefix", [False, True])
def test_the_cosine_is_timms(prefix):
    options = DTL.model_copy(update={"warmup_prefix": prefix})
    ours = rates(5e-3, 110 * AN_EPOCH, options)[::AN_EPOCH]
    wanted = timms(
        5e-3, 110, t_initial=100 - 10 * prefix, lr_min=1e-8, warmup_t=10, warmup_lr_init=1e-7,
        warmup_prefix=prefix,
    )  # fmt: skip
    assert ours == pytest.approx(wanted, rel=1e-12)


def test_by_steps_every_step_has_its_own_rate():
    ours = rates(1.0, 40, OptimConfig(warmup_steps=4, schedule="linear", min_lr=0.1), 7)
    assert ours[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert ours[4:] == pytest.approx([0.1 + 0.9 * (1 - n / 36) for n in range(36)])
    held = rates(1.0, 40, OptimConfig(warmup_steps=4, warmup_lr=0.2, schedule="constant"), 7)
    assert held == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 36)
    tail = OptimConfig(warmup=0, schedule="constant", min_lr=0.1, cooldown_epochs=2)
    assert rates(1.0, 40, tail, 7) == [1.0] * 26 + [0.1] * 14


def test_the_default_is_a_tenth_of_warm_up_and_a_cosine_to_nothing():
    ours = rates(1.0, 100, OptimConfig())
    assert ours[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert ours[10:] == pytest.approx([(1 + math.cos(math.pi * n / 90)) / 2 for n in range(90)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warmup_steps": 5, "warmup_epochs": 1.0}, "warmup_steps and warmup_epochs each say"),
        ({"warmup": 0.2, "warmup_steps": 5}, "warmup and warmup_steps each say"),
        ({"warmup": 0.0, "warmup_lr": 1e-6}, r"optim\.warmup_lr is not read without a warm-up"),
        ({"warmup_steps": 0, "warmup_prefix": False}, r"warmup_prefix is not read without"),
        ({"schedule": "constant", "min_lr": 1e-6}, "min_lr is not read with .*constant"),
        ({"schedule": "constant", "warmup_prefix": True}, "warmup_prefix is not read with"),
        ({"cooldown_epochs": 1.0}, r"needs optim\.min_lr"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        check_config({"optim": options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warmup_steps": 41}, r"optim\.warmup_steps: a warm-up of 41 steps does not fit .* of 40"),
        ({"warmup_epochs": 6}, r"optim\.warmup_epochs: a warm-up of 42 steps"),
        ({"warmup_steps": 30, "min_lr": 0.1, "cooldown_epochs": 2}, "30 steps and a tail of 14"),
        ({"min_lr": 2.0}, r"optim\.min_lr=2 is above the learning rate 1"),
        ({"warmup_lr": 2.0}, r"optim\.warmup_lr=2 is above"),
    ],
)
def test_phases_that_do_not_fit_the_run_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        build_rate(1.0, 40, 7, OptimConfig(**options))


def test_a_run_has_the_rates_it_plans_and_the_groups_keep_their_ratio(
    tmp_path, image_options, fit_in, monkeypatch
):
    from mdpd_deploy.train import loop

    seen, plain = [], loop.one_step

    def step(setup, optimizer, parts, number):
        seen.append({group["group"]: group["lr"] for group in optimizer.param_groups})
        return plain(setup, optimizer, parts, number)

    monkeypatch.setattr(loop, "one_step", step)
    sets = [
        "optim.warmup_epochs=1", "optim.warmup_lr=1e-5", "optim.min_lr=1e-6", "optim.per_epoch=true",
        "optim.cooldown_epochs=1", "optim.norm_lr=4e-3",
    ]  # fmt: skip
    words = {**image_options, "steps": None, "epochs": 4, "batch": 18, "set": sets, "lr": 1e-3}
    assert plan(**words).learning_rate == (
        "0.001, warm-up of 2 steps from 1e-05, cosine to 1e-06, the last 2 steps at 1e-06, "
        "stays within an epoch"
    )
    run = fit_in(tmp_path / "run", words)  # 36 pictures: two steps an epoch
    middle = 1e-6 + (1e-3 - 1e-6) / 2
    assert [rates["side"] for rates in seen] == pytest.approx(
        [rate for rate in (1e-5, 1e-3, middle, 1e-6) for _ in range(2)]
    )
    assert all(group["norms"] == pytest.approx(4 * group["side"]) for group in seen)
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["lr"] == pytest.approx(1e-5)
